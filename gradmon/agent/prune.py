"""Old instances are deleted, so that a node does not fill up: after 7 days, or oldest first beyond 2 GiB.

Never a living one, and nothing but gradmon's own files: a `--dir` that points at something else stays as it is. Nor a
copy, which has no lock: an archive is kept by whoever made it. In a directory that several users share, each user's
ranks prune their own folder; an agent of another user can't.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradmon.agent.places import find_journals
from gradmon.journal import read_journal
from gradmon.locks import is_held

KEEP_SECONDS = 7 * 24 * 3600.0
KEEP_BYTES = 2 << 30

_OURS = re.compile(r"rank-\d{5,}(\.(db|db-wal|db-shm|db-journal|lock)|-step-\d+\.bundle)|health\.json")


@dataclass(frozen=True)
class _Old:
    """An instance whose ranks are all gone."""

    path: Path
    newest_seconds: float
    size: int
    incidents: bool


def prune(directory: Path, *, keep_seconds: float = KEEP_SECONDS, keep_bytes: int = KEEP_BYTES) -> list[Path]:
    """Delete what is too old or too much, and return the instances deleted. Those with incidents go last."""
    instances = {place.path.parent.parent for place in find_journals(directory)}
    instances = {instance for instance in instances if _ours(instance)}
    total = sum(_size(instance) for instance in instances)
    removed: list[Path] = []
    old = [_examine(instance) for instance in instances if not _living(instance)]
    oldest = time.time() - keep_seconds
    # What must go anyway goes first: it may make room enough for the others.
    for candidate in sorted(old, key=lambda x: (x.newest_seconds >= oldest, x.incidents, x.newest_seconds)):
        if (candidate.newest_seconds < oldest or total > keep_bytes) and _remove(candidate.path):
            removed.append(candidate.path)
            total -= candidate.size
    return removed


def living_ranks(directory: Path) -> int:
    """Number of living ranks below `directory`, whether their journals can be read or not."""
    return sum(1 for place in find_journals(directory) if is_held(place.path.with_suffix(".lock")))


def _files(instance: Path) -> Iterator[Path]:
    for attempt in instance.iterdir():
        if attempt.name.isdecimal() and attempt.is_dir() and not attempt.is_symlink():
            yield from (file for file in attempt.iterdir() if _OURS.fullmatch(file.name))


def _ours(instance: Path) -> bool:
    """Whether ranks wrote it here, and we may delete it."""
    files = list(_files(instance))
    deletable = all(os.access(folder, os.W_OK) for folder in {file.parent for file in files})
    return deletable and any(file.suffix == ".lock" for file in files)


def _living(instance: Path) -> bool:
    return any(is_held(file) for file in _files(instance) if file.suffix == ".lock")


def _size(instance: Path) -> int:
    total = 0
    for file in _files(instance):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _examine(instance: Path) -> _Old:
    files = list(_files(instance))
    newest = max((file.stat().st_mtime for file in files), default=0.0)
    incidents = any(_has_events(file) for file in files if file.suffix == ".db")
    return _Old(instance, newest, _size(instance), incidents)


def _has_events(journal: Path) -> bool:
    try:
        return bool(read_journal(journal, after_step=1 << 62, after_detail=1 << 62, limit=1).events)
    except Exception:  # what can't be read holds nothing worth keeping longer
        return False


def _remove(instance: Path) -> bool:
    """Delete the files of an instance and the folders this leaves empty; False if a rank has come to life meanwhile."""
    files = sorted(_files(instance))
    with contextlib.ExitStack() as stack:
        for lock in (file for file in files if file.suffix == ".lock"):
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        for file in files:
            file.unlink(missing_ok=True)
    for folder in (*{file.parent for file in files}, instance, instance.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()
    return True
