"""Journals are copied to where they outlive the node's directory, and read from there."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest
from fake_journals import AgentProcess, FakeRank, identity, killed_rank, nonfinite, rank_process, record, until

from gradmon.agent import archive as module
from gradmon.agent.archive import Archive
from gradmon.agent.prune import prune
from gradmon.agent.store import Store
from gradmon.journal import JournalView, read_journal


class Archived:
    """An archive of `tmp_path/runs` in `tmp_path/kept`, looked at without its thread."""

    def __init__(self, tmp_path: Path) -> None:
        self.runs, self.kept = tmp_path / "runs", tmp_path / "kept"
        self.store = Store(self.runs)
        self.archive = Archive(str(self.kept), self.store)

    def round(self, *, urge: bool = False) -> list[str]:
        """What one round of the thread copies."""
        before = self.files()
        self.store.refresh()
        if urge:
            self.archive._urged.set()
        self.archive._round()
        return sorted(name for name, seen in self.files().items() if before.get(name) != seen)

    def files(self) -> dict[str, tuple[int, int]]:
        found = {p: p.stat() for p in self.kept.rglob("*") if p.is_file()}
        return {str(p.relative_to(self.kept)): (s.st_ino, s.st_mtime_ns) for p, s in found.items()}

    def read(self, name: str = "demo/i1/0/rank-00000.db") -> JournalView:
        return read_journal(self.kept / name)

    @property
    def errors(self) -> int:
        return self.store.errors["archive"]


@pytest.fixture
def archived(tmp_path):
    (tmp_path / "runs").mkdir()
    return Archived(tmp_path)


def test_an_ended_run_is_copied_once_and_is_a_plain_file(archived):
    rank = FakeRank(archived.runs, identity()).step(record(1), nonfinite(2))
    rank.end("exception", "ValueError: x")
    assert archived.round() == ["demo/i1/0/rank-00000.db"]
    view = archived.read()
    assert (view.state, view.end_detail) == ("exception", "ValueError: x")
    assert [step.step for _, step in view.steps] == [1, 2]
    assert view.counters == read_journal(rank.path).counters
    assert archived.round() == []
    assert archived.round(urge=True) == [], "nothing has changed"
    assert list(archived.runs.glob(".archive*")) == []
    header = (archived.kept / "demo/i1/0/rank-00000.db").read_bytes()[18:20]
    assert header == b"\x01\x01", "out of WAL mode: a reader writes nothing beside it"


def test_a_living_run_is_copied_after_incidents_once_a_minute(archived, monkeypatch):
    rank = FakeRank(archived.runs, identity()).step(record(1))
    assert archived.round() == []
    rank.step(nonfinite(2))
    assert archived.round() == ["demo/i1/0/rank-00000.db"]
    assert archived.read().state == "crashed", "not running: nobody writes it there"
    rank.step(nonfinite(3))
    assert archived.round() == []
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    assert archived.round() == ["demo/i1/0/rank-00000.db"]
    assert [step.step for _, step in archived.read().steps] == [1, 2, 3]
    rank.step(record(4))
    assert archived.round() == [], "no incident"
    rank.end()
    assert archived.round() == ["demo/i1/0/rank-00000.db"]
    assert archived.read().state == "finished"


def test_the_end_does_not_wait_for_the_minute(archived):
    rank = FakeRank(archived.runs, identity()).step(nonfinite(1))
    assert len(archived.round()) == 1
    rank.end()
    assert len(archived.round()) == 1
    assert archived.read().state == "finished"


def test_told_to_it_copies_the_living_too(archived):
    rank = FakeRank(archived.runs, identity()).step(record(1))
    assert archived.round() == []
    assert archived.round(urge=True) == ["demo/i1/0/rank-00000.db"]
    rank.end()


def test_a_killed_rank_is_copied_with_its_last_step(archived):
    """Its newest steps lie in the write-ahead log only."""
    killed_rank(archived.runs, steps=7)
    assert (archived.runs / "demo/i1/0/rank-00000.db-wal").stat().st_size > 0
    assert archived.round() == ["demo/i1/0/rank-00000.db"]
    assert archived.read().state == "crashed"
    assert archived.read().steps[-1][1].step == 7
    assert archived.round() == []


def test_what_lies_beside_comes_along_but_no_locks(archived):
    rank = FakeRank(archived.runs, identity()).step(nonfinite(1))
    folder = rank.path.parent
    (folder / "step-1.bundle").write_bytes(b"x" * 100)
    (folder / "step-1.bundle").chmod(0o600)
    (folder / "health.json").write_text("{}")
    (folder / ".half-written").write_text("")
    assert archived.round() == [f"demo/i1/0/{name}" for name in ("health.json", "rank-00000.db", "step-1.bundle")]
    assert stat.S_IMODE((archived.kept / "demo/i1/0/step-1.bundle").stat().st_mode) == 0o600
    rank.end()


def test_the_next_agent_copies_what_is_missing_only(archived, tmp_path):
    for name in ("a", "b"):
        FakeRank(archived.runs, identity(instance=name)).step(record(1)).end()
    assert len(archived.round()) == 2
    (archived.kept / "demo/b/0/rank-00000.db").unlink()
    assert Archived(tmp_path).round() == ["demo/b/0/rank-00000.db"]


def test_the_next_agent_copies_what_went_on(archived, tmp_path):
    with rank_process(archived.runs, steps=1, broken=(1,)) as process:
        assert len(archived.round()) == 1  # while it lived
        time.sleep(0.02)
        process.kill()
        process.wait()
    os.utime(archived.runs / "demo/i1/0/rank-00000.db-wal")
    assert len(Archived(tmp_path).round()) == 1


def test_a_failure_is_counted_and_tried_again_later(archived, monkeypatch, caplog):
    FakeRank(archived.runs, identity()).step(record(1)).end()
    honest = shutil.copyfileobj

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert archived.round() == []
    assert archived.errors == 1
    assert "can't copy" in caplog.text
    assert "No space left on device" in caplog.text
    monkeypatch.setattr(shutil, "copyfileobj", honest)
    assert archived.round() == [], "not at once"
    assert archived.errors == 1
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    assert archived.round() == ["demo/i1/0/rank-00000.db"]
    assert archived.errors == 1


def test_a_damaged_journal_does_not_keep_others_from_being_copied(archived):
    damaged = FakeRank(archived.runs, identity(run="a")).step(record(1))
    damaged.end()
    damaged.path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    FakeRank(archived.runs, identity(run="b")).step(record(1)).end()
    assert archived.round() == ["b/i1/0/rank-00000.db"]
    assert archived.errors == 1


def test_a_hanging_archive_ends_with_the_agent_all_the_same(archived, monkeypatch, caplog):
    FakeRank(archived.runs, identity()).step(record(1)).end()
    archived.store.refresh()
    release = threading.Event()
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: release.wait(30))
    archived.archive.start()
    began = time.monotonic()
    archived.archive.finish(timeout=0.3)
    assert time.monotonic() - began < 5
    assert archived.errors == 1
    assert "does not take the last copies" in caplog.text
    release.set()
    archived.archive._thread.join(10)


def test_copies_are_not_pruned(archived, monkeypatch):
    """An agent that shows an archive has no business deleting it."""
    rank = FakeRank(archived.runs, identity()).step(record(1))
    rank.end()
    archived.round()
    then = time.time() - 100 * 86400
    for file in [*archived.kept.rglob("*.db"), *archived.runs.rglob("rank*")]:
        os.utime(file, (then, then))
    assert prune(archived.kept, keep_bytes=0) == []
    assert prune(archived.runs, keep_bytes=0) == [archived.runs / "demo" / "i1"]


def test_the_agent_copies_at_its_end_and_another_shows_the_copies(tmp_path):
    kept = tmp_path / "kept"
    rank = FakeRank(tmp_path / "runs", identity()).step(record(1))
    with AgentProcess(tmp_path / "runs", archive=str(kept)) as agent:
        until(lambda: agent.json("/api/runs")["runs"])
        rank.step(nonfinite(2))
        copy = kept / "demo/i1/0/rank-00000.db"
        until(copy.exists)
        rank.step(record(3))
        assert agent.end(signal.SIGTERM)[0] == 0
    assert [step.step for _, step in read_journal(copy).steps] == [1, 2, 3]
    rank.end()
    with AgentProcess(kept) as agent:
        run = until(lambda: agent.json("/api/runs")["runs"])[0]
        assert (run["run"], run["state"], run["living"], run["step"]) == ("demo", "crashed", False, 3)


def test_the_archive_of_many_users_is_one(archived, monkeypatch):
    rank = FakeRank(archived.runs / "alice", identity()).step(record(1))
    rank.end()
    monkeypatch.setattr("gradmon.agent.places._owner", lambda folder: 1 if folder.name == "alice" else 2)
    assert archived.round() == ["demo/i1/0/rank-00000.db"]


def test_sqlite_opens_a_copy_in_a_directory_nobody_can_write(archived, tmp_path):
    FakeRank(archived.runs, identity()).step(record(1)).end()
    archived.round()
    copy = archived.kept / "demo/i1/0/rank-00000.db"
    connection = sqlite3.connect(f"file:{copy}?mode=ro&immutable=1", uri=True)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
