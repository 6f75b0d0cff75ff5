"""The journal: one SQLite file per rank, written by a thread of the training process, read by the agent.

    DIR/<run>/<instance>/<attempt>/rank-00007.db       steps, details, events, counters, samples, meta
    DIR/<run>/<instance>/<attempt>/rank-00007.lock     flock held by the rank for its life

The training thread only puts objects into a queue. The writer's thread waits until the device has delivered a step,
decodes it, and commits at once: what is committed survives SIGKILL, because SQLite's write-ahead log is then in the
page cache of the kernel. A free lock means the rank is gone.

The writer ends by leaving WAL mode, so that an agent of another user can read the finished file without writing
beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import queue
import sqlite3
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from gradmon.counting import CounterKey, count_event, count_step
from gradmon.locks import drop_lock, hold_lock, is_held
from gradmon.record import EVENT_FIELDS, STEP_FIELDS, Detail, Event, Landing, RankIdentity, StepRecord, ValueCopy

#: Written into `PRAGMA user_version`. A reader knows this one and two before it, and reports newer ones.
#: 1: no details, and steps end with memory_bytes.
FORMAT_VERSION = 2
HEARTBEAT_SECONDS = 5.0
SAMPLE_SECONDS = 2.0
#: A rank whose heartbeat is older than this does not run its threads any more.
STUCK_SECONDS = 3 * HEARTBEAT_SECONDS
#: Steps the writer may lie behind before new ones are dropped (and counted): memory stays bounded on a dead disk.
QUEUE_LIMIT = 10_000
_DETAILED_QUEUE_LIMIT = 256
#: Without a step for this long a living rank is called busy instead of running.
BUSY_SECONDS = 30.0
_BATCH = 512
_TRIM_EVERY = 128
_PAGE_BYTES = 4096
#: Pages of details after which a transaction is closed, so that the write-ahead log stays at its few MiB.
_COMMIT_PAGES = 1024
#: Details a reader takes in one look: what is not measured in each of them (zeros, updates) is then rarely missed.
_DETAILS_AT_ONCE = 12
_SAMPLE_PREFIX = "sample:"

_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE steps (id INTEGER PRIMARY KEY, {", ".join(STEP_FIELDS)});
CREATE TABLE details (id INTEGER PRIMARY KEY, step, place, stats BLOB);
CREATE TABLE events (id INTEGER PRIMARY KEY, {", ".join(EVENT_FIELDS)});
CREATE TABLE counters (name TEXT, labels TEXT, value REAL NOT NULL, PRIMARY KEY (name, labels)) WITHOUT ROWID;
CREATE TABLE state (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {FORMAT_VERSION};
"""
_INSERT_STEP = f"INSERT INTO steps ({', '.join(STEP_FIELDS)}) VALUES ({', '.join('?' * len(STEP_FIELDS))})"  # noqa: S608
_INSERT_EVENT = f"INSERT INTO events ({', '.join(EVENT_FIELDS)}) VALUES ({', '.join('?' * len(EVENT_FIELDS))})"  # noqa: S608
_INSERT_DETAIL = "INSERT INTO details (id, step, place, stats) VALUES (?, ?, ?, ?)"
_PUT_STATE = "INSERT OR REPLACE INTO state VALUES (?, ?)"
_PUT_COUNTER = "INSERT OR REPLACE INTO counters VALUES (?, ?, ?)"

End = Literal["finished", "exception"]
RankState = Literal["running", "busy", "stuck", "finished", "exception", "crashed"]


@dataclass(frozen=True, slots=True)
class _Call:
    part: str
    function: Callable[[], None]


#: A dict is what counters grow by.
_Item = Landing | Event | dict[CounterKey, float] | _Call | threading.Event | None


def journal_path(directory: Path, identity: RankIdentity) -> Path:
    """Where `identity` writes below `directory`."""
    folder = directory / identity.run / identity.instance / str(identity.attempt)
    return folder / f"rank-{identity.rank:05d}.db"


