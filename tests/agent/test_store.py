"""Which journals are exported, under which names, with which counters and how much history."""

from __future__ import annotations

import dataclasses
import itertools
import sqlite3
import time

import pytest
from fake_journals import FakeRank, event, identity, killed_rank, nonfinite, rank_process, record

from gradmon.agent import store as store_module
from gradmon.agent.api import describe, list_runs, run_since
from gradmon.agent.store import HISTORY_LIMIT, History, Store
from gradmon.journal import read_journal


def seen(directory) -> Store:
    store = Store(directory)
    store.refresh()
    return store


def steps_total(run, rank: int) -> float:
    return run.ranks()[rank].counters()["gradmon_steps_total", ()]


@pytest.fixture
def rank(tmp_path):
    """Makes living ranks, and ends those a test leaves."""
    made = []

    def make(**who):
        made.append(FakeRank(tmp_path, identity(**who)))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_an_empty_or_missing_directory_has_no_runs(tmp_path):
    assert seen(tmp_path).runs == []
    assert seen(tmp_path / "nowhere").runs == []


def test_a_living_rank_is_shown_with_its_last_finite_values(tmp_path, rank):
    rank().step(record(1, grad_norm=2.5), nonfinite(2))
    run = seen(tmp_path).find("demo")
    one = run.ranks()[0]
    assert one.view.state == "running"
    assert one.step == 2
    assert one.gauges["grad_norm"] == 2.5
    assert one.gauges["grad_norm_applied"] == 0
    assert one.incident.parameter == "blocks.3.mlp.weight"
    assert one.counters()["gradmon_nonfinite_steps_total", ()] == 1


def test_only_new_steps_are_read_again(tmp_path, rank, monkeypatch):
    one = rank().step(*[record(i) for i in range(1, 6)])
    store = seen(tmp_path)
    read = []

    def watched(path, **cursor):
        read.append(cursor)
        return read_journal(path, **cursor)

    monkeypatch.setattr(store_module, "read_journal", watched)
    one.step(record(6))
    store.refresh()
    assert read == [{"after_step": 5, "after_event": 0, "after_detail": 0}]
    assert store.find("demo").ranks()[0].history.recent("step", 9) == [1, 2, 3, 4, 5, 6]


def test_an_ended_journal_is_not_read_again(tmp_path, rank, monkeypatch):
    one = rank().step(record(1))
    one.end()
    store = seen(tmp_path)

    def fail(*_args, **_cursor):
        raise AssertionError("read again")

    monkeypatch.setattr(store_module, "read_journal", fail)
    store.refresh()
    assert store.errors["journal"] == 0
    assert store.find("demo").ranks()[0].view.state == "finished"


def test_counters_go_on_over_the_attempts_of_an_instance(tmp_path, rank):
    first = rank(attempt=0, world_size=1).step(*[record(i) for i in range(1, 11)])
    store = seen(tmp_path)
    assert steps_total(store.find("demo"), 0) == 10
    first.step(record(11))  # its last words, not yet read when the next attempt starts
    first.end("exception", "RuntimeError: lost")
    rank(attempt=1).step(record(6), nonfinite(7))
    store.refresh()
    run = store.find("demo")
    assert steps_total(run, 0) == 13
    assert run.ranks()[0].counters()["gradmon_nonfinite_steps_total", ()] == 1
    assert steps_total(seen(tmp_path).find("demo"), 0) == 13  # an agent that comes later says the same


def test_a_restart_from_a_checkpoint_replaces_the_steps_it_repeats(tmp_path, rank):
    rank(attempt=0).step(*[record(i, grad_norm=1.0) for i in range(1, 11)])
    rank(attempt=1).step(record(6, grad_norm=9.0), record(7, grad_norm=9.0))
    history = seen(tmp_path).find("demo").ranks()[0].history
    assert history.recent("step", 99) == [1, 2, 3, 4, 5, 6, 7]
    assert history.recent("grad_norm", 3) == [1, 9, 9]


def test_counters_do_not_go_on_over_instances(tmp_path, rank):
    rank(instance="monday").step(*[record(i) for i in range(1, 11)]).end()
    rank(instance="tuesday", started_seconds=time.time() + 60).step(record(1))
    store = seen(tmp_path)
    assert [run.name for run in store.runs] == ["demo"]
    assert store.find("demo").instance.name == "tuesday"
    assert steps_total(store.find("demo"), 0) == 1


