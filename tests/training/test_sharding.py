"""One model, spread over the ranks in every way gradmon knows, against plain torch in one process."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
import toy
from ranks import Ranks
from sharded import Result, Task, data_rank
from toy import equal

from gradmon.journal import read_journal
from gradmon.record import StepRecord


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """As many as the test's parameter says."""
    names = {1: "one_rank", 2: "two_ranks", 3: "three_ranks", 4: "four_ranks"}
    found: Ranks = request.getfixturevalue(names[request.param])
    return found


def records(result: Result) -> dict[int, StepRecord]:
    assert result.journal is not None
    assert not [key for key, count in result.journal.counters.items() if "errors" in key[0] and count]
    return {record.step: record for _, record in result.journal.steps}


@functools.lru_cache(maxsize=64)
def plain(task: Task, world: int) -> list[tuple[float, list[float]]]:
    return sharded.reference(task, world)


SPREADS = [
    (1, "ddp"), (2, "ddp"), (3, "ddp"), (4, "ddp"), (1, "fsdp2"), (2, "fsdp2"), (3, "fsdp2"), (4, "fsdp2"), (4, "hsdp"),
    (2, "tensor_parallel"), (4, "tensor_parallel"), (2, "sequence_parallel"), (4, "fsdp2+tp"),
]  # fmt: skip
KINDS = {"sequence_parallel": "tensor_parallel"}
"""What gradmon calls them, where that is another name."""


def optimizer_for(kind: str) -> str:
    # plain parameters beside DTensors can't share one foreach or fused call
    return "sgd1" if kind == "tensor_parallel" else "fused_adamw"


