from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from gradmon.journal import JournalVersionError, JournalWriter, journal_path, read_journal
from gradmon.locks import is_held
from gradmon.record import DETAIL_COLUMNS, Detail, Event, RankIdentity, StepRecord


def identity(rank: int = 0) -> RankIdentity:
    return RankIdentity(
        "run", "one", 0, rank, rank, 2, "host", os.getpid(), "cpu", "guard", "ddp", "train.py", "0", 1.0
    )


def record(step: int, **changes: Any) -> StepRecord:
    values = {
        "step": step, "wall_seconds": 1.5, "step_seconds": None, "grad_norm": 2.0, "grad_norm_applied": 1.0,
        "grad_norm_limit": None, "local_grad_norm": None, "nan_count": 0, "inf_count": 0, "local_nan_count": 0,
        "local_inf_count": 0, "action": "none", "reason": "healthy", "applied": True, "culprit_rank": None,
        "parameter": None, "learning_rate": 1e-3, "learning_rate_scale": 1.0,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


class Landed:
    """A step that is on the host already, or comes when `ready` says so."""

    def __init__(self, made: StepRecord, *details: Detail, ready: Callable[[], bool] = lambda: True) -> None:
        self._made, self._details, self._ready = made, details, ready

    def landed(self) -> bool:
        return self._ready()

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        return self._made, []

    def details(self) -> list[Detail]:
        return list(self._details)

    def findings(self) -> list[Event]:
        return []


def detail(step: int, parameters: int = 1, place: Literal["global", "local"] = "global") -> Detail:
    """Whose first row can be told from any other step's."""
    row = [float(step), 0.0, 0.0, math.nan, 1.0, -1.0, 1.0, math.inf]
    return Detail(step, place, array("d", row * parameters).tobytes())


def writer(directory: Path, rank: int = 0, **options: Any) -> JournalWriter:
    return JournalWriter(
        journal_path(directory, identity(rank)),
        identity(rank),
        sample=lambda: {"resident_memory_bytes": 5.0},
        **{"parameters": ["w"], "config": {}, **options},
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    odd = record(1, grad_norm=math.nan, grad_norm_applied=math.inf, loss=-math.inf, parameter="ü")
    event = Event(1, 1.0, "nonfinite", "skip", False, None, None, "x")
    journal.put(Landed(odd))
    journal.put(event)
    journal.put(Landed(record(2)))
    assert journal.flush()
    view = read_journal(journal.path)
    first, second = (made for _, made in view.steps)
    assert math.isnan(first.grad_norm), "SQLite would make NaN NULL, which means not measured"
    assert (first.grad_norm_applied, first.loss, first.parameter) == (math.inf, -math.inf, "ü")
    assert first.applied is True
    assert second == record(2)
    assert [e for _, e in view.events] == [event]
    assert (view.state, view.identity, view.parameters) == ("running", identity(), 1)
    assert view.samples == {"resident_memory_bytes": 5.0}
    assert [m.step for _, m in read_journal(journal.path, after_step=view.steps[0][0]).steps] == [2]
    journal.close("finished")
    assert read_journal(journal.path).state == "finished"


def test_a_finished_journal_needs_no_file_beside_it(tmp_path: Path) -> None:
    """A WAL file left behind would keep another user's read-only agent out."""
    journal = writer(tmp_path)
    journal.close("exception", "ValueError: x")
    assert sorted(p.name for p in journal.path.parent.iterdir()) == ["rank-00000.db", "rank-00000.lock"]
    with sqlite3.connect(f"file:{journal.path}?mode=ro&immutable=1", uri=True) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    view = read_journal(journal.path)
    assert (view.state, view.end_detail) == ("exception", "ValueError: x")
    journal.close("finished")
    assert read_journal(journal.path).state == "exception", "the first word is the last"


def test_a_step_that_has_not_landed_holds_nothing_else_back(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    late: list[bool] = []
    journal.put(Landed(record(1)))
    journal.put(Landed(record(2), ready=lambda: bool(late)))
    deadline = time.monotonic() + 10
    while len(read_journal(journal.path).steps) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [m.step for _, m in read_journal(journal.path).steps] == [1]
    late.append(True)
    assert journal.flush()
    assert [m.step for _, m in read_journal(journal.path).steps] == [1, 2]
    journal.close("finished")


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from test_journal import Landed, record, writer
journal = writer(Path({directory!r}))
for step in range(1, 100_000):
    journal.put(Landed(record(step)))
    time.sleep(0.005)  # the rest of the step: torch's operations give the interpreter lock away
    print(step, flush=True)
"""


def test_sigkill_loses_at_most_the_last_completed_step(tmp_path: Path) -> None:
    script = KILLED.format(here=str(Path(__file__).parent), directory=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 100:
                process.send_signal(signal.SIGKILL)
                break
        completed = max([100, *map(int, process.stdout.read().split())])
    view = read_journal(journal_path(tmp_path, identity()))
    assert view.state == "crashed"
    assert [m.step for _, m in view.steps][-1] >= completed - 1
    assert [m.step for _, m in view.steps] == list(range(1, len(view.steps) + 1))


def test_the_file_is_bounded(tmp_path: Path) -> None:
    journal = writer(tmp_path, max_bytes=1 << 20)
    for step in range(1, 15_001):
        journal.put(Landed(record(step, parameter="p" * 100)))
        if step % 500 == 0:
            assert journal.flush()
    view = read_journal(journal.path)
    assert view.steps[-1][1].step == 15_000
    assert view.steps[0][1].step > 1, "the oldest are forgotten"
    assert len(view.steps) > 1000
    assert view.counters["gradmon_steps_total", ()] == 15_000, "but still counted"
    journal.close("finished")
    assert journal.path.stat().st_size < 1.5 * (1 << 20)


def pages(journal: JournalWriter) -> int:
    return int(journal._connection.execute("PRAGMA page_count").fetchone()[0])


def kept(journal: JournalWriter, table: str) -> tuple[int, int, int]:
    """Number, first and last step of what a table holds."""
    query = f"SELECT count(*), min(step), max(step) FROM {table}"
    with sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True) as connection:
        count, first, last = connection.execute(query).fetchone()
    connection.close()
    return count, first, last


def test_details_are_read_as_they_were_written(tmp_path: Path) -> None:
    names = ["a.weight", "a.bias"]
    journal = writer(tmp_path, parameters=names, elements=[6, 2], config={"metrics": {"level": "params"}})
    assert read_journal(journal.path).detail is None
    journal.put(Landed(record(1), detail(1, 2), detail(1, 2, "local")))
    journal.put(Landed(record(2)))
    journal.put(Landed(record(3), detail(3, 2)))
    journal.put(Landed(record(4), detail(4, 2, "local")))
    assert journal.flush()
    view = read_journal(journal.path)
    assert [made for _, made in view.details] == [detail(1, 2), detail(3, 2)], "the global ones, with their NaN and Inf"
    assert view.detail == detail(3, 2)
    assert (view.parameter_names, view.elements, view.parameters) == (names, [6, 2], 2)
    assert view.config == {"metrics": {"level": "params"}}
    seen = view.details[-1][0]
    again = read_journal(journal.path, after_detail=seen)
    assert (again.detail, again.details) == (None, []), "one that was seen is not read again"
    journal.put(Landed(record(5), detail(5, 2)))
    assert journal.flush()
    assert read_journal(journal.path, after_detail=seen).detail == detail(5, 2)
    assert kept(journal, "details") == (5, 1, 5), "the local ones are there for a post-mortem"
    journal.close("finished")


def test_of_many_new_details_the_newest_are_read(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    for step in range(1, 101):
        journal.put(Landed(record(step), detail(step)))
    assert journal.flush()
    steps = [made.step for _, made in read_journal(journal.path).details]
    assert 1 < len(steps) < 50
    assert steps == list(range(101 - len(steps), 101))
    journal.close("finished")


def test_failing_details_cost_the_details_only(tmp_path: Path) -> None:
    class Failing(Landed):
        def details(self) -> list[Detail]:
            raise RuntimeError("no statistics")

    errors: list[tuple[str, str]] = []
    journal = writer(tmp_path, on_error=lambda part, error: errors.append((part, str(error))))
    journal.put(Landed(record(1), detail(1)))
    journal.put(Failing(record(2)))
    journal.put(Landed(record(3), detail(3)))
    assert journal.flush()
    view = read_journal(journal.path)
    assert [made.step for _, made in view.steps] == [1, 2, 3]
    assert [made.step for _, made in view.details] == [1, 3]
    assert errors == [("journal", "no statistics")]
    assert view.counters["gradmon_errors_total", ("journal",)] == 1
    assert view.counters["gradmon_steps_total", ()] == 3
    journal.close("finished")


def test_details_pour_in_and_the_file_stays_below_its_limit(tmp_path: Path) -> None:
    """2,000 parameters every 10 steps: 15 times what the file may hold, and no step has to go for them."""
    limit = 4 << 20
    journal = writer(tmp_path, max_bytes=limit)
    assert len(detail(1, 2000).values) == 2000 * 8 * len(DETAIL_COLUMNS)
    for step in range(1, 5001):
        journal.put(Landed(record(step), *([detail(step, 2000)] if step % 10 == 0 else [])))
        if step % 50 == 0:
            assert journal.flush()
            assert pages(journal) * 4096 <= limit
    assert kept(journal, "steps") == (5000, 1, 5000)
    count, first, last = kept(journal, "details")
    assert 12 <= count <= 16
    assert (first, last) == (5000 - 10 * (count - 1), 5000), "the oldest are forgotten"
    journal.close("finished")
    assert journal.path.stat().st_size <= limit


@pytest.mark.parametrize("parameters", [1, 40, 65, 2000, 16_000])
def test_details_that_come_with_every_step_take_half_of_the_file_at_most(tmp_path: Path, parameters: int) -> None:
    limit = 2 << 20
    journal = writer(tmp_path, max_bytes=limit)
    for step in range(1, 10_001):
        journal.put(Landed(record(step, parameter="p" * 100)))
        if step % 2000 == 0:
            assert journal.flush()
    before, first, _ = kept(journal, "steps")
    assert first > 1, "the file is full of steps"
    end = 10_000 + min(1000, 400_000 // parameters)
    for step in range(10_001, end + 1):
        journal.put(Landed(record(step), detail(step, parameters), detail(step, parameters, "local")))
        if step % 5 == 0:
            assert journal.flush()
            assert pages(journal) * 4096 <= limit
    count, _, last = kept(journal, "details")
    assert last == end
    assert 0 < count * len(detail(1, parameters).values) <= limit / 2
    assert kept(journal, "steps")[0] > before / 4, "steps survive in the other half"
    journal.close("finished")


def test_a_burst_of_details_does_not_swell_the_log(tmp_path: Path) -> None:
    """A writer that was behind gets hundreds of them at once: in one transaction the log would hold them all."""
    journal = writer(tmp_path)
    blocked = [True]
    journal.put(Landed(record(1), ready=lambda: not blocked))
    for step in range(2, 300):
        journal.put(Landed(record(step), detail(step, 2000)))
    blocked.clear()
    assert journal.flush(30)
    assert kept(journal, "details")[0] >= 200
    log = journal.path.with_name(journal.path.name + "-wal")
    assert 0 < log.stat().st_size < 12 << 20
    journal.close("finished")


def test_details_too_large_for_the_file_are_an_error_with_a_cure(tmp_path: Path) -> None:
    errors: list[str] = []
    journal = writer(tmp_path, max_bytes=1 << 20, on_error=lambda _part, error: errors.append(str(error)))
    journal.put(Landed(record(1), detail(1, 9000)))
    journal.put(Landed(record(2), detail(2, 8000)))
    assert journal.flush()
    assert len(errors) == 1
    assert "(576000 bytes) would fill more than half of the journal (1048576 bytes): raise journal_mib" in errors[0]
    view = read_journal(journal.path)
    assert [made.step for _, made in view.steps] == [1, 2]
    assert [made.step for _, made in view.details] == [2]
    journal.put(Landed(record(3), detail(3, 8000)))
    assert journal.flush()
    seen = view.details[-1][0]
    assert [made.step for _, made in read_journal(journal.path, after_detail=seen).details] == [3], "no id comes twice"
    journal.close("finished")


#: The format of gradmon 0.1.0's first journals, written by hand.
VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE steps (id INTEGER PRIMARY KEY, step, wall_seconds, step_seconds, grad_norm, grad_norm_applied,
    grad_norm_limit, local_grad_norm, nan_count, inf_count, local_nan_count, local_inf_count, action, reason, applied,
    culprit_rank, parameter, learning_rate, learning_rate_scale, loss, memory_bytes);
CREATE TABLE events (id INTEGER PRIMARY KEY, step, wall_seconds, kind, action, applied, rank, parameter, message);
CREATE TABLE counters (name TEXT, labels TEXT, value REAL NOT NULL, PRIMARY KEY (name, labels)) WITHOUT ROWID;
CREATE TABLE state (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
INSERT INTO steps VALUES (7, 3, 1.5, 0.25, 'nan', 0.0, 4.0, 'nan', 5, 0, 5, 0, 'skip', 'nonfinite', 1,
    0, 'w', 0.001, 1.0, 2.5, 1024);
INSERT INTO steps VALUES (8, 4, 1.75, 0.25, 2.0, 2.0, NULL, NULL, 0, 0, 0, 0, 'none', 'healthy', 0,
    NULL, NULL, 0.001, 1.0, NULL, NULL);
INSERT INTO events VALUES (1, 3, 1.5, 'nonfinite', 'skip', 1, 0, 'w', 'skipped');
INSERT INTO counters VALUES ('gradmon_steps_total', '[]', 4.0);
INSERT INTO state VALUES ('start_monotonic', 1.0), ('beat_monotonic', 1.0), ('beat_seconds', 9.0), ('end', 'finished'),
    ('sample:cpu_seconds', 3.0);
"""
VERSION_1_META = {
    "run": "old", "instance": "one", "attempt": 0, "rank": 0, "local_rank": 0, "world_size": 1, "host": "h", "pid": 1,
    "device": "cpu", "mode": "guard", "topology": "single", "script": "train.py", "version": "0.1.0",
    "started_seconds": 1.0, "parameters": ["w", "b"], "config": {"mode": "guard"},
}  # fmt: skip


def test_a_journal_of_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in VERSION_1_META.items()]
        )
    connection.close()
    view = read_journal(path)
    (first_id, first), (second_id, second) = view.steps
    assert (first_id, second_id) == (7, 8)
    assert math.isnan(first.grad_norm)
    assert (first.step, first.action, first.applied, first.loss, first.memory_bytes) == (3, "skip", True, 2.5, 1024)
    assert second == StepRecord(
        step=4, wall_seconds=1.75, step_seconds=0.25, grad_norm=2.0, grad_norm_applied=2.0, grad_norm_limit=None,
        local_grad_norm=None, nan_count=0, inf_count=0, local_nan_count=0, local_inf_count=0, action="none",
        reason="healthy", applied=False, culprit_rank=None, parameter=None, learning_rate=0.001,
        learning_rate_scale=1.0,
    )  # fmt: skip
    assert (second.grad_abs_max, second.micro_step, second.update_ratio) == (None, None, None)
    assert view.events == [(1, Event(3, 1.5, "nonfinite", "skip", True, 0, "w", "skipped"))]
    assert (view.details, view.detail, view.elements, view.parameter_names) == ([], None, [], ["w", "b"])
    assert (view.identity.run, view.state, view.config) == ("old", "finished", {"mode": "guard"})
    assert (view.counters, view.samples) == ({("gradmon_steps_total", ()): 4.0}, {"cpu_seconds": 3.0})
    assert [made.step for _, made in read_journal(path, after_step=7, after_event=1).steps] == [4]


def test_a_full_disk_is_counted_and_survived(tmp_path: Path) -> None:
    errors: list[tuple[str, Exception]] = []
    journal = writer(tmp_path, on_error=lambda part, error: errors.append((part, error)))
    journal.put(Landed(record(1)))
    assert journal.flush()
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk: SQLITE_FULL
    for step in range(2, 200):
        journal.put(Landed(record(step, parameter="p" * 500)))
    assert journal.flush()
    assert errors
    assert errors[0][0] == "journal"
    assert "full" in str(errors[0][1])
    journal._connection.execute("PRAGMA max_page_count = 100000")
    journal.put(Landed(record(200)))
    assert journal.flush()
    view = read_journal(journal.path)
    assert view.steps[-1][1].step == 200, "it goes on once there is room"
    assert view.counters["gradmon_errors_total", ("journal",)] >= 1
    journal.close("finished")


def test_a_reader_never_stands_in_the_way_of_the_end(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    reader = sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM steps").fetchone()
    started = time.monotonic()
    journal.close("finished")
    assert time.monotonic() - started < 15
    reader.close()
    assert read_journal(journal.path).state == "finished"


def test_the_lock_is_not_inherited_by_forked_children(tmp_path: Path) -> None:
    """A DataLoader worker that outlives its killed rank would make the rank look alive."""
    journal = writer(tmp_path)
    lock = journal.path.with_suffix(".lock")
    assert is_held(lock)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        journal.close("finished")
        deadline = time.monotonic() + 10  # the child has to be given a processor first
        while is_held(lock) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_held(lock)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_rank_can_be_there_only_once(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    with pytest.raises(BlockingIOError):
        writer(tmp_path)
    assert read_journal(journal.path).state == "running"
    journal.close("finished")


def test_damaged_foreign_and_newer_files(tmp_path: Path) -> None:
    damaged = tmp_path / "rank-00000.db"
    damaged.write_bytes(b"not a database at all" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        read_journal(damaged)
    with pytest.raises(FileNotFoundError):
        read_journal(tmp_path / "none.db")
    newer = tmp_path / "rank-00001.db"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalVersionError, match=r"format 99.*upgrade the agent"):
        read_journal(newer)


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmon.journal.QUEUE_LIMIT", 10)
    journal = writer(tmp_path)
    blocked = [True]
    journal.put(Landed(record(1), ready=lambda: not blocked))
    for step in range(2, 100):
        journal.put(Landed(record(step)))
    blocked.clear()
    assert journal.flush()
    counters = read_journal(journal.path).counters
    assert counters["gradmon_errors_total", ("journal_behind",)] >= 80
    assert counters["gradmon_steps_total", ()] + counters["gradmon_errors_total", ("journal_behind",)] == 99
    journal.close("finished")