def test_a_replaced_rank_is_never_shown(tmp_path, rank):
    killed_rank(tmp_path, rank=0, world_size=2)
    killed_rank(tmp_path, rank=1, world_size=2)
    before = seen(tmp_path).find("demo")
    assert {number: one.view.state for number, one in before.ranks().items()} == {0: "crashed", 1: "crashed"}
    rank(attempt=1, rank=0, world_size=2).step(record(1))  # rank 1 has not attached yet
    run = seen(tmp_path).find("demo")
    assert {number: one.view.state for number, one in run.ranks().items()} == {0: "running"}
    assert describe(run, time.time())[0] == "running"


def test_ranks_a_smaller_world_has_no_place_for_vanish(tmp_path, rank):
    now = time.time()
    for number in range(4):
        rank(rank=number, world_size=4, started_seconds=now).step(record(1))
    store = seen(tmp_path)
    assert list(store.find("demo").ranks()) == [0, 1, 2, 3]
    for number in range(2):
        rank(rank=number, world_size=2, attempt=1, started_seconds=now + 5).step(record(2))
    store.refresh()
    assert list(store.find("demo").ranks()) == [0, 1]
    assert steps_total(store.find("demo"), 1) == 2


def test_two_living_instances_of_one_name_are_both_exported(tmp_path, rank):
    now = time.time()
    rank(instance="zzz", started_seconds=now).step(record(1))
    rank(instance="aaa", started_seconds=now + 5).step(record(2))
    store = seen(tmp_path)
    assert [(run.name, run.instance.name) for run in store.runs] == [("demo", "zzz"), ("demo~2", "aaa")]


def test_a_name_made_unique_does_not_meet_one_that_is_there(tmp_path, rank):
    now = time.time()
    rank(instance="a", started_seconds=now).step(record(1))
    rank(instance="b", started_seconds=now + 5).step(record(1))
    rank(run="demo~2", instance="c", started_seconds=now + 9).step(record(1))
    store = seen(tmp_path)
    assert {run.name: run.instance.name for run in store.runs} == {"demo": "a", "demo~2": "c", "demo~3": "b"}


def test_the_second_instance_keeps_its_name_when_it_crashes(tmp_path, rank):
    now = time.time()
    rank(instance="a", started_seconds=now - 5).step(record(1))
    killed_rank(tmp_path, instance="b")
    run = seen(tmp_path).find("demo~2")
    assert run.instance.name == "b"
    assert run.ranks()[0].view.state == "crashed"


def test_a_killed_rank_still_shows_what_it_did_last(tmp_path):
    with rank_process(tmp_path, steps=7, broken=[7], rank=1, world_size=2) as process:
        store = seen(tmp_path)
        run = store.find("demo")
        assert run.ranks()[1].view.state == "running"
        process.kill()
        process.wait()
        store.refresh()
    one = run.ranks()[1]
    assert one.view.state == "crashed"
    assert one.step == 7
    assert one.incident.step == 7
    state, sentence = describe(run, time.time() + 12)
    assert state == "crashed"
    assert sentence.startswith("rank 1 is silent since 1")
    assert sentence.endswith("s (killed?)")