@pytest.mark.parametrize(
    ("ranks", "kind", "clip"),
    # torch's own clip does not take plain tensors beside DTensors
    [(n, kind, clip) for n, kind in SPREADS for clip in (None, 0.05) if not (clip and kind == "tensor_parallel")],
    indirect=["ranks"],
)
def test_norms_are_those_of_plain_torch(ranks: Ranks, kind: str, clip: float | None, tmp_path: Path) -> None:
    if clip and kind == "sequence_parallel" and torch.__version__.startswith("2.6."):
        pytest.skip("this torch's own clip leaves partial gradients above its bound (0.0588 for 0.05)")
    task = Task(str(tmp_path), kind, steps=6, clip=clip, optimizer="sgd1")
    results = ranks.run(sharded.train, task)
    expected = sharded.reference(dataclasses.replace(task, directory=""), ranks.world_size)
    whole_rows = kind in ("ddp", "fsdp2", "hsdp")
    for rank, result in enumerate(results):
        assert result.kind == KINDS.get(kind, kind)
        written = records(result)
        assert len(written) == 6
        data = data_rank(kind, rank, ranks.world_size)
        for step, (whole, local) in enumerate(expected, start=1):
            record = written[step]
            assert record.reason == "healthy"
            assert record.grad_norm == pytest.approx(whole, rel=1e-5)
            if clip is not None:
                assert whole > clip, "the script's clip must have something to do"
                assert record.grad_norm_applied == pytest.approx(clip, rel=1e-3)
            if whole_rows:
                assert record.local_grad_norm == pytest.approx(local[data], rel=1e-5)
                assert record.local_grad_norm_max == pytest.approx(max(local), rel=1e-5)
                rms = math.sqrt(sum(n * n for n in local) / len(local))
                assert record.local_grad_norm_rms == pytest.approx(rms, rel=1e-5)
                assert record.healthy_ranks == ranks.world_size
    for record, *others in zip(*(records(r).values() for r in results), strict=True):
        assert all(o.grad_norm == record.grad_norm for o in others), "equal to the last bit on all ranks"


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(2, "ddp"), (3, "fsdp2"), (4, "hsdp"), (2, "tensor_parallel"), (2, "sequence_parallel"), (4, "fsdp2+tp")],
    indirect=["ranks"],
)
def test_full_statistics_do_not_depend_on_the_spread(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """Extremes and counts over parts, replicas and empty shards; the input's first feature is 0, so zeros are there."""
    task = Task(str(tmp_path), kind, steps=2, optimizer="sgd1", first_feature_zero=True)
    expected = torch.cat([g.flatten() for g in sharded.first_gradients(task, ranks.world_size)])
    assert int((expected == 0).sum()) >= 33, "there must be zeros"
    for result in ranks.run(sharded.train, task):
        step = records(result)[1]
        assert step.grad_abs_max == pytest.approx(float(expected.abs().max()), rel=1e-5)
        assert step.grad_min == pytest.approx(float(expected.min()), rel=1e-5)
        assert step.grad_max == pytest.approx(float(expected.max()), rel=1e-5)
        assert step.zero_count == int((expected == 0).sum())
        assert step.element_count == expected.numel()
        assert (step.nan_count, step.inf_count) == (0, 0)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(2, "fsdp2"), (3, "fsdp2"), (4, "hsdp"), (2, "sequence_parallel"), (4, "fsdp2+tp")],
    indirect=["ranks"],
)
def test_clean_runs_are_bit_identical(ranks: Ranks, kind: str, clip: float | None, tmp_path: Path) -> None:
    task = Task(str(tmp_path), kind, clip=clip, optimizer="fused_adamw", copies_at=(12,))
    without = ranks.run(sharded.train, dataclasses.replace(task, attach=False))
    attached = ranks.run(sharded.train, task)
    for left, right in zip(without, attached, strict=True):
        assert equal(left.copies[12], right.copies[12])
        assert all(record.action == "none" and record.applied for record in records(right).values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_bf16_shards_are_measured_and_left_alone(
    two_ranks: Ranks, clip: float | None, accumulate: int, tmp_path: Path
) -> None:
    """FSDP2 computes in bf16 and adds micro-steps up in float32."""
    task = Task(str(tmp_path), "fsdp2", 8, "fused_adamw", clip=clip, accumulate=accumulate, bf16=True, copies_at=(8,))
    without = two_ranks.run(sharded.train, dataclasses.replace(task, attach=False))
    attached = two_ranks.run(sharded.train, task)
    for left, right in zip(without, attached, strict=True):
        assert equal(left.copies[8], right.copies[8])
    expected = sharded.reference(task, 2)
    for rank, result in enumerate(attached):
        for step, (whole, local) in enumerate(expected, start=1):
            assert records(result)[step].grad_norm == pytest.approx(whole, rel=3e-2), "bf16 has 3 digits"
            assert records(result)[step].local_grad_norm == pytest.approx(local[rank], rel=3e-2)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", ["fused_adamw", "sgd"])
def test_a_scaler_over_shards(two_ranks: Ranks, optimizer: str, clip: float | None, tmp_path: Path) -> None:
    task = Task(str(tmp_path), "fsdp2", 12, optimizer, clip=clip, scaler=(7,), copies_at=(6, 7, 12))
    without = two_ranks.run(sharded.train, dataclasses.replace(task, attach=False))
    attached = two_ranks.run(sharded.train, task)
    expected = sharded.reference(dataclasses.replace(task, steps=6), 2)
    for rank, (left, right) in enumerate(zip(without, attached, strict=True)):
        assert equal(left.copies[12], right.copies[12])
        assert left.scale == right.scale
        assert equal(right.copies[6], right.copies[7]), "the scaler left step 7 out"
        written = records(right)
        assert [(s, r.action) for s, r in written.items() if r.reason != "healthy"] == [(7, "skip")]
        assert written[7].reason == "scaler_skip"
        for step, (whole, local) in enumerate(expected, start=1):
            assert written[step].grad_norm == pytest.approx(whole, rel=1e-5), "unscaled"
            assert written[step].local_grad_norm == pytest.approx(local[rank], rel=1e-5), "unscaled"


@pytest.mark.parametrize(
    ("ranks", "kind", "optimizer"),
    [
        (2, "fsdp2", "fused_adamw"),
        (2, "fsdp2", "adamw"),
        (2, "fsdp2", "sgd"),
        (4, "fsdp2", "adamw"),
        (4, "hsdp", "fused_adamw"),
        (4, "fsdp2+tp", "fused_adamw"),
        (4, "fsdp2+tp", "sgd"),
    ],
    indirect=["ranks"],
)
def test_a_nan_is_skipped_alike(ranks: Ranks, kind: str, optimizer: str, tmp_path: Path) -> None:
    nan = ((1, 10, 1, "up.weight"),)
    task = Task(str(tmp_path), kind, steps=14, optimizer=optimizer, nan=nan, copies_at=(9, 10, 11))
    results = ranks.run(sharded.train, task)
    for rank, result in enumerate(results):
        assert equal(result.copies[9], result.copies[10]), "parameters, moments and step counts must not move"
        assert not equal(result.copies[10][0], result.copies[11][0]), "and the next step must"
        step = records(result)[10]
        assert (step.action, step.reason, step.applied, step.parameter) == ("skip", "nonfinite", True, "up.weight")
        assert step.culprit_rank is not None
        assert data_rank(kind, step.culprit_rank, ranks.world_size) == 1
        assert step.nan_count in (1, 2), "one element, under tensor parallelism one of each half"
        mine = data_rank(kind, rank, ranks.world_size) == 1
        assert (step.local_nan_count > 0) == mine
        assert [s for s, r in records(result).items() if r.action != "none"] == [10]
    for result in results[1:]:
        assert equal(results[0].parameters, result.parameters)


@pytest.mark.parametrize(
    ("ranks", "kind", "optimizer", "clip"),
    [
        (2, "fsdp2", "fused_adamw", None),
        (2, "fsdp2", "fused_adamw", 100.0),
        (2, "fsdp2", "sgd", None),
        (2, "fsdp2", "sgd", 100.0),
        (4, "hsdp", "fused_adamw", 100.0),
        (4, "hsdp", "sgd", None),
    ],
    indirect=["ranks"],
)
def test_a_spike_is_rescaled_alike(ranks: Ranks, kind: str, optimizer: str, clip: float | None, tmp_path: Path) -> None:
    task = Task(str(tmp_path), kind, steps=24, optimizer=optimizer, clip=clip, spike=((1, 20),))
    results = ranks.run(sharded.train, task)
    before = sorted(math.log(records(results[0])[s].grad_norm) for s in range(1, 20))
    for result in results:
        step = records(result)[20]
        assert step.grad_norm > 10 * step.grad_norm_limit, "the spike must be one"
        assert (step.action, step.reason, step.culprit_rank) == ("rescale", "spike", 1)
        assert step.grad_norm_applied == pytest.approx(math.exp(before[9]), rel=1e-6), "to the running median"
        assert equal(results[0].parameters, result.parameters)


def test_a_rescaled_sharded_step_is_the_one_plain_torch_would_take(two_ranks: Ranks, tmp_path: Path) -> None:
    """SGD without momentum: the whole update is the rate times the gradient, so its norm is known."""
    task = Task(str(tmp_path), "fsdp2", steps=20, optimizer="sgd1", spike=((1, 20),), copies_at=(19, 20))
    results = two_ranks.run(sharded.train, task)
    square = 0.0
    for result in results:
        before, after = result.copies[19][0], result.copies[20][0]
        square += sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True))
    assert math.sqrt(square) == pytest.approx(1e-2 * records(results[0])[20].grad_norm_applied, rel=1e-3)


