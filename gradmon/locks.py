"""File locks that say whether a rank lives: held for the life of a process, free once it is gone, however it went.

A flock tells this across containers and after SIGKILL. A process id is never asked: zombies answer, and containers
number their own.
"""

from __future__ import annotations

import fcntl
import functools
import os
import time
from pathlib import Path

_held_descriptors: set[int] = set()


def hold_lock(path: Path) -> int:
    """Take the lock for the life of this process, and give its descriptor for `drop_lock`.

    Raises:
        BlockingIOError: another living process holds it.
        OSError: the directory can't be written.
    """
    _register_at_fork()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for attempt in range(20):  # a reader that looks at the lock holds it for microseconds
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if attempt == 19:
                os.close(descriptor)
                raise
            time.sleep(0.05)
        else:
            _held_descriptors.add(descriptor)
            return descriptor
    raise AssertionError  # pragma: no cover


def drop_lock(descriptor: int) -> None:
    """Give a lock back."""
    _held_descriptors.discard(descriptor)
    os.close(descriptor)


@functools.cache
def _register_at_fork() -> None:
    """Once, and only when there is a lock: importing has no side effects."""
    os.register_at_fork(after_in_child=_close_inherited)


def _close_inherited() -> None:
    """In a forked child (a DataLoader worker): a lock it shares would outlive the rank it stands for."""
    while _held_descriptors:
        os.close(_held_descriptors.pop())


def is_held(path: Path) -> bool:
    """True while a living process holds the flock on `path`; False also if the file is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