class JournalWriter:
    """Takes steps from the training thread and writes them from a thread of its own. Never raises after `__init__`.

    Args:
        path: the `.db` file.
        identity: who writes.
        parameters: names of the parameters watched, in the order of the rows of a `Detail`.
        elements: how many elements each of them has, a sharded one whole; empty where that is unknown.
        config: the effective settings, for whoever reads the journal.
        sample: what the process uses, called every few seconds.
        max_bytes: size of the file. Details fill half of it at most, the oldest steps are forgotten for the newest.
        on_error: told of what failed, as (part, error).
        also: given each step and event, on the writer's thread; must neither wait nor raise.

    Raises:
        OSError: the directory can't be written.
        BlockingIOError: another living process holds this rank's lock.
    """

    def __init__(
        self,
        path: Path,
        identity: RankIdentity,
        *,
        parameters: list[str],
        config: Mapping[str, object],
        sample: Callable[[], Mapping[str, float]],
        elements: Sequence[int] = (),
        max_bytes: int = 64 << 20,
        on_error: Callable[[str, Exception], None] = lambda _part, _error: None,
        also: Callable[[StepRecord | Event], None] = lambda _item: None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._rank = identity.rank
        self._sample = sample
        self._max_pages = max_bytes // _PAGE_BYTES
        self._on_error, self._also = on_error, also
        self._lock = hold_lock(path.with_suffix(".lock"))
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._counters: defaultdict[CounterKey, float] = defaultdict(float)
        self._unwritten: set[CounterKey] = set()
        self._dropped = 0
        self._since_trim = 0
        self._detail_pages = 1  # of the largest so far
        self._uncommitted_pages = 0
        self._memory_bytes: int | None = None
        self._kept: dict[str, float | str] = {}
        self._copies: list[tuple[str, ValueCopy]] = []
        self._next_beat = self._next_sample = 0.0
        self._end: tuple[End, str] = ("finished", "")
        meta = {"parameters": parameters, "elements": list(elements), "config": dict(config)}
        self._connection = self._create({**dataclasses.asdict(identity), **meta})
        self._thread = threading.Thread(target=self._run, name="gradmon-journal", daemon=True)
        self._thread.start()

    @property
    def behind(self) -> bool:
        """True if so many steps wait that their statistics per parameter, which are large, are better left out."""
        return self._queue.qsize() > _DETAILED_QUEUE_LIMIT

    def put(self, item: Landing | Event) -> None:
        """Hand over a step or an event; costs the caller one queue operation."""
        if self._queue.qsize() < QUEUE_LIMIT:
            self._queue.put(item)
        else:
            self._dropped += 1

    def count(self, name: str, labels: tuple[str, ...] = (), amount: int = 1) -> None:
        """Add to a counter from any thread; written with the next commit."""
        self._queue.put({(name, labels): amount})

    def call(self, part: str, function: Callable[[], None]) -> None:
        """Have something done on the writer's thread, which may wait for a disk; a failure is told under this part."""
        self._queue.put(_Call(part, function))

    def keep(self, **state: float | str) -> None:
        """Have it in every sample from now on, a number under its name in `samples`; from any thread."""
        prefixed = {name if isinstance(value, str) else _SAMPLE_PREFIX + name: value for name, value in state.items()}
        self._kept = {**self._kept, **prefixed}
        self._next_sample = 0.0
        self._queue.put({})  # wakes the writer

    def keep_copy(self, name: str, copy: ValueCopy) -> None:
        """The same for a loss on its way from the device, once it has landed; one that is not finite is counted."""
        self._copies.append((name, copy))
        self._queue.put({})

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything put so far is committed. False after `timeout` seconds."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout)

    def close(self, end: End, detail: str = "", timeout: float = 5.0) -> None:
        """Write the last row, leave WAL mode and give the lock back. A second call does nothing."""
        if self._lock < 0:
            return
        self._end = (end, detail)
        self._queue.put(None)
        self._thread.join(timeout)  # a dead disk must not hold the end of training for ever
        drop_lock(self._lock)
        self._lock = -1

    def _create(self, meta: Mapping[str, object]) -> sqlite3.Connection:
        for suffix in ("", "-wal", "-shm"):  # we hold the lock: what lies here belongs to nobody
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        _share(self.path)
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode = WAL")
        # The kernel's page cache survives the death of the process; only a power cut could lose the newest commits.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA journal_size_limit = {4 << 20}")
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()])
        connection.execute(_PUT_STATE, ("start_monotonic", time.monotonic()))
        self._write_due(connection)
        connection.execute("COMMIT")
        return connection

    def _run(self) -> None:
        while self._write_batch():
            pass
        try:
            with self._transaction() as connection:
                self._next_sample = 0.0  # the last word on memory and health
                self._write_due(connection)
            with self._transaction() as connection:
                end, detail = self._end
                connection.executemany(_PUT_STATE, [("end", end), ("end_detail", detail), ("end_seconds", time.time())])
                self._write_counters(connection)
            self._leave_wal()
        except Exception as error:
            self._on_error("journal", error)
        finally:
            self._connection.close()

    def _write_batch(self) -> bool:
        """Wait for work, write all that is there in one transaction. False at the end."""
        wait = max(0.0, min(self._next_beat, self._next_sample) - time.monotonic())
        items: list[_Item] = []
        with contextlib.suppress(queue.Empty):
            items.append(self._queue.get(timeout=wait))
            while len(items) < _BATCH:
                items.append(self._queue.get_nowait())
        try:
            with self._transaction() as connection:
                for item in items:
                    self._write_item(connection, item)
                self._write_due(connection)
                self._write_counters(connection)
            self._unwritten.clear()  # only now: a commit that failed has written none
        except Exception as error:
            self._failed(error)
            time.sleep(0.05)  # a disk that is full now stays full for a while
        for item in items:
            if isinstance(item, threading.Event):
                item.set()
        return None not in items

    def _write_item(self, connection: sqlite3.Connection, item: _Item) -> None:
        if isinstance(item, Event):
            self._also(item)
            connection.execute(_INSERT_EVENT, _to_row(item, EVENT_FIELDS))
            self._add(count_event(item))
        elif isinstance(item, dict):
            self._add(item)
        elif isinstance(item, _Call):
            try:
                item.function()
            except Exception as error:  # what is to be written goes on
                self._on_error(item.part, error)
        elif item is not None and not isinstance(item, threading.Event):
            self._write_step(connection, item)
        self._since_trim += 1
        if self._since_trim >= _TRIM_EVERY:
            self._trim(connection)

    def _write_step(self, connection: sqlite3.Connection, landing: Landing) -> None:
        if not landing.landed():
            connection.execute("COMMIT")  # what is complete must not wait for what is not
            while not landing.landed():
                time.sleep(0.0005)  # polling, not waiting on the event: a hung GPU must not stop the heartbeat
                self._write_due(connection)
            connection.execute("BEGIN")
        try:
            record, events = landing.record(self._memory_bytes)
        except Exception as error:  # one bad step must not take those beside it along
            self._failed(error)
            return
        self._also(record)
        connection.execute(_INSERT_STEP, _to_row(record, STEP_FIELDS))
        connection.execute(_PUT_STATE, ("step_monotonic", time.monotonic()))
        self._add(count_step(record, self._rank))
        for event in events:
            self._write_item(connection, event)
        self._write_details(connection, landing)
        try:
            found = landing.findings()
        except Exception as error:
            self._failed(error)
            return
        for event in found:
            self._write_item(connection, event)

    def _write_details(self, connection: sqlite3.Connection, landing: Landing) -> None:
        """As many details are kept as fit into half of the file, each counted as the largest, in whole pages.

        They have no claim on the other half and steps have none on this one, once it is taken: whichever comes faster,
        neither drives the other out. Counting by ids needs no look at the table and no memory of what was committed.
        """
        try:
            details = landing.details()
            pages = max((self._pages_of(detail) for detail in details), default=0)
        except Exception as error:  # the step itself is written, and stays
            self._failed(error)
            return
        self._detail_pages = max(self._detail_pages, pages)
        for detail in details:
            number = 1 + connection.execute("SELECT coalesce(max(id), 0) FROM details").fetchone()[0]
            kept = self._max_pages // 2 // self._detail_pages
            connection.execute("DELETE FROM details WHERE id <= ?", (number - kept,))
            self._trim(connection, coming=self._detail_pages)
            connection.execute(_INSERT_DETAIL, (number, detail.step, detail.place, detail.values))
            self._uncommitted_pages += self._detail_pages
        if self._uncommitted_pages >= _COMMIT_PAGES:
            connection.execute("COMMIT")
            connection.execute("BEGIN")
            self._uncommitted_pages = 0

    def _pages_of(self, detail: Detail) -> int:
        pages = len(detail.values) // _PAGE_BYTES + 1
        if pages > self._max_pages // 2:
            raise ValueError(
                f"the statistics of all parameters ({len(detail.values)} bytes) would fill more than half of the "
                f"journal ({self._max_pages * _PAGE_BYTES} bytes): raise journal_mib, or set measure.detail_every to 0"
            )
        return pages

    def _take_copies(self) -> None:
        """Never waits for one: a hung device must not stop the heartbeat."""
        while self._copies and self._copies[0][1].landed():
            name, copy = self._copies.pop(0)
            value = float(copy.values())
            if math.isfinite(value):
                self.keep(**{name: value})
            else:
                self._add({("gradmon_nonfinite_losses_total", ()): 1})

    def _write_due(self, connection: sqlite3.Connection) -> None:
        """Heartbeat and resource sample, each when its time has come."""
        self._take_copies()
        now = time.monotonic()
        if now >= self._next_sample:
            self._next_sample = now + SAMPLE_SECONDS
            sample = self._sample()
            memory = sample.get("gpu_memory_allocated_bytes", sample.get("resident_memory_bytes"))
            self._memory_bytes = None if memory is None else int(memory)
            connection.executemany(_PUT_STATE, [(_SAMPLE_PREFIX + k, v) for k, v in sample.items()])
            connection.executemany(_PUT_STATE, list(self._kept.items()))
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_SECONDS
            connection.executemany(_PUT_STATE, [("beat_monotonic", now), ("beat_seconds", time.time())])

    def _failed(self, error: Exception) -> None:
        self._add({("gradmon_errors_total", ("journal",)): 1})
        self._on_error("journal", error)

    def _add(self, added: Mapping[CounterKey, float]) -> None:
        for key, amount in added.items():
            if amount or key not in self._counters:  # a first 0 is written: counters are born at 0
                self._counters[key] += amount
                self._unwritten.add(key)

    def _write_counters(self, connection: sqlite3.Connection) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._add({("gradmon_errors_total", ("journal_behind",)): dropped})
        rows = [(name, json.dumps(labels), self._counters[name, labels]) for name, labels in self._unwritten]
        connection.executemany(_PUT_COUNTER, rows)

    def _trim(self, connection: sqlite3.Connection, coming: int = 0) -> None:
        """Make room for `coming` pages by forgetting the oldest fifth of steps and events; SQLite reuses their pages.

        Four times at most: that makes room for any detail, and no run of large ones can empty the table.
        """
        self._since_trim = 0
        for _ in range(4):
            pages, free = (connection.execute(f"PRAGMA {n}").fetchone()[0] for n in ("page_count", "freelist_count"))
            if pages - free + coming <= 0.9 * self._max_pages:
                return
            for table in ("steps", "events"):
                connection.execute(
                    f"DELETE FROM {table} WHERE id <= (SELECT min(id) + (max(id) - min(id)) / 5 FROM {table})"  # noqa: S608
                )

    def _leave_wal(self) -> None:
        """Fails while a reader has the file open, which readers never have for long: so try for a while."""
        for _ in range(40):
            with contextlib.suppress(sqlite3.OperationalError):
                self._connection.execute("PRAGMA journal_mode = DELETE")
                return
            time.sleep(0.05)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _share(path: Path) -> None:
    """Below a folder that a group shares (setgid) its members may read, whatever our umask says: the site's agent."""
    with contextlib.suppress(OSError):  # folders of another user, who has made them as they should be
        for folder in reversed(path.parents[:3]):  # run, instance, attempt
            if not (mode := folder.parent.stat().st_mode) & stat.S_ISGID:
                return
            folder.chmod(mode & 0o2755)
        path.touch(0o600)  # what SQLite makes beside it takes its mode
        for file in (path, path.with_suffix(".lock")):
            file.chmod(mode & 0o644)