def gradmon_fails(task: Task) -> tuple[list[bool], list[str]]:
    result = sharded.train(task)
    assert result.journal is not None
    return [record.applied for _, record in result.journal.steps], [str(key) for key in result.journal.counters]


@pytest.mark.parametrize("kind", ["fsdp2", "sequence_parallel"])
def test_a_failure_on_one_rank_hangs_nobody(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """The rank that fails takes part in the collectives all the same; from then on all ranks watch."""
    (first, errors0), (second, errors1) = two_ranks.run(gradmon_fails, Task(str(tmp_path), kind, fail=((1, 10),)))
    assert first[:9] == second[:9] == [True] * 9
    assert first[-1] is second[-1] is False
    assert any("before_step" in error for error in errors1)
    assert not any("before_step" in error for error in errors0)


def collectives(task: Task) -> list[int]:
    """Of each step, torch's own included."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    original = sharded.loss_of
    mode: Any = None

    def counted(*args: Any) -> torch.Tensor:
        nonlocal mode
        if mode is not None:
            mode.__exit__(None, None, None)
            counts.append(mode.get_total_counts())
        mode = CommDebugMode()
        mode.__enter__()
        return original(*args)

    sharded.loss_of = counted
    try:
        sharded.train(task)
    finally:
        sharded.loss_of = original
        mode.__exit__(None, None, None)
    return counts


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor_parallel"])
def test_one_more_collective_per_step(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """And a second one, for minima and maxima of shards, in steps with full statistics."""
    task = Task(str(tmp_path), kind, steps=8, optimizer="sgd1", config={"measure": {"detail_every": 3}})
    for without, attached in zip(
        two_ranks.run(collectives, dataclasses.replace(task, attach=False)),
        two_ranks.run(collectives, task),
        strict=True,
    ):
        added = [b - a for a, b in zip(without, attached, strict=True)]
        extremes = 0 if kind == "ddp" else 1
        assert added[1:] == [1, 1 + extremes, 1, 1, 1 + extremes, 1]


# --- micro-steps -----------------------------------------------------------------------------------------------------

PARAMETERS = ["inner.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "head.weight", "head.bias"]


def faults(world: int) -> Iterator[tuple[int, tuple[int, int, int, str]]]:
    """Ten seeds: (seed, (rank, step, micro-step, parameter))."""
    for seed in range(10):
        draw = random.Random(seed)
        yield seed, (draw.randrange(world), draw.randint(2, 4), draw.randint(1, 3), draw.choice(PARAMETERS))


def found(records: dict[int, StepRecord]) -> list[tuple[Any, ...]]:
    return [(r.culprit_rank, r.step, r.micro_step, r.parameter) for r in records.values() if r.reason == "nonfinite"]


def ten_seeds(directory: str, kind: str, world: int, sync_each: bool) -> list[list[tuple[Any, ...]]]:
    every = []
    for seed, fault in faults(world):
        task = Task(directory, kind, steps=5, accumulate=3, sync_each=sync_each, nan=(fault,), seed=seed)
        every.append(found(records(sharded.train(task))))
    return every


@pytest.mark.parametrize(
    ("ranks", "kind", "sync_each"),
    [
        (2, "ddp", False),
        (2, "ddp", True),
        (3, "ddp", False),
        (2, "fsdp2", False),
        (2, "fsdp2", True),
        (3, "fsdp2", False),
        (4, "hsdp", False),
    ],
    indirect=["ranks"],
)
def test_all_ranks_name_rank_parameter_and_micro_step(ranks: Ranks, kind: str, sync_each: bool, tmp_path: Path) -> None:
    expected = [[fault] for _, fault in faults(ranks.world_size)]
    assert len({tuple(fault) for fault in map(tuple, expected)}) > 5, "the seeds must differ"
    for seen in ranks.run(ten_seeds, str(tmp_path), kind, ranks.world_size, sync_each):
        assert seen == expected


def test_one_process_names_parameter_and_micro_step(directory: Path) -> None:
    assert ten_seeds(str(directory), "single", 1, sync_each=False) == [[fault] for _, fault in faults(1)]


def test_micro_steps_can_be_switched_off(directory: Path) -> None:
    nan = ((0, 5, 2, "up.weight"),)
    task = Task(str(directory), "single", steps=6, accumulate=3, nan=nan, config={"measure": {"micro_steps": "off"}})
    (step,) = (r for r in records(sharded.train(task)).values() if r.reason == "nonfinite")
    assert (step.step, step.micro_step, step.parameter) == (5, None, "up.weight")


# --- what is only watched --------------------------------------------------------------------------------------------


def watched_only(directory: str, kind: str) -> tuple[str, list[str], bool]:
    import os

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    import gradmon

    os.environ["GRADMON_DIR"] = directory
    model: torch.nn.Module = toy.build()
    if kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    elif kind == "zero":
        model = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=1e-2)
    else:  # every pair of ranks trains a model of its own, as pipeline stages do
        pairs = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("stage", "data"))
        model = fully_shard(model, mesh=pairs["data"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradmon.attach(model, optimizer) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(4, toy.FEATURES)).square().mean().backward()
            optimizer.step()
        said = sorted(monitor._say._once)
        topology = str(monitor._topology)
    assert monitor.journal_path is not None
    view = read_journal(monitor.journal_path)
    assert len(view.steps) == 10
    return topology, said, any(record.applied for _, record in view.steps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ranks", "kind", "topology", "word"),
    [
        (2, "fsdp1", "unrecognised: FSDP1", "fully_shard (FSDP2)"),
        (2, "zero", "ddp: ZeroRedundancyOptimizer", "ZeroRedundancyOptimizer"),
        (4, "stages", "unrecognised: fsdp2: a device mesh holds 2 of 4 ranks", "pipeline"),
    ],
    indirect=["ranks"],
)
def test_what_is_not_recognised_is_watched(ranks: Ranks, kind: str, topology: str, word: str, tmp_path: Path) -> None:
    (found, said, acted), *others = ranks.run(watched_only, str(tmp_path), kind)
    assert found.startswith(topology)
    assert any(word in line for line in said), "and says so"
    assert not acted
    assert not any(other[2] for other in others)


def test_an_engine_with_a_clip_of_its_own_is_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    import gradmon

    class Engine(torch.nn.Linear):
        __module__ = "deepspeed.runtime.engine"

    model = Engine(toy.FEATURES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with caplog.at_level("INFO"), gradmon.attach(model, optimizer):
        pass
    assert "only watching, not acting: DeepSpeed" in caplog.text
    assert "gradient_clipping to 0" in caplog.text


def unequal_threads(task: Task) -> Result:
    torch.set_num_threads(1 + toy.rank())
    try:
        return sharded.train(task)
    finally:
        torch.set_num_threads(1)


def test_unequal_thread_counts_decide_alike_under_fsdp2(two_ranks: Ranks, tmp_path: Path) -> None:
    nan, spike = ((0, 12, 1, "up.weight"),), ((1, 20), (1, 23))
    results = two_ranks.run(unequal_threads, Task(str(tmp_path), "fsdp2", steps=24, nan=nan, spike=spike))
    first, second = (records(result) for result in results)
    assert [r.action for r in first.values()] == [r.action for r in second.values()]
    assert [r.action for r in first.values()].count("rescale") == 2
    assert [r.grad_norm for r in first.values() if r.step != 12] == [
        r.grad_norm for r in second.values() if r.step != 12
    ]
    assert equal(results[0].parameters, results[1].parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_no_accumulation(directory: Path, reentrant: bool) -> None:
    """Reentrant checkpointing runs a backward of its own for every block, inside the one backward of the step."""
    from torch.utils.checkpoint import checkpoint

    import gradmon

    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 9):
            optimizer.zero_grad()
            for micro in (1, 2):
                inputs = torch.randn(8, toy.FEATURES, requires_grad=True)
                x = inputs
                for block in (model[:3], model[3:5], model[5:]):
                    x = checkpoint(block, x, use_reentrant=reentrant)
                (x.square().mean() * (math.nan if (step, micro) == (6, 1) else 1.0)).backward()
            if step == 8:
                model[5].weight.grad[0, 0] = math.nan
            optimizer.step()
        watch = monitor._measurer._backwards
        assert watch is not None
        if not reentrant:
            assert watch.taken == 2
    assert monitor.journal_path is not None
    written = {made.step: made for _, made in read_journal(monitor.journal_path).steps}
    broken = {step: made.micro_step for step, made in written.items() if made.action == "skip"}
    assert broken == ({6: None, 8: None} if reentrant else {6: 1, 8: 2})
