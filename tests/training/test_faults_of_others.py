"""Each fault that was seen in other tools, made to happen, with gradmon on the right side of it.

The published rules stand beside it (tests/bench/published.py) where the fault is one of arithmetic: a test that they
would pass, too, would show nothing.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import sharded
import torch
import toy
from ladder import Job, Outcome, assert_equal_ranks, train
from ranks import Ranks

import gradmon
from gradmon.config import ClipConfig
from gradmon.detector import Detector

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from published import Megatron, SkipStep, ZClip

QUIET = {"agent": {"start": "off"}}


def lengths(count: int, level: float = 0.5) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (level * torch.exp(0.1 * torch.randn(count, generator=generator, dtype=torch.float64))).tolist()


def judged(norms: list[float]) -> list[str]:
    """What gradmon does with each norm."""
    detector, done = Detector(ClipConfig()), []
    for norm in norms:
        above = detector.limits().spike_above
        done.append("skip" if not math.isfinite(norm) else "rescale" if norm > above else "none")
        detector.update(norm)
    return done


def all_nan(optimizer_kind: str, directory: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights before and after a step all of whose gradients are NaN."""
    model = toy.build()
    optimizer = toy.optimizer_for(optimizer_kind, model.parameters())
    with gradmon.attach(model, optimizer, config={"dir": str(directory), **QUIET}):
        for broken in (False, True):
            optimizer.zero_grad()
            model(torch.randn(4, toy.FEATURES)).square().mean().backward()
            before = [p.detach().clone() for p in model.parameters()]
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(float("nan") if broken else 1.0)
            optimizer.step()
    return before, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", ["fused_adamw", "adamw", "sgd"])
def test_a_skip_that_multiplies_by_zero_writes_nan_into_every_weight(tmp_path: Path, optimizer: str) -> None:
    before, after = all_nan(optimizer, tmp_path)
    assert toy.equal(before, after)
    gradient = torch.full((3,), float("nan"))
    assert (gradient * 0).isnan().all(), "which is what a skip by a factor of 0 does"


def test_one_nan_makes_the_next_128_healthy_steps_skipped() -> None:
    norms = lengths(400)
    norms[200] = math.nan
    done = judged(norms)
    assert done[200] == "skip"
    assert set(done[:200] + done[201:]) == {"none"}
    theirs = SkipStep()
    factors = [theirs.judge(norm) for norm in norms]
    assert factors[201:329] == [0.0] * 128


def test_one_nan_and_clipping_is_dead_for_ever() -> None:
    norms = lengths(400)
    norms[100], norms[300] = math.nan, 50.0
    assert judged(norms)[300] == "rescale"
    theirs = ZClip()
    flagged = [(theirs.judge(norm), theirs.flagged)[1] for norm in norms]
    assert not any(flagged[101:])


def test_a_level_shift_locks_in_and_every_step_is_clipped() -> None:
    norms = lengths(500) + [2 * norm for norm in lengths(5000)]
    assert "rescale" not in judged(norms)
    norms = lengths(500) + [8 * norm for norm in lengths(5000)]
    done = judged(norms)
    assert done.count("rescale") <= 33, "half a window"
    assert set(done[-4900:]) == {"none"}
    theirs = ZClip()
    flagged = [(theirs.judge(norm * 0.1), theirs.flagged)[1] for norm in norms]
    assert sum(flagged[-4900:]) > 1000


def test_a_good_baseline_taken_once_in_warm_up_is_kept_for_ever() -> None:
    falling = [100 * norm / (1 + 0.02 * step) ** 1.6 for step, norm in enumerate(lengths(3000))]
    falling[2500] *= 30
    assert judged(falling)[2500] == "rescale"
    assert judged(falling)[:2500].count("rescale") == 0
    theirs = Megatron()
    assert [theirs.judge(norm) for norm in falling][2500] == 1.0


def test_a_comparison_with_nan_is_false(tmp_path: Path) -> None:
    nan, threshold = float("nan"), 10.0
    assert not nan > threshold
    outcome = train(Job(str(tmp_path), steps=30, nan=((0, 20),)))
    assert outcome.actions == {20: "skip"}
    assert toy.equal(outcome.copies[19], outcome.copies[20])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_rank_0_decides_and_the_others_step_into_the_poison(two_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    job = Job(str(tmp_path), kind, 40, "adamw", nan=((1, 15),), spike=((1, 25), (0, 30)))
    outcomes = two_ranks.run(train, job)
    assert_equal_ranks(outcomes)
    assert outcomes[0].actions == {15: "skip", 25: "rescale", 30: "rescale"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "hsdp"])