@dataclass(frozen=True, slots=True)
class JournalView:
    """What a reader saw in one consistent look at a journal."""

    identity: RankIdentity
    parameter_names: list[str]
    """Parameters watched, in the order of a detail's rows. Those added to an optimizer later are not among them."""
    elements: list[int]
    """How many elements each of them has; empty where the writer did not know."""
    config: Mapping[str, Any]
    """The writer's settings, as `Config.to_dict` gives them."""
    steps: list[tuple[int, StepRecord]]
    """(id, record) of what is new since the id asked for, oldest first."""
    events: list[tuple[int, Event]]
    details: list[tuple[int, Detail]]
    """Those of the global gradients; of many new ones the newest few."""
    counters: dict[CounterKey, float]
    samples: dict[str, float]
    state: RankState
    end_detail: str
    """For `exception`, its type and message."""
    paused_for: str
    """What the script does inside `monitor.paused()` now, empty outside of it."""
    beat_seconds: float
    """Unix time of the newest heartbeat."""
    beat_age_seconds: float
    """Time since then at the look, by the node's clock that nobody sets."""
    step_age_seconds: float
    """Time since the newest step, or since attach before the first; by the same clock."""

    @property
    def parameters(self) -> int:
        """Number of parameters watched."""
        return len(self.parameter_names)

    @property
    def detail(self) -> Detail | None:
        """The newest detail of the global gradients; None if there is no new one."""
        return self.details[-1][1] if self.details else None


