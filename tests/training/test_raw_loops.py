"""Loops without a trainer: torchtitan's model parts, accumulation under a scaler, torch.compile in every place."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import raw_runs
import sharded
import torch
from ranks import Ranks
from raw_runs import BROKEN, STEPS
from toy import equal

#: What dynamo and DTensor themselves warn of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """As many as the test's parameter says."""
    found: Ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[request.param])
    return found


KINDS = [
    (2, "parts", "fsdp2", 0.05),
    (2, "compiled ddp and step", "ddp", 0.05),
    (4, "parts, hsdp", "hsdp", 0.05),
    (2, "parts, compiled", "fsdp2", 0.05),
    (2, "ddp of compiled", "ddp", 0.05),
    (2, "ddp of compiled in place", "ddp", None),
]


@pytest.mark.parametrize(("ranks", "kind", "topology", "clip"), KINDS, indirect=["ranks"])
def test_a_nan_on_one_rank_costs_that_step_only(
    ranks: Ranks, kind: str, topology: str, clip: float | None, tmp_path: Path
) -> None:
    """Weights and states are, bit for bit, those of a loop without gradmon that leaves the step out by itself."""
    if kind.startswith("parts") and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch can't run FSDP2 on CPU (2.6 can't)")
    without = ranks.run(raw_runs.train, str(tmp_path), kind, clip, False)
    attached = ranks.run(raw_runs.train, str(tmp_path), kind, clip, True)
    task = sharded.Task("", "ddp", steps=BROKEN - 1, clip=clip)
    task = dataclasses.replace(task, optimizer="fused_adamw")
    expected = sharded.reference(task, ranks.world_size)
    for plain, watched in zip(without, attached, strict=True):
        assert watched.topology == topology
        assert watched.names[:2] == ["inner.weight", "inner.bias"], "as in the whole model"
        assert len(watched.names) == len(set(watched.names)) == 10
        assert equal(watched.before, plain.before), "until the first intervention"
        assert equal(watched.after, watched.before), "the step is skipped on every rank, in every part"
        assert equal(watched.end, plain.end), "and goes on from there"
        assert not equal(watched.end[0], watched.after[0])
        check_records(watched, expected, clip)


def check_records(run: raw_runs.Raw, expected: list[tuple[float, list[float]]], clip: float | None) -> None:
    assert run.journal is not None
    assert not [key for key, count in run.journal.counters.items() if "errors" in key[0] and count]
    records = {record.step: record for _, record in run.journal.steps}
    assert list(records) == list(range(1, STEPS + 1)), "one step for all optimizers"
    assert {s: (r.action, r.culprit_rank) for s, r in records.items() if r.action != "none"} == {BROKEN: ("skip", 1)}
    assert records[BROKEN].applied
    for record, (norm, local) in zip(records.values(), expected, strict=False):
        assert record.grad_norm == pytest.approx(norm, rel=1e-4), "of all parts on all ranks, before the clip"
        assert record.local_grad_norm_max == pytest.approx(max(local), rel=1e-4)
        if clip is not None:
            assert norm > clip, "the script's clip must have something to do"
            assert record.grad_norm_applied == pytest.approx(clip, rel=1e-3)
    for record, logged in zip(records.values(), run.norms, strict=False):
        assert record.grad_norm == pytest.approx(logged, rel=1e-5, nan_ok=True), "what the script itself logs"


@pytest.mark.parametrize("optimizer", ["fused_adamw", "sgd"])
def test_a_scaler_with_accumulation_under_ddp(two_ranks: Ranks, optimizer: str, tmp_path: Path) -> None:
    """The first of two micro-steps is not averaged. An Inf and then a NaN: the scaler leaves both steps out itself."""
    task = sharded.Task(
        str(tmp_path), "ddp", optimizer=optimizer, accumulate=2, clip=0.05, scaler=(8,), nan=((1, 10, 1, "up.weight"),),
        copies_at=(9, 10, 12),
    )  # fmt: skip
    without = two_ranks.run(sharded.train, dataclasses.replace(task, attach=False))
    attached = two_ranks.run(sharded.train, task)
    expected = sharded.reference(dataclasses.replace(task, steps=7), 2)
    for rank, (plain, watched) in enumerate(zip(without, attached, strict=True)):
        assert equal(watched.copies, plain.copies), "bit for bit, in every step"
        assert equal(watched.copies[9], watched.copies[10])
        assert not equal(watched.copies[10], watched.copies[12])
        assert watched.scale == plain.scale, "the scaler's own course is the same"
        assert watched.journal is not None
        assert not [key for key, count in watched.journal.counters.items() if "errors" in key[0] and count]
        records = {record.step: record for _, record in watched.journal.steps}
        assert {s: (r.action, r.reason) for s, r in records.items() if r.action != "none"} == {
            8: ("skip", "scaler_skip"), 10: ("skip", "scaler_skip"),
        }  # fmt: skip
        for step, (norm, local) in enumerate(expected, start=1):
            assert records[step].grad_norm == pytest.approx(norm, rel=1e-5), "unscaled, of both micro-steps"
            assert records[step].local_grad_norm == pytest.approx(local[rank], rel=1e-5)
            assert records[step].grad_norm_applied == pytest.approx(0.05, rel=1e-3)


def test_tensor_parallelism_alone_is_left_bit_identical_and_guarded(two_ranks: Ranks, tmp_path: Path) -> None:
    """Plain parameters beside DTensors; both ranks work on one batch, so both hold the NaN, each of its own half."""
    task = sharded.Task(str(tmp_path), "tensor_parallel", optimizer="sgd1", copies_at=(9, 10, 12))
    without = two_ranks.run(sharded.train, dataclasses.replace(task, attach=False))
    attached = two_ranks.run(sharded.train, task)
    broken = two_ranks.run(sharded.train, dataclasses.replace(task, nan=((0, 10, 1, "up.weight"),)))
    for plain, watched, skipped in zip(without, attached, broken, strict=True):
        assert watched.kind == "tensor_parallel"
        assert equal(watched.copies, plain.copies)
        assert equal(skipped.copies[9], plain.copies[9])
        assert equal(skipped.copies[10], skipped.copies[9])
        assert not equal(skipped.copies[12], skipped.copies[10])
        assert all(torch.isfinite(p).all() for p in skipped.parameters)
        assert [r.step for _, r in skipped.journal.steps if r.action == "skip"] == [10]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed here; tests/versions.py has it")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_is_watched_and_left_alone(stage: int, tmp_path: Path) -> None:
    """Its engine skips the step with the NaN itself, on all ranks; its optimizer steps flat copies of the weights."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_", "MASTER_"))}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1", "GRADMON_AGENT": "off"}
    environment["GRADMON_DIR"] = str(tmp_path / "journals")
    script = Path(__file__).with_name("raw_deepspeed.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    told: dict[str, list[Any]] = {}
    for how in ("plain", "attach"):
        command = [*torchrun, str(stage), how, str(tmp_path / how)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        told[how] = [json.loads((tmp_path / f"{how}.{rank}").read_text()) for rank in range(2)]
    for plain, watched in zip(told["plain"], told["attach"], strict=True):
        assert len(plain["weights"]) == 24 * 32 + 32 + 32 + 1
        assert watched["weights"] == plain["weights"]
        assert all(map(math.isfinite, watched["weights"]))
        assert watched["topology"].startswith("unrecognised: DeepSpeed clips and steps by itself")
        if stage < 3:
            assert watched["names"] == ["stepped.0"], "one flat tensor, of this rank"
        assert watched["steps"] == [[step, "none", False] for step in range(1, 10)], "the engine's own skip is no step"
        assert not watched["errors"]