def test_and_so_it_is_on_four_ranks_through_skip_rescale_and_back_off(
    four_ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    spikes = ((2, 20), *((3, step) for step in range(25, 30)))
    outcomes = four_ranks.run(train, Job(str(tmp_path), kind, 40, "adamw", nan=((1, 15), (3, 16)), spike=spikes))
    assert_equal_ranks(outcomes)
    assert outcomes[0].actions == {
        15: "skip", 16: "skip", 20: "rescale", 25: "rescale", 26: "skip", 27: "skip", 28: "skip", 29: "rescale",
    }  # fmt: skip
    assert [e[2] for e in outcomes[0].events].count("backoff") == 3, "with the one before there are four at the third"


def test_one_rank_raises_and_the_others_hang(two_ranks: Ranks, tmp_path: Path) -> None:
    """Within the 60 s of `Ranks`; the process group's own timeout is 30 s."""
    nan = tuple((1, step) for step in range(5, 31))
    outcomes = two_ranks.run(train, Job(str(tmp_path), "ddp", 30, nan=nan))
    assert {outcome.stopped for outcome in outcomes} == {outcomes[0].stopped}
    assert outcomes[0].stopped is not None


def test_the_baseline_is_lost_on_resume(tmp_path: Path) -> None:
    def run(spike_at: int, resumed: bool) -> str:
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = {"dir": str(tmp_path), **QUIET}
        monitor = gradmon.attach(model, optimizer, config=config)
        for step in range(1, spike_at + 1):
            if resumed and step == spike_at - 1:  # two steps after the restart a new baseline knows nothing
                state = monitor.state_dict()
                monitor.detach()
                monitor = gradmon.attach(model, optimizer, config=config)
                monitor.load_state_dict(state)
            optimizer.zero_grad()
            (model(torch.ones(2, 4)).mean() * (1000.0 if step == spike_at else 1.0)).backward()
            optimizer.step()
        monitor.detach()
        assert monitor.journal_path is not None
        return gradmon.journal.read_journal(monitor.journal_path).steps[-1][1].action

    assert run(40, resumed=False) == "rescale"
    assert run(40, resumed=True) == "rescale"
    assert run(2, resumed=False) == "none", "without a baseline it would not have been seen"


def test_every_step_is_skipped_and_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nan = tuple((0, step) for step in range(5, 26))
    with caplog.at_level("INFO", logger="gradmon"):
        outcome = train(Job(str(tmp_path), steps=25, nan=nan, config={"stop": {"after_skips": 0}}))
    assert list(outcome.actions.values()) == ["skip"] * 21
    assert outcome.journal.counters["gradmon_actions_total", ("skip", "nonfinite", "yes")] == 21
    assert len([e for _, e in outcome.journal.events if e.kind == "nonfinite"]) == 21
    said = [r.message for r in caplog.records]
    assert any("NaN and 0 Inf gradient elements" in message for message in said)
    assert any(message == "20 more of the kind nonfinite" for message in said)


def test_the_nan_loss_is_replaced_by_a_mean_in_the_log(tmp_path: Path) -> None:
    outcome = train(Job(str(tmp_path), steps=20, loss_nan=(10,)))
    losses = {r.step: r.loss for _, r in outcome.journal.steps}
    assert [step for step, loss in losses.items() if loss is not None and math.isnan(loss)] == [10]
    assert outcome.journal.counters["gradmon_nonfinite_losses_total", ()] == 1
    assert outcome.healthy[9] is False


def test_a_nan_gradient_is_invisible_in_the_statistics(tmp_path: Path) -> None:
    outcome = train(Job(str(tmp_path), steps=20, nan=((0, 10),)))
    counts = {r.step: r.nan_count for _, r in outcome.journal.steps}
    assert counts[10] > 0
    assert sum(counts.values()) == counts[10]


def norms_of(job: sharded.Task) -> list[float]:
    journal = sharded.train(job).journal
    assert journal is not None
    return [r.grad_norm for _, r in journal.steps]


def test_a_shard_s_norm_is_used_as_the_global_one(two_ranks: Ranks, tmp_path: Path) -> None:
    by_rank = two_ranks.run(norms_of, sharded.Task(str(tmp_path), "fsdp2"))
    plain = sharded.reference(sharded.Task(str(tmp_path), "fsdp2"), 2)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0] == pytest.approx([norm for norm, _ in plain], rel=1e-5)


def test_a_norm_after_clipping_is_one_before_it(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradmon.attach(model, optimizer, config={"dir": str(tmp_path), **QUIET}) as monitor:
        (model(torch.ones(2, 4)).mean() * 100).backward()
        true = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert monitor.journal_path is not None
    (record,) = [r for _, r in gradmon.journal.read_journal(monitor.journal_path).steps]
    assert true > 100
    assert record.grad_norm == pytest.approx(true, rel=1e-6)
    assert record.grad_norm_applied == pytest.approx(1.0, rel=1e-5)


def rotate(outcome: Outcome, ask: bool) -> list[int]:
    """What a saver has left that keeps the newest three checkpoints; with `ask` it asks is_healthy first."""
    kept: list[int] = []
    for step, healthy in enumerate(outcome.healthy, start=1):
        if step % 5 == 0 and (healthy or not ask):
            kept = [*kept[-2:], step]
    return kept


def test_nan_checkpoints_push_out_the_healthy_ones(tmp_path: Path) -> None:
    """A script that gradmon only watches writes NaN into its weights at step 22, and saves every fifth step."""
    outcome = train(Job(str(tmp_path), steps=50, nan=((0, 22),), config={"mode": "observe"}))

    def broken(step: int) -> bool:
        return not all(torch.isfinite(p).all() for p in outcome.copies[step])

    assert [broken(step) for step in rotate(outcome, ask=False)] == [True] * 3
    assert rotate(outcome, ask=True) == [10, 15, 20]
    assert not any(broken(step) for step in rotate(outcome, ask=True))


def test_the_same_port_on_every_rank_and_a_bind_that_fails(tmp_path: Path) -> None:
    """gradmon lets nothing in a training process listen. (The agent's port: tests/agent.)"""

    def listening() -> list[Any]:
        return [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]

    before = listening()  # gloo keeps the socket of a test before this one
    outcome = train(Job(str(tmp_path), steps=3))
    assert outcome.journal.steps
    assert listening() == before
