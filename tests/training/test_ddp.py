"""Training on real gloo ranks, against the same training without gradmon and against plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import Ranks
from toy import Job, Outcome, equal

from gradmon.record import StepRecord


def records(outcome: Outcome) -> dict[int, StepRecord]:
    assert outcome.journal is not None
    return {record.step: record for _, record in outcome.journal.steps}


def assert_replicas_equal(outcomes: list[Outcome]) -> None:
    for other in outcomes[1:]:
        assert equal(outcomes[0].parameters, other.parameters)
        assert equal(outcomes[0].state, other.state)


@pytest.mark.parametrize("optimizer", ["fused_adamw", "adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_clean_run_is_bit_identical(two_ranks: Ranks, tmp_path: Path, optimizer: str, clip: float | None) -> None:
    for without, attached in two_ranks.run(toy.train_both, Job(str(tmp_path), optimizer=optimizer, clip=clip)):
        assert equal(without.parameters, attached.parameters)
        assert equal(without.state, attached.state)
        assert not attached.journal.events


def test_clean_run_is_bit_identical_on_three_ranks(three_ranks: Ranks, tmp_path: Path) -> None:
    """1/3 is no binary fraction: dividing as the stock hook does gives other weights than DDP's multiplication."""
    pairs = three_ranks.run(toy.train_both, Job(str(tmp_path), steps=40))
    for without, attached in pairs:
        assert equal(without.parameters, attached.parameters)
        assert equal(without.state, attached.state)
    assert_replicas_equal([attached for _, attached in pairs])


def test_clean_run_with_accumulation_is_bit_identical(two_ranks: Ranks, tmp_path: Path) -> None:
    for without, attached in two_ranks.run(toy.train_both, Job(str(tmp_path), accumulate=3)):
        assert equal(without.parameters, attached.parameters)
        assert all(record.reason == "healthy" for record in records(attached).values())


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_norms_are_those_of_plain_torch(two_ranks: Ranks, tmp_path: Path, clip: float | None, accumulate: int) -> None:
    """Local before the all-reduce, global after it, and both before the script's own clip."""
    outcomes = two_ranks.run(toy.train, Job(str(tmp_path), clip=clip, accumulate=accumulate))
    for outcome in outcomes:
        written = records(outcome)
        assert len(written) == len(outcome.norms) == 30
        for step, (local, whole) in enumerate(outcome.norms, start=1):
            assert written[step].local_grad_norm == pytest.approx(local, rel=1e-5)
            assert written[step].grad_norm == pytest.approx(whole, rel=1e-5)
            if clip is not None:
                assert whole > clip, "the script's clip must have had something to do"
                assert written[step].grad_norm_applied == pytest.approx(clip, rel=1e-3)
    assert [r.grad_norm for r in records(outcomes[0]).values()] == [r.grad_norm for r in records(outcomes[1]).values()]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("optimizer", ["fused_adamw", "fused_adam", "adamw", "sgd"])
def test_nan_on_one_rank_is_skipped_on_both(
    two_ranks: Ranks, tmp_path: Path, optimizer: str, clip: float | None
) -> None:
    job = Job(str(tmp_path), optimizer=optimizer, clip=clip, nan=((1, 15),), copies_at=(14, 15, 16))
    outcomes = two_ranks.run(toy.train, job)
    assert_replicas_equal(outcomes)
    for outcome in outcomes:
        assert math.isnan(outcome.norms[14][1]), "plain torch sees the NaN"
        assert equal(outcome.copies[14], outcome.copies[15]), "parameters, moments and step counts must not move"
        assert not equal(outcome.copies[15][0], outcome.copies[16][0]), "and the next step must"
        written = records(outcome)
        assert [s for s, r in written.items() if r.action != "none"] == [15]
        step = written[15]
        assert (step.action, step.reason, step.culprit_rank, step.applied) == ("skip", "nonfinite", 1, True)
        # backward goes from the end: the last layer's gradients are the first to be NaN
        assert step.parameter in ("5.weight", "5.bias")
        assert step.nan_count > 0
        assert step.grad_norm_applied == 0
    assert records(outcomes[0])[15].local_nan_count == 0
    assert records(outcomes[1])[15].local_nan_count == sum(p.numel() for p in outcomes[1].parameters)


def test_a_nan_of_all_ranks_is_nobodys(two_ranks: Ranks, tmp_path: Path) -> None:
    for outcome in two_ranks.run(toy.train, Job(str(tmp_path), steps=12, nan=((0, 10), (1, 10)))):
        step = records(outcome)[10]
        assert (step.action, step.culprit_rank) == ("skip", None)
        assert step.parameter in ("5.weight", "5.bias")