def test_a_corrupt_journal_is_counted_and_the_others_are_served(tmp_path, rank, caplog):
    rank(rank=0, world_size=2).step(record(1))
    broken = rank(rank=1, world_size=2).path.with_name("rank-00001.db")
    store = Store(tmp_path)
    for one in (broken, *broken.parent.glob("rank-00001.db-*")):
        one.unlink()
    broken.write_bytes(b"no database at all" * 400)
    (tmp_path / "demo" / "i1" / "0" / "rank-00001.lock").unlink()
    store.refresh()
    store.refresh()
    assert store.errors["journal"] == 1  # tried again only after a while
    assert list(store.find("demo").ranks()) == [0]
    assert [message for message in caplog.messages if "rank-00001" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_journal_of_a_newer_version_is_counted_apart(tmp_path, rank):
    one = rank().step(record(1))
    one.end()
    with sqlite3.connect(one.path) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    store = seen(tmp_path)
    assert store.errors["journal_version"] == 1
    assert store.errors["journal"] == 0
    assert store.runs == []


def test_a_journal_in_the_making_is_no_error(tmp_path, rank):
    one = rank()  # holds the lock; what lies there now is what a reader sees before the tables are made
    one.path.with_name("rank-00000.db-wal").unlink()
    one.path.unlink()
    one.path.touch()
    store = seen(tmp_path)
    assert store.errors["journal"] == 0
    assert store.runs == []


def test_a_journal_that_is_gone_is_forgotten(tmp_path, rank):
    one = rank().step(record(1))
    one.end()
    store = seen(tmp_path)
    one.path.unlink()
    store.refresh()
    assert store.runs == []
    assert store.journals == 0


def test_a_new_journal_under_the_old_name_is_read_from_its_start(tmp_path):
    first = FakeRank(tmp_path, identity(started_seconds=1.0)).step(*[record(i) for i in range(1, 9)])
    store = seen(tmp_path)
    first.end()
    second = FakeRank(tmp_path, identity(started_seconds=2.0)).step(record(1, grad_norm=7.0))
    store.refresh()
    assert store.find("demo").ranks()[0].history.recent("grad_norm", 9) == [7.0]
    second.end()


def test_foreign_files_are_passed_over(tmp_path, rank):
    rank().step(record(1))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "demo" / "i1" / "zero").mkdir()
    (tmp_path / "demo" / "i1" / "0" / "rank-x.db").write_text("mine")
    store = seen(tmp_path)
    assert store.journals == 1
    assert store.errors.total() == 0


def test_history_is_bounded_covers_the_whole_run_and_keeps_incidents():
    history = History()
    for step in range(1, 30_001):
        history.append(step, nonfinite(step) if step in (77, 12_345) else record(step))
    steps = history.recent("step", HISTORY_LIMIT)
    assert len(history) <= HISTORY_LIMIT
    assert {77, 12_345} < set(steps)
    assert steps[-1000:] == list(range(29_001, 30_001))
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[0] < 50
    assert max(gaps) < 50  # evenly thinned: no part of the run is missing


def test_history_is_bounded_also_when_every_step_is_an_incident():
    history = History(limit=400)
    for step in range(1, 5001):
        history.append(step, nonfinite(step))
    assert len(history) <= 400
    assert history.recent("step", 400)[0] < 100


def test_an_answer_is_bounded_and_keeps_incidents_and_the_newest():
    history = History()
    for step in range(1, 3001):
        history.append(step, nonfinite(step) if step == 1234 else record(step))
    steps = history.since(0, 200)["step"]
    assert len(steps) <= 210
    assert steps[-1] == 3000
    assert 1234 in steps
    assert history.since(2990, 200)["step"] == list(range(2991, 3001))


def test_an_agent_that_comes_late_sees_the_whole_of_a_long_run(tmp_path, rank):
    one = rank()
    for block in range(3):
        one.step(*[nonfinite(i) if i == 333 else record(i) for i in range(block * 9000 + 1, block * 9000 + 9001)])
    view = read_journal(one.path, limit=1000)
    assert len(view.steps) <= 2000
    steps = [record.step for _, record in view.steps]
    assert steps[-1] == 27_000
    assert 333 in steps
    assert steps[0] < 50
    store = seen(tmp_path)
    assert store.find("demo").ranks()[0].counters()["gradmon_steps_total", ()] == 27_000
    assert store.find("demo").ranks()[0].history.recent("step", 9999)[0] < 50


def test_events_told_by_several_ranks_are_shown_once(tmp_path, rank):
    broken = nonfinite(3, rank=1)
    vague = dataclasses.replace(event(broken), parameter=None)
    rank(rank=0, world_size=2).step(broken, tell=False).tell(vague)
    rank(rank=1, world_size=2).step(broken, tell=False).tell(event(broken))
    events = run_since(seen(tmp_path), "demo", "")["events"]
    assert [(e["step"], e["rank"], e["parameter"], e["applied"]) for e in events] == [
        (3, 1, "blocks.3.mlp.weight", True)
    ]


