"""Copies of journals in a directory that outlives the node's own: /tmp of a job and an emptyDir vanish with it.

A thread of its own copies, because an archive on a network file system may hang: then copies are late, and nothing
else is. A journal is copied when its rank is gone, after an incident of its run (once a minute at most), and when the
agent is told to end; each time only if it changed. Copies have the same names below the archive, without locks, and
are plain SQLite files out of WAL mode: a reader needs no more than to read them. A rank that still lived when its
journal was copied last reads as crashed there.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from gradmon.agent.store import Store, signature_of
from gradmon.locks import is_held

logger = logging.getLogger("gradmon.agent")

POLL_SECONDS = 1.0
#: While incidents go on, a journal is copied this often. Also how soon a copy that failed is tried again.
PAUSE_SECONDS = 60.0
#: How long the end of the agent waits for the last copies: Slurm and Kubernetes kill after 30 s.
END_SECONDS = 20.0

#: Files of a journal that are not to be copied as they are. Copies under way have names with a dot in front.
_NOT_COPIED = re.compile(r"rank-\d+\.(db|db-wal|db-shm|db-journal|lock)|\..*|.*\.tmp")

_Signature = tuple[int, ...]


@dataclass
class _Copied:
    """What is known of a file's copy."""

    signature: _Signature = ()
    """Of the file when it was copied last; () before."""
    incident: int = 0
    """Sequence of the newest event of its run by then."""
    tried: float = float("-inf")
    """When a copy was tried last (monotonic)."""
    failed: bool = False


class Archive:
    """Copies what `store` knows to `path` from `start` to `finish`. `store.errors["archive"]` counts what fails.

    Raises:
        ValueError: the archive can't be made or written; names the cure.
    """

    def __init__(self, path: str, store: Store) -> None:
        self._path = Path(path).expanduser().absolute()
        self._store = store
        self._errors = store.errors
        self._copied: dict[Path, _Copied] = {}
        self._urged = threading.Event()
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradmon-archive", daemon=True)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"archive {self._path} can't be made ({error.strerror}); {_CURE}") from None
        if not os.access(self._path, os.W_OK | os.X_OK):
            raise ValueError(f"archive {self._path} can't be written by user {os.getuid()}; {_CURE}")
        if self._path.resolve() == store.directory.resolve():
            raise ValueError(f"archive {self._path} is the directory of the journals itself; {_CURE}")

    def start(self) -> None:
        """Begin to watch for what is to be copied; returns at once."""
        self._thread.start()

    def urge(self) -> None:
        """Copy everything that changed, now: the end may be near."""
        self._urged.set()
        self._wake.set()

    def finish(self, timeout: float = END_SECONDS) -> None:
        """Copy everything that changed and end the thread; one that hangs is left behind after `timeout` seconds."""
        self._ending.set()
        self.urge()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._errors["archive"] += 1
            logger.warning("the archive %s does not take the last copies: ended without them", self._path)

    def _run(self) -> None:
        while True:
            self._wake.clear()
            ending = self._ending.is_set()
            self._round()
            if ending:
                return
            self._wake.wait(POLL_SECONDS)

    def _round(self) -> None:
        everything = self._ending.is_set()
        if self._urged.is_set():
            self._urged.clear()
            everything = True
        sources = self._sources()
        self._copied = {source: self._copied.get(source, _Copied()) for source, _, _ in sources}
        for source, incident, living in sources:
            known = self._copied[source]
            if self._due(source, known, incident, living=living, everything=everything):
                self._copy(source, known, incident)

    def _sources(self) -> list[tuple[Path, int, bool]]:
        """(file, sequence of the newest event of its run, whether its rank lives) of all there is."""
        incidents: dict[Path, int] = {}
        with self._store.lock:
            for instance in self._store.instances:
                newest = max((sequence for sequence, _ in instance.events.values()), default=0)
                incidents.update((journal.path, newest) for journal in instance.journals())
        found = {path: (newest, is_held(path.with_suffix(".lock"))) for path, newest in incidents.items()}
        for path, (newest, living) in list(found.items()):
            for other in _others(path.parent):
                found[other] = (newest, living or found.get(other, (0, False))[1])
        return [(path, newest, living) for path, (newest, living) in found.items()]

    def _due(self, source: Path, known: _Copied, incident: int, *, living: bool, everything: bool) -> bool:
        now = signature_of(source)
        if not now or now == known.signature:
            return False
        if not known.signature and not living and self._is_there(source):
            known.signature = now  # an agent before us has copied it
            return False
        if everything:
            return True
        waited = time.monotonic() - known.tried >= PAUSE_SECONDS
        if living:
            return waited and incident > known.incident
        return waited or not known.failed

    def _is_there(self, source: Path) -> bool:
        """Whether the archive holds a copy made after the last change."""
        try:
            return self._target(source).stat().st_mtime_ns > max(signature_of(source)[1::3])
        except OSError:
            return False

    def _target(self, source: Path) -> Path:
        return self._path.joinpath(*source.parts[-4:])  # run, instance, attempt, file; without its user

    def _copy(self, source: Path, known: _Copied, incident: int) -> None:
        known.tried = time.monotonic()
        before = signature_of(source)
        try:
            target = self._target(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._plain(source) as plain:
                _put(plain, target, source.stat().st_mode & 0o777)
        except Exception as error:  # whatever it is, the others are copied and served on
            if source.exists():
                self._errors["archive"] += 1
                if not known.failed:
                    logger.warning("can't copy %s to the archive: %s", source, error)
                known.failed = True
        else:
            known.signature, known.incident, known.failed = before, incident, False

    @contextmanager
    def _plain(self, source: Path) -> Iterator[Path]:
        """A file to copy as it is: of a journal one consistent look, out of WAL mode, made on the node's own disk."""
        if source.suffix != ".db":
            yield source
            return
        plain = self._store.directory / ".archive.db"  # one thread, and one agent per directory
        plain.unlink(missing_ok=True)
        try:
            uri = f"file:{quote(str(source))}?mode=ro"
            with (
                closing(sqlite3.connect(uri, uri=True, timeout=1.0)) as journal,
                closing(sqlite3.connect(plain, isolation_level=None)) as copy,
            ):
                copy.execute("PRAGMA synchronous = OFF")
                journal.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
            yield plain
        finally:
            plain.unlink(missing_ok=True)


_CURE = "name a directory that this user may write and that outlives this node's, or leave archive out"


def _others(folder: Path) -> list[Path]:
    """Bundles and what else lies beside journals, as far as we may read it: bundles are private to their user."""
    try:
        with os.scandir(folder) as entries:
            files = [Path(e.path) for e in entries if e.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return [file for file in files if not _NOT_COPIED.fullmatch(file.name) and os.access(file, os.R_OK)]


def _put(plain: Path, target: Path, mode: int) -> None:
    """Copy a file so that it is there whole or not at all, and on the disk before it has its name."""
    beside = target.with_name(f".{target.name}.{uuid4().hex}.tmp")  # agents of several nodes may write here at once
    try:
        with plain.open("rb") as source, beside.open("xb") as copy:
            os.fchmod(copy.fileno(), mode)  # a bundle stays private
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
