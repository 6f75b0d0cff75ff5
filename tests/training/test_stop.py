"""The end of the ladder: all ranks end before the same step, with one clear error, and their journals know why."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from ladder import Job, assert_equal_ranks, train
from ranks import Ranks
from test_torchrun import Node, finish, node, until
from torch.nn.parallel import DistributedDataParallel

import gradmon
from gradmon.exits import STOP_CODE
from gradmon.journal import read_journal

__all__ = ["node"]
FROM = 12


def dead_rank(directory: Path, kind: str, **changes: Any) -> Job:
    return Job(str(directory), kind, 60, "adamw", nan=tuple((1, s) for s in range(FROM, 61)), **changes)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ten_skips_in_a_row_end_all_ranks_before_the_same_step(two_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    outcomes = two_ranks.run(train, dead_rank(tmp_path, kind))
    assert_equal_ranks(outcomes)
    for number, outcome in enumerate(outcomes):
        assert outcome.stopped is not None
        message, code, step = outcome.stopped
        assert (code, step) == (STOP_CODE, FROM + 10)
        assert message.startswith(f"gradmon stopped training at step {FROM + 9}: 10 steps in a row were not finite")
        assert "on rank 1" in message
        assert outcome.journal.identity.rank == number
        assert (outcome.journal.state, outcome.journal.end_detail) == ("exception", message)
        assert [r.step for _, r in outcome.journal.steps] == list(range(1, FROM + 10)), "no record is lost"
        assert outcome.events[-1] == (FROM + 9, "skip_streak", "stop", True)
        assert outcome.journal.counters["gradmon_actions_total", ("stop", "skip_streak", "yes")] == 1


def test_it_can_be_switched_off(two_ranks: Ranks, tmp_path: Path) -> None:
    outcomes = two_ranks.run(train, dead_rank(tmp_path, "ddp", config={"stop": {"after_skips": 0}}))
    assert_equal_ranks(outcomes)
    assert outcomes[0].stopped is None
    assert sum(a == "skip" for a in outcomes[0].actions.values()) == 60 - FROM + 1


def test_a_loop_that_swallows_it_meets_it_again(two_ranks: Ranks, tmp_path: Path) -> None:
    outcomes = two_ranks.run(train, dead_rank(tmp_path, "ddp", swallow=True))
    assert_equal_ranks(outcomes)
    assert outcomes[0].stops == 60 - FROM - 9
    assert not issubclass(gradmon.TrainingStopped, Exception), "a broad `except Exception` does not even see it"


def test_observe_mode_never_stops(two_ranks: Ranks, tmp_path: Path) -> None:
    outcomes = two_ranks.run(train, dead_rank(tmp_path, "ddp", config={"mode": "observe"}))
    for outcome in outcomes:
        assert outcome.stopped is None
        assert (FROM + 9, "skip_streak", "stop", False) in outcome.events


def test_ten_scaler_skips_in_a_row_stop_too(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    monitor = gradmon.attach(model, optimizer, config={"dir": str(tmp_path), "agent": {"start": "off"}})

    def step(number: int) -> None:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).mean() * (float("nan") if number > 5 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for number in range(1, 16):
        step(number)
    with pytest.raises(gradmon.TrainingStopped, match="the GradScaler has skipped 10 steps in a row") as caught:
        step(16)
    assert caught.value.code == STOP_CODE
    monitor.detach()
    assert monitor.journal_path is not None
    view = read_journal(monitor.journal_path)
    assert view.counters["gradmon_actions_total", ("stop", "scaler_streak", "yes")] == 1


def test_torchrun_ends_within_seconds_with_one_error(node: Node) -> None:
    began = time.monotonic()
    job = node.torchrun(script=("--steps", "100000", "--sleep", "0", "--nan-from", "30"))
    until(lambda: node.step_of(0)[0] >= 29, 60)
    reached = time.monotonic()
    output = finish(job, code=1)
    assert time.monotonic() - reached < 30, f"torchrun took {time.monotonic() - began:.0f} s"
    assert len(re.findall("gradmon stopped training at step 39: 10 steps in a row were not finite", output)) == 1
    assert output.count("10 steps in a row were not finite") == 1
    assert f"exitcode  : {STOP_CODE}" in output
    assert "optimizer.step()" not in output, "no rank prints a traceback of its own"
    for rank in (0, 1):
        (path,) = node.journals.rglob(f"rank-{rank:05d}.db")
        view = read_journal(path)
        assert view.state == "exception"
        assert view.end_detail.startswith("gradmon stopped training at step 39")
        assert [r.step for _, r in view.steps][-1] == 39
    stops = {("run", "script"), ("action", "stop"), ("reason", "skip_streak"), ("applied", "yes")}
    until(lambda: node.samples()["gradmon_actions_total"].get(frozenset(stops)) == 1)
    assert node.value("gradmon_healthy", run="script") == 0
    assert node.value("gradmon_last_healthy_step", run="script") == 30


def uneven(directory: str) -> tuple[bool, Any]:
    """Rank 1 runs out of data after 20 of 45 steps; from step 22 on rank 0's are NaN."""
    torch.manual_seed(0)
    model = DistributedDataParallel(toy.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = gradmon.attach(model, optimizer, config={"dir": directory, "agent": {"start": "off"}})
    stopped = False
    try:
        with model.join():
            for step in range(1, 46 if dist.get_rank() == 0 else 21):
                optimizer.zero_grad()
                inputs = torch.randn(8, toy.FEATURES) * (float("nan") if step > 21 else 1.0)
                model(inputs).square().mean().backward()
                optimizer.step()
    except gradmon.TrainingStopped:
        stopped = True
    state = monitor.state_dict()
    monitor.detach()
    return stopped, {
        "detector": state["detector"],
        "spikes": state["policy"]["spikes"],
        "skips": state["policy"]["skips"],
    }


def test_inside_join_no_rank_learns_what_another_does_not(two_ranks: Ranks, tmp_path: Path) -> None:
    """Rank 0 alone would stop, and rank 1 wait for it in a collective."""
    first, second = two_ranks.run(uneven, str(tmp_path))
    assert first[0] is second[0] is False
    assert first[1] == second[1]
    assert first[1]["skips"] == 0
