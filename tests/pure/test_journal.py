from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradmon.journal import JournalVersionError, JournalWriter, is_held, journal_path, read_journal
from gradmon.record import Event, RankIdentity, StepRecord


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

    def __init__(self, made: StepRecord, ready: Callable[[], bool] = lambda: True) -> None:
        self._made, self._ready = made, ready

    def landed(self) -> bool:
        return self._ready()

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        return self._made, []


def writer(directory: Path, rank: int = 0, **options: Any) -> JournalWriter:
    return JournalWriter(
        journal_path(directory, identity(rank)),
        identity(rank),
        parameters=["w"],
        config={},
        sample=lambda: {"resident_memory_bytes": 5.0},
        **options,
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
    assert (view.state, view.detail) == ("exception", "ValueError: x")
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
