"""The agent as the training process starts it: with one line on the console once its page is up."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from gradmon import identity
from gradmon.agent.launch import ensure_agent, wait_for_agent
from gradmon.config import Config
from gradmon.log import Announcer


def start_agent(directory: Path, config: Config, say: Announcer) -> None:
    """Have an agent run for `directory`, and say where its page is once it is up."""
    ensure_agent(
        directory,
        listen=config.agent.listen,
        port=config.agent.port,
        linger_seconds=identity.linger_seconds(config.agent.linger_seconds, os.environ),
    )

    def announce() -> None:
        address = wait_for_agent(directory, timeout=30)
        if address is None:
            say.once(f"the agent did not start; see {directory / 'agent.log'}. Training goes on, journals are kept.")
        else:
            say.once(f"live page and metrics: {identity.page_hint(address, os.environ)}", logging.INFO)

    threading.Thread(target=announce, name="gradmon-agent-address", daemon=True).start()
