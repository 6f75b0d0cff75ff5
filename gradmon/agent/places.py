"""Where journals lie below a directory, and what their paths say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_JOURNAL_NAME = re.compile(r"rank-(\d{5,})\.db")


class Place(NamedTuple):
    """A journal's path and what the path says."""

    path: Path
    user: str
    """Folder of the user who wrote it, in a directory that several share; else empty."""
    run: str
    instance: str
    attempt: int
    rank: int


def find_journals(directory: Path) -> Iterator[Place]:
    """All journals below `directory`, and in the folders that other users have in it. What is not ours is passed over.

    `DIR/<run>/<instance>/<attempt>/` or, in another user's folder, `DIR/<user>/<run>/<instance>/<attempt>/`.
    """
    yield from _journals(directory, "")
    owner = _owner(directory)
    for folder in _folders(directory):
        if _owner(folder) != owner:
            yield from _journals(folder, folder.name)


def _journals(directory: Path, user: str) -> Iterator[Place]:
    for run in _folders(directory):
        for instance in _folders(run):
            for attempt in _folders(instance):
                if attempt.name.isdecimal():
                    for name in _names(attempt):
                        match = _JOURNAL_NAME.fullmatch(name)
                        if match:
                            yield Place(attempt / name, user, run.name, instance.name, int(attempt.name), int(match[1]))


def _owner(directory: Path) -> int:
    try:
        return directory.lstat().st_uid
    except OSError:
        return -1  # gone meanwhile


def _folders(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:
        return []  # gone, or not ours to read


def _names(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return []