def nan_in_one_parameter(directory: str) -> tuple[Outcome, str]:
    """Only one gradient element is NaN, on rank 1."""

    job = Job(directory, steps=20)
    inner_build = toy.build

    def broken(seed: int = 0) -> Any:
        model = inner_build(seed)
        calls = iter(range(1, 10_000))

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            # each step runs backward twice: for the reference, then for the training
            if next(calls) == 2 * 12 and toy.rank() == 1:
                gradient = gradient.clone()
                gradient.view(-1)[3] = float("inf")
            return gradient

        model[3].weight.register_hook(poison)
        return model

    toy.build = broken
    try:
        return toy.train(job), "3.weight"
    finally:
        toy.build = inner_build


def test_the_parameter_is_named(two_ranks: Ranks, tmp_path: Path) -> None:
    for outcome, name in two_ranks.run(nan_in_one_parameter, str(tmp_path)):
        (step,) = (r for r in records(outcome).values() if r.reason == "nonfinite")
        assert (step.step, step.culprit_rank, step.parameter) == (12, 1, name)
        assert (step.inf_count, step.nan_count) == (1, 0)


@pytest.mark.parametrize("optimizer", ["fused_adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 100.0])
def test_spikes_are_rescaled_not_skipped(two_ranks: Ranks, tmp_path: Path, optimizer: str, clip: float | None) -> None:
    job = Job(str(tmp_path), steps=40, optimizer=optimizer, clip=clip, spike=((1, 20), (1, 25)), copies_at=(19, 20))
    outcomes = two_ranks.run(toy.train, job)
    assert_replicas_equal(outcomes)
    for outcome in outcomes:
        written = records(outcome)
        assert [s for s, r in written.items() if r.action != "none"] == [20, 25]
        for at in (20, 25):
            step = written[at]
            assert step.grad_norm > 10 * step.grad_norm_limit, "the spike must be one"
            assert (step.action, step.reason, step.culprit_rank) == ("rescale", "spike", 1)
            before = sorted(outcome.norms[s - 1][1] for s in range(1, at))
            median = math.exp((math.log(before[(len(before) - 1) // 2]) + math.log(before[len(before) // 2])) / 2)
            assert step.grad_norm_applied == pytest.approx(median, rel=1e-4), "to the running median norm"
        assert not equal(outcome.copies[19][0], outcome.copies[20][0])


def test_a_spike_of_all_ranks_is_nobodys(two_ranks: Ranks, tmp_path: Path) -> None:
    """As after a learning rate that was too high: naming a rank would send somebody to the wrong machine."""
    outcomes = two_ranks.run(toy.train, Job(str(tmp_path), spike=((0, 20), (1, 20))))
    for outcome in outcomes:
        assert records(outcome)[20].reason == "spike"
        assert records(outcome)[20].culprit_rank is None
        assert records(outcome)[20].parameter is not None
        assert outcome.journal.counters["gradmon_incidents_total", ("spike",)] == 0


def test_rescaled_step_is_the_one_plain_torch_would_take(two_ranks: Ranks, tmp_path: Path) -> None:
    """SGD without momentum in the first step: the update is the rate times the gradient, so its norm is known."""
    job = Job(str(tmp_path), steps=20, optimizer="sgd", spike=((1, 20),), copies_at=(19, 20))
    outcome = two_ranks.run(toy.train, job)[0]
    before, after = outcome.copies[19], outcome.copies[20]
    applied = records(outcome)[20].grad_norm_applied
    # buf = 0.9 buf + g + weight_decay p, so g can be worked out from the momentum buffers
    gradient = [
        after[1][i]["momentum_buffer"] - 0.9 * before[1][i]["momentum_buffer"] - 1e-2 * p
        for i, p in enumerate(before[0])
    ]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
    assert norm == pytest.approx(applied, rel=1e-4)


def test_spikes_in_a_row_lower_the_rate_and_it_comes_back(two_ranks: Ranks, tmp_path: Path) -> None:
    config = {"backoff": {"after_spikes": 2, "factor": 0.5, "rewarm": 1.5}}
    job = Job(str(tmp_path), steps=30, config=config, spike=((0, 15), (0, 16)))
    outcomes = two_ranks.run(toy.train, job)
    assert_replicas_equal(outcomes)
    for outcome in outcomes:
        written = records(outcome)
        assert [round(written[s].learning_rate_scale, 6) for s in range(15, 21)] == [1, 1, 0.5, 0.75, 1, 1]
        assert all(r.learning_rate == 3e-3 for r in written.values()), "the scheduler's rate is what it set"
        assert outcome.rate == 3e-3
        assert [e.kind for _, e in outcome.journal.events].count("spike_streak") == 1


def test_observe_mode_changes_nothing_and_says_what_it_would_have_done(two_ranks: Ranks, tmp_path: Path) -> None:
    spikes = ((1, 15), (1, 16), (1, 17), (1, 18))
    job = Job(str(tmp_path), steps=20, config={"mode": "observe"}, spike=spikes)
    for without, attached in two_ranks.run(toy.train_both, job):
        assert equal(without.parameters, attached.parameters)
        step = records(attached)[15]
        assert (step.action, step.applied, step.culprit_rank) == ("rescale", False, 1)
        assert step.grad_norm_applied == step.grad_norm
        counters = attached.journal.counters
        assert counters["gradmon_actions_total", ("rescale", "spike", "no")] == 1
        assert counters["gradmon_actions_total", ("skip", "spike", "no")] == 3
        assert counters["gradmon_actions_total", ("backoff", "spike_streak", "no")] == 1
        assert all(r.learning_rate_scale == 1 for r in records(attached).values())


def test_counters_name_the_rank_that_broke(two_ranks: Ranks, tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=20, nan=((1, 10), (1, 11)), spike=((0, 15),))
    first, second = (o.journal.counters for o in two_ranks.run(toy.train, job))
    assert (first["gradmon_incidents_total", ("nonfinite",)], second["gradmon_incidents_total", ("nonfinite",)]) == (
        0,
        2,
    )
    assert (first["gradmon_incidents_total", ("spike",)], second["gradmon_incidents_total", ("spike",)]) == (1, 0)
    for counters in (first, second):
        assert counters["gradmon_steps_total", ()] == 20
        assert counters["gradmon_nonfinite_steps_total", ()] == 2
        assert counters["gradmon_actions_total", ("skip", "nonfinite", "yes")] == 2


def test_after_a_skip_nothing_else_is_skipped(two_ranks: Ranks, tmp_path: Path) -> None:
    """The baseline is not poisoned: three NaN steps, then every healthy step is taken, and a spike is still caught."""
    job = Job(str(tmp_path), steps=60, nan=((1, 20), (1, 21), (1, 22)), spike=((1, 50),))
    for outcome in two_ranks.run(toy.train, job):
        actions = {s: r.action for s, r in records(outcome).items() if r.action != "none"}
        assert actions == {20: "skip", 21: "skip", 22: "skip", 50: "rescale"}


def run_without_sync(directory: str) -> list[str]:
    """A user who forgets to synchronise: every backward under no_sync, so gradients differ between ranks."""
    import os

    import torch
    from torch.nn.parallel import DistributedDataParallel

    import gradmon
    from gradmon.journal import read_journal

    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(3):
            optimizer.zero_grad()
            with model.no_sync():
                inputs = torch.randn(4, toy.FEATURES)
                if step == 2 and toy.rank() == 1:
                    inputs[0, 0] = float("nan")
                model(inputs).square().mean().backward()
            optimizer.step()
        path = monitor.journal_path
    return [record.reason for _, record in read_journal(path).steps]


def test_gradients_that_differ_between_ranks_are_left_alone(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(run_without_sync, str(tmp_path)) == [["unsynced"] * 3, ["unsynced", "unsynced", "nonfinite"]]


def unequal_threads(job: Job) -> Outcome:
    import torch

    torch.set_num_threads(1 + toy.rank())
    try:
        return toy.train(job)
    finally:
        torch.set_num_threads(1)


def test_unequal_thread_counts_still_decide_alike(two_ranks: Ranks, tmp_path: Path) -> None:
    job = Job(str(tmp_path), steps=30, optimizer="sgd", nan=((0, 12),), spike=((1, 20), (1, 23)))
    outcomes = two_ranks.run(unequal_threads, job)
    assert_replicas_equal(outcomes)
    norms = [[r.grad_norm for s, r in records(o).items() if s != 12] for o in outcomes]
    assert norms[0] == norms[1]
    assert [r.action for r in records(outcomes[0]).values()].count("rescale") == 2


def detach_and_again(directory: str) -> tuple[bool, bool, int]:
    """Attach, detach, train on, attach again: against the same steps without gradmon."""
    import os

    import torch
    from torch.nn.parallel import DistributedDataParallel

    import gradmon

    os.environ["GRADMON_DIR"] = directory

    def run(attached: bool) -> list[torch.Tensor]:
        model = DistributedDataParallel(toy.build())
        optimizer = toy.optimizer_for("fused_adamw", model.parameters())
        generator = torch.Generator().manual_seed(toy.rank())
        for _part in range(3):
            monitor = gradmon.attach(model, optimizer) if attached and _part != 1 else None
            for _ in range(5):
                inputs = torch.randn(4, toy.FEATURES, generator=generator)
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
            if monitor is not None:
                monitor.detach()
        hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        return [*(p.detach().clone() for p in model.parameters()), torch.tensor(hooks)]

    without, attached = run(False), run(True)
    import torch.nn.utils.clip_grad as clip_module

    untouched = clip_module._clip_grads_with_norm_.__module__ == clip_module.__name__
    return equal(without, attached), untouched, int(attached[-1])


def test_attach_detach_attach_leaves_no_trace(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(detach_and_again, str(tmp_path)) == [(True, True, 0)] * 2


def gradmon_fails(directory: str) -> tuple[list[bool], list[torch.Tensor], dict[Any, float]]:
    """gradmon itself breaks on rank 1 at step 10; a NaN comes at step 15."""
    from gradmon.measuring import Measurer

    calls = iter(range(1, 1000))
    original = Measurer.measure

    def failing(self: Any, **kwargs: Any) -> Any:
        if next(calls) == 10 and toy.rank() == 1:
            raise RuntimeError("made up")
        return original(self, **kwargs)

    Measurer.measure = failing
    try:
        outcome = toy.train(Job(directory, steps=20, nan=((0, 15),)))
    finally:
        Measurer.measure = original
    return [r.applied for _, r in outcome.journal.steps], outcome.parameters, outcome.journal.counters


def test_a_failure_of_gradmons_own_makes_all_ranks_watch(two_ranks: Ranks, tmp_path: Path) -> None:
    """Then no rank acts any more: a rank that can't judge would step where the others skip."""
    (first, one, errors0), (second, two, errors1) = two_ranks.run(gradmon_fails, str(tmp_path))
    assert first[-1] is second[-1] is False
    assert first[0] is second[0] is True
    for left, right in zip(one, two, strict=True):
        assert bool((left == right).logical_or(left.isnan() & right.isnan()).all())
    assert errors1["gradmon_errors_total", ("before_step",)] == 1
    assert ("gradmon_errors_total", ("before_step",)) not in errors0


def test_every_rank_knows_all_losses_and_who_is_healthy(two_ranks: Ranks, tmp_path: Path) -> None:
    """What travels with the rows: the newest losses observed before the gradients met, so those of the step before."""
    outcomes = two_ranks.run(toy.train, Job(str(tmp_path), steps=20, nan=((1, 12),)))
    first, second = (records(outcome) for outcome in outcomes)
    for step in range(2, 21):
        own = [first[step - 1].loss, second[step - 1].loss]
        assert own[0] != own[1], "each rank has a batch of its own"
        for made in (first[step], second[step]):
            if step == 13:  # rank 1's loss of step 12 was NaN
                assert math.isnan(made.mean_loss)
                assert math.isnan(made.max_loss)
            else:
                assert made.mean_loss == pytest.approx(sum(own) / 2, rel=1e-12)
                assert made.max_loss == max(own)
        assert first[step].healthy_ranks == second[step].healthy_ranks == (1 if step == 12 else 2)
    assert first[1].mean_loss is None, "nothing was observed before the first step"


def test_the_noise_scale_is_that_of_the_formula(two_ranks: Ranks, tmp_path: Path) -> None:
    """McCandlish et al. 2018, appendix A.1, with plain torch's norms; a NaN step and a spike must not enter."""
    outcomes = two_ranks.run(toy.train, Job(str(tmp_path), steps=40, nan=((1, 12),), spike=((0, 30),)))
    gradient = noise = 0.0
    known = 0
    for step in range(1, 41):
        locals_, whole = [o.norms[step - 1][0] for o in outcomes], outcomes[0].norms[step - 1][1]
        if step not in (12, 30):
            square = sum(n * n for n in locals_) / 2
            small, large = 1, 2  # batch of one rank, batch of both
            gradient = 0.99 * gradient + 0.01 * (large * whole**2 - small * square) / (large - small)
            noise = 0.99 * noise + 0.01 * (square - whole**2) / (1 / small - 1 / large)
        ratios = [records(o)[step].noise_scale_ratio for o in outcomes]
        assert ratios[0] == ratios[1]
        if ratios[0] is not None:
            known += 1
            assert ratios[0] == pytest.approx(noise / gradient / large, rel=1e-4)
    assert known >= 15, "it must be known in most of the last twenty steps"


def test_micro_steps_that_each_average_are_no_samples_of_noise(two_ranks: Ranks, tmp_path: Path) -> None:
    """Their gradients hold the average of the micro-step before: the formula would lie."""

    for ratios in two_ranks.run(noise_with_averaged_micro_steps, str(tmp_path)):
        assert ratios == [None] * 30


def noise_with_averaged_micro_steps(directory: str) -> list[float | None]:
    import os

    from torch.nn.parallel import DistributedDataParallel

    import gradmon
    from gradmon.journal import read_journal

    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    optimizer = toy.optimizer_for("sgd", model.parameters())
    generator = torch.Generator().manual_seed(toy.rank())
    with gradmon.attach(model, optimizer) as monitor:
        for _ in range(30):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(8, toy.FEATURES, generator=generator)).square().mean().backward()
            optimizer.step()
    return [made.noise_scale_ratio for _, made in read_journal(monitor.journal_path).steps]
