"""The agent: one process per node that reads the journals of all ranks and serves them as metrics and as a page.

It never imports torch. What the training process needs of it (`launch`) imports no server either.
"""

from __future__ import annotations

from pathlib import Path

from gradmon.agent.launch import AgentOptions, agent_address, ensure_agent, wait_for_agent

__all__ = ["AgentOptions", "agent_address", "ensure_agent", "run_agent", "wait_for_agent"]


def run_agent(directory: Path, options: AgentOptions) -> int:
    """Be the agent of `directory` until a signal, or until its linger time after the last rank is over.

    Args:
        directory: where the journals lie; made if it is not there.
        options: how to serve them.

    Returns:
        The exit code: 0, or 1 where another agent runs (and this one was started by hand) or nothing can be bound.

    Raises:
        ValueError: a file or directory of the options is not fit for its purpose; names it and the cure.
    """
    from gradmon.agent.server import serve  # the training process imports this package, but not the server

    return serve(directory, options)
