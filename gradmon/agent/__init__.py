"""The agent: one process per node that reads the journals of all ranks and serves them as metrics and as a page.

It never imports torch. What the training process needs of it (`launch`) imports no server either.
"""

from __future__ import annotations

from pathlib import Path

from gradmon.agent.launch import agent_address, ensure_agent, wait_for_agent

__all__ = ["agent_address", "ensure_agent", "run_agent", "wait_for_agent"]


def run_agent(directory: Path, *, listen: str, port: int, linger_seconds: float | None, spawned: bool) -> int:
    """Be the agent of `directory` until a signal, or until `linger_seconds` after the last rank is gone.

    Args:
        directory: where the journals lie; made if it is not there.
        listen: address to bind.
        port: port wanted; where it is taken the next free one, up to 100 further. 0: any.
        linger_seconds: None serves for ever.
        spawned: started by `ensure_agent`; then another agent in its place is what was wanted, not an error.

    Returns:
        The exit code: 0, or 1 where another agent runs (and this one was started by hand) or nothing can be bound.
    """
    from gradmon.agent.server import serve  # the training process imports this package, but not the server

    return serve(directory, listen=listen, port=port, linger_seconds=linger_seconds, spawned=spawned)