class JournalVersionError(Exception):
    """The journal was written by a newer gradmon than this reader."""


def read_journal(
    path: Path, *, after_step: int = 0, after_event: int = 0, after_detail: int = 0, limit: int = 20_000
) -> JournalView:
    """Read what is new in a journal, without ever writing to it or keeping it open.

    Args:
        path: the `.db` file.
        after_step: id of the newest step seen so far; only later ones are returned.
        after_event: the same for events.
        after_detail: the same for details, which are large: one already seen is not read again.
        limit: beyond so many new steps only evenly spaced ones are returned, with the incidents and the newest few
            hundred: a reader that comes late sees the whole run. Never more than twice as many.

    Raises:
        sqlite3.Error: not a database, damaged, or locked.
        JournalVersionError: written by a newer gradmon.
        FileNotFoundError: it is gone.
        ValueError, KeyError: a database, but not a journal.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None, timeout=1.0)
    try:
        connection.execute("BEGIN")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT_VERSION:
            raise JournalVersionError(
                f"{path} has journal format {version}; this gradmon reads up to {FORMAT_VERSION}: upgrade the agent"
            )
        steps = _new_steps(connection, after_step, limit)
        events = _new_events(connection, after_event, limit)
        details = _new_details(connection, after_detail) if version >= 2 else []
        return _view(connection, path, steps, events, details)
    finally:
        connection.close()


def _view(
    connection: sqlite3.Connection,
    path: Path,
    steps: list[tuple[int, StepRecord]],
    events: list[tuple[int, Event]],
    details: list[tuple[int, Detail]],
) -> JournalView:
    meta = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM meta")}
    state = dict(connection.execute("SELECT key, value FROM state"))
    counters = connection.execute("SELECT name, labels, value FROM counters").fetchall()
    now = time.monotonic()
    return JournalView(
        identity=RankIdentity(**{name: meta[name] for name in _known(RankIdentity, meta)}),
        parameter_names=meta["parameters"],
        elements=meta.get("elements", []),
        config=meta.get("config", {}),
        steps=steps,
        events=events,
        details=details,
        counters={(name, tuple(json.loads(labels))): value for name, labels, value in counters},
        samples={k[len(_SAMPLE_PREFIX) :]: v for k, v in state.items() if k.startswith(_SAMPLE_PREFIX)},
        state=_rank_state(state, is_held(path.with_suffix(".lock")), now),
        end_detail=str(state.get("end_detail", "")),
        paused_for=str(state.get("paused_for", "")),
        beat_seconds=state["beat_seconds"],
        beat_age_seconds=now - state["beat_monotonic"],
        step_age_seconds=now - state.get("step_monotonic", state["start_monotonic"]),
    )


def _new_steps(connection: sqlite3.Connection, after: int, limit: int) -> list[tuple[int, StepRecord]]:
    oldest, newest = connection.execute("SELECT min(id), max(id) FROM steps").fetchone()
    new = 0 if newest is None else max(0, newest - max(oldest - 1, after))
    names = _columns(connection, "steps", StepRecord)
    rows = connection.execute(
        f"SELECT id, {', '.join(names)} FROM steps WHERE id > ?"  # noqa: S608
        " AND (id % ? = 0 OR id > ? OR reason NOT IN ('healthy', 'max_norm')) ORDER BY id DESC LIMIT ?",
        (after, -(-new // limit) or 1, (newest or 0) - _BATCH, 2 * limit),
    ).fetchall()
    return [(row[0], StepRecord(**_from_row(names, row[1:]))) for row in reversed(rows)]


def _new_events(connection: sqlite3.Connection, after: int, limit: int) -> list[tuple[int, Event]]:
    names = _columns(connection, "events", Event)
    rows = connection.execute(
        f"SELECT id, {', '.join(names)} FROM events WHERE id > ? ORDER BY id DESC LIMIT ?",  # noqa: S608
        (after, limit),
    ).fetchall()
    return [(row[0], Event(**_from_row(names, row[1:]))) for row in reversed(rows)]


def _new_details(connection: sqlite3.Connection, after: int) -> list[tuple[int, Detail]]:
    rows = connection.execute(
        "SELECT id, step, place, stats FROM details WHERE id > ? AND place = 'global' ORDER BY id DESC LIMIT ?",
        (after, _DETAILS_AT_ONCE),
    ).fetchall()
    return [(row[0], Detail(*row[1:])) for row in reversed(rows)]


def _columns(connection: sqlite3.Connection, table: str, kind: type[StepRecord] | type[Event]) -> list[str]:
    return _known(kind, {row[1] for row in connection.execute(f"PRAGMA table_info({table})")})


def _known(kind: type[StepRecord] | type[Event] | type[RankIdentity], present: Container[str]) -> list[str]:
    """Fields of `kind` to read: one that an older writer did not know yet takes its default."""
    return [f.name for f in dataclasses.fields(kind) if f.name in present or f.default is dataclasses.MISSING]


def _rank_state(state: Mapping[str, Any], held: bool, now: float) -> RankState:
    end = state.get("end")
    if end is not None:
        return "finished" if end == "finished" else "exception"
    if not held:
        return "crashed"
    if not 0 <= now - state["beat_monotonic"] <= STUCK_SECONDS:
        return "stuck"
    # A rank that has a heartbeat and makes no step: evaluation, checkpoint, compilation, or a hang in a collective.
    idle_since = state.get("step_monotonic", state["start_monotonic"])
    return "running" if now - idle_since <= BUSY_SECONDS else "busy"


def _to_row(item: StepRecord | Event, fields: tuple[str, ...]) -> list[object]:
    # SQLite has no NaN: it would become NULL, and a norm that is NaN must not read as "not measured".
    values = (getattr(item, f) for f in fields)
    return ["nan" if isinstance(v, float) and v != v else v for v in values]


_TRUTHS = frozenset({"applied", "left_out"})


def _from_row(names: list[str], cells: tuple[Any, ...]) -> dict[str, Any]:
    row = {name: math.nan if cell == "nan" else cell for name, cell in zip(names, cells, strict=True)}
    for name in _TRUTHS & row.keys():  # SQLite has no truth values either
        row[name] = bool(row[name])
    return row
