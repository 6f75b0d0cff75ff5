"""Marks the time in which a command looks for a function in the user's code, where no training may begin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

#: Of this thread: a training process may look for a function of the user's on its journal's thread.
_looking: ContextVar[bool] = ContextVar("gradmon_looking", default=False)


class TrainsOnImportError(RuntimeError):
    """`attach()` was called by code that was only imported, or asked to make a model."""


@contextlib.contextmanager
def only_looking() -> Iterator[None]:
    """Inside, `refuse_to_train` raises."""
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def refuse_to_train() -> None:
    """To be called where a training begins.

    Raises:
        TrainsOnImportError: this is no training.
    """
    if _looking.get():
        raise TrainsOnImportError(
            "gradmon only looks for a function in this module: put the training under `if __name__ == '__main__':`"
        )