class TestApi:
    def test_a_cursor_brings_only_what_is_new(self, tmp_path, rank):
        one = rank().step(record(1), nonfinite(2))
        store = seen(tmp_path)
        first = run_since(store, "demo", "")
        assert first["full"]
        assert first["global"]["step"] == [1, 2]
        assert first["global"]["grad_norm"] == [pytest.approx(1.001), None]
        assert first["series"]["0"]["local_grad_norm"] == [1.5, None]
        one.step(record(3), nonfinite(4))
        store.refresh()
        second = run_since(store, "demo", first["cursor"])
        assert not second["full"]
        assert second["global"]["step"] == [3, 4]
        assert [e["step"] for e in second["events"]] == [4]
        third = run_since(store, "demo", second["cursor"])
        assert third["global"]["step"] == []
        assert third["events"] == []
        assert third["cursor"] == second["cursor"]

    @pytest.mark.parametrize("cursor", ["", "x", "other.i1.5", "..", "5"])
    def test_a_cursor_of_another_agent_brings_everything(self, tmp_path, rank, cursor):
        rank().step(record(1))
        answer = run_since(seen(tmp_path), "demo", cursor)
        assert answer["full"]
        assert answer["global"]["step"] == [1]

    def test_a_cursor_of_an_earlier_instance_brings_everything(self, tmp_path, rank):
        rank(instance="a").step(record(1)).end()
        store = seen(tmp_path)
        cursor = run_since(store, "demo", "")["cursor"]
        rank(instance="b", started_seconds=time.time() + 60).step(record(1))
        store.refresh()
        assert run_since(store, "demo", cursor)["full"]

    def test_totals_tell_what_was_done_from_what_would_have_been(self, tmp_path, rank):
        rank().step(nonfinite(1), nonfinite(2, applied=False))
        totals = run_since(seen(tmp_path), "demo", "")["totals"]
        assert (totals["skip"], totals["would_skip"], totals["nonfinite_steps"]) == (1, 1, 2)

    def test_living_runs_come_first(self, tmp_path, rank):
        now = time.time()
        rank(run="old", started_seconds=now - 900).step(record(1))
        rank(run="new", started_seconds=now).step(record(1)).end()
        assert [run["run"] for run in list_runs(seen(tmp_path))] == ["old", "new"]

    def test_an_unknown_run_is_none(self, tmp_path):
        assert run_since(seen(tmp_path), "nobody", "") is None


class TestDescription:
    @pytest.mark.parametrize(
        ("end", "detail", "expected"),
        [
            ("finished", "", ("finished", "the run has ended")),
            ("exception", "ValueError: no", ("failed", "rank 0 ended after step 1 with ValueError: no")),
        ],
    )
    def test_an_ended_run(self, tmp_path, rank, end, detail, expected):
        rank().step(record(1)).end(end, detail)
        assert describe(seen(tmp_path).find("demo"), time.time()) == expected

    def test_a_run_before_its_first_step(self, tmp_path, rank):
        rank()
        assert describe(seen(tmp_path).find("demo"), 0) == ("running", "attached, waiting for the first step")

    def test_all_ranks_killed(self, tmp_path):
        killed_rank(tmp_path, rank=0, world_size=2)
        killed_rank(tmp_path, rank=1, world_size=2)
        state, sentence = describe(seen(tmp_path).find("demo"), time.time())
        assert state == "crashed"
        assert sentence.startswith("all 2 ranks here are silent since")

    def test_the_rank_that_failed_says_more_than_those_it_took_along(self, tmp_path, rank):
        killed_rank(tmp_path, rank=0, world_size=2)
        rank(rank=1, world_size=2).step(record(1)).end("exception", "RuntimeError: boom")
        state, sentence = describe(seen(tmp_path).find("demo"), time.time())
        assert (state, sentence) == ("failed", "rank 1 ended after step 1 with RuntimeError: boom")

    def test_a_pause_is_told_in_the_scripts_own_words(self, tmp_path, rank):
        writer = rank().step(record(1)).writer
        for what, expected in (
            ("checkpoint", ("busy", "no step is expected now: checkpoint")),
            ("", ("running", "making steps")),
        ):
            writer.keep(paused=float(bool(what)), paused_for=what)
            assert writer.flush()
            assert describe(seen(tmp_path).find("demo"), time.time()) == expected
