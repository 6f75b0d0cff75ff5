"""The agent as the training process starts it: with one line on the console once its page is up."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

from gradmon import identity
from gradmon.agent.launch import LOCK_NAME, LOG_NAME, AgentOptions, ensure_agent, wait_for_agent
from gradmon.agent.prune import prune
from gradmon.config import Config
from gradmon.locks import is_held
from gradmon.log import Announcer


def start_agent(directory: Path, config: Config, say: Announcer) -> None:
    """Have an agent run for `directory`, and say where its page is once it is up.

    In our folder of a directory that several users share, the agent of that one, if it runs, is the one.
    """
    root = identity.shared_root(directory)
    served = directory if root is None or not is_held(root / LOCK_NAME) else root
    if served == directory:
        _start(directory, config)

    def announce() -> None:
        if served != directory:
            with contextlib.suppress(Exception):  # what is old may not be deleted by the site's agent, but by us
                prune(directory)
        address = wait_for_agent(served, timeout=30)
        if address is None:
            say.once(f"the agent did not start; see {served / LOG_NAME}. Training goes on, journals are kept.")
        else:
            stays = identity.linger_seconds(config.agent.linger_seconds, os.environ) or served != directory
            until = "" if stays else " until the job ends"
            say.once(f"live page and metrics{until}: {identity.page_hint(address, os.environ)}", logging.INFO)

    threading.Thread(target=announce, name="gradmon-agent-address", daemon=True).start()


def _start(directory: Path, config: Config) -> None:
    ensure_agent(
        directory,
        AgentOptions(
            listen=config.agent.listen,
            port=config.agent.port,
            linger_seconds=identity.linger_seconds(config.agent.linger_seconds, os.environ),
            token_file=config.agent.token_file,
            basic_auth_file=config.agent.basic_auth_file,
            tls_cert=config.agent.tls_cert,
            tls_key=config.agent.tls_key,
            sd_dir=config.agent.sd_dir,
            archive=config.archive,
        ),
    )
