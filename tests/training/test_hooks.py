"""Beside a communication hook of the script's, registered before gradmon or after it, against plain torch."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from ranks import Ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from toy import equal

import gradmon
from gradmon.journal import read_journal
from gradmon.record import StepRecord


def register(model: DistributedDataParallel, kind: str) -> None:
    if kind == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif kind == "builtin":
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    elif kind == "powersgd":
        state = powerSGD_hook.PowerSGDState(dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=4)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif kind == "local":  # as local SGD: nothing is averaged, so every rank has a gradient of its own
        model.register_comm_hook(None, _nothing)


def _nothing(_state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with types, not with text
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def train(
    directory: str, kind: str, when: str, broken: tuple[int, int] | None = None, options: dict[str, Any] | None = None
) -> tuple[list[torch.Tensor], list[StepRecord], list[tuple[float, float]]]:
    """`when` is "never" (no gradmon), "before" or "after" attach. `broken` is (rank, step)."""
    os.environ["GRADMON_DIR"] = directory
    options = dict(options or {})
    accumulate = options.pop("accumulate", 1)
    inner = toy.build()
    model = DistributedDataParallel(inner, **options)
    optimizer = toy.optimizer_for("sgd", model.parameters())
    if when != "after":
        register(model, kind)
    monitor = gradmon.attach(model, optimizer) if when != "never" else None
    if when == "after":
        register(model, kind)
    generator = torch.Generator().manual_seed(toy.rank())
    norms = []
    for step in range(1, 16):
        optimizer.zero_grad()
        local = torch.zeros(())
        for micro in range(1, accumulate + 1):
            inputs = torch.randn(8, toy.FEATURES, generator=generator)
            if broken == (toy.rank(), step) and micro == accumulate:
                inputs[0, 0] = math.nan
            local = local + toy.reference_norms(model, inputs, inputs.sum(1, keepdim=True) * 0.1, 1.0)
            model.require_backward_grad_sync = micro == accumulate
            (model(inputs) - inputs.sum(1, keepdim=True) * 0.1).square().mean().backward()
        whole = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        norms.append((float(local.norm()), whole))
        optimizer.step()
    records = []
    if monitor is not None:
        monitor.detach()
        assert monitor.journal_path is not None
        view = read_journal(monitor.journal_path)
        assert not [key for key, count in view.counters.items() if "errors" in key[0] and count]
        records = [made for _, made in view.steps]
    return [p.detach().clone() for p in inner.parameters()], records, norms


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["fp16", "powersgd", "builtin"])
def test_the_scripts_hook_averages_and_gradmon_measures(
    two_ranks: Ranks, kind: str, when: str, accumulate: int, tmp_path: Path
) -> None:
    options = {"accumulate": accumulate}
    without = two_ranks.run(train, str(tmp_path), kind, "never", None, options)
    attached = two_ranks.run(train, str(tmp_path), kind, when, None, options)
    for rank, ((plain, _, _), (parameters, records, norms)) in enumerate(zip(without, attached, strict=True)):
        assert equal(plain, parameters), "bit for bit"
        assert [r.reason for r in records] == ["healthy"] * 15
        assert all(r.applied for r in records)
        for record, (local, whole) in zip(records, norms, strict=True):
            assert record.local_grad_norm == pytest.approx(local, rel=1e-5)
            assert record.grad_norm == pytest.approx(whole, rel=1e-5)
            others = [norm[record.step - 1][0] for *_, norm in attached]
            assert record.local_grad_norm_max == pytest.approx(max(others), rel=1e-5), f"rank {rank} knows all"


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_nan_beside_the_scripts_hook_is_skipped_alike(
    two_ranks: Ranks, when: str, views: bool, tmp_path: Path
) -> None:
    options = {"gradient_as_bucket_view": views}
    results = two_ranks.run(train, str(tmp_path), "fp16", when, (1, 10), options)
    for parameters, records, norms in results:
        assert math.isnan(norms[9][1])
        assert equal(results[0][0], parameters)
        assert all(p.isfinite().all() for p in parameters)
        (step,) = (r for r in records if r.action != "none")
        assert (step.step, step.action, step.culprit_rank, step.applied) == (10, "skip", 1, True)
        assert step.parameter in ("5.weight", "5.bias")


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_that_differ_by_rank_are_judged_alike(two_ranks: Ranks, when: str, tmp_path: Path) -> None:
    """A hook may average over a part of the ranks: then the worst of all norms decides, on every rank."""
    results = two_ranks.run(train, str(tmp_path), "local", when, (1, 10))
    for parameters, records, _ in results:
        assert all(p.isfinite().all() for p in parameters)
        assert [r.action for r in records] == ["none"] * 9 + ["skip"] + ["none"] * 5
        for record in records[:9]:
            assert record.grad_norm == pytest.approx(max(norm[record.step - 1][1] for *_, norm in results), rel=1e-5)
    assert not equal(results[0][0], results[1][0]), "the hook must not have averaged"
    assert math.isfinite(results[0][2][9][1]), "rank 0 saw no NaN in step 10"


def registered_while_attached(directory: str) -> tuple[bool, bool, str, bool]:
    """After detach the hook goes on, DDP's methods are its own again, and a second registration is DDP's error."""
    os.environ["GRADMON_DIR"] = directory
    own = DistributedDataParallel.register_comm_hook

    def run(attached: bool) -> tuple[list[torch.Tensor], str, bool]:
        model = DistributedDataParallel(toy.build())
        optimizer = toy.optimizer_for("sgd", model.parameters())
        monitor = gradmon.attach(model, optimizer) if attached else None
        register(model, "fp16")
        error = ""
        try:
            register(model, "fp16")
        except RuntimeError as raised:
            error = str(raised)
        if monitor is not None:
            monitor.detach()
        generator = torch.Generator().manual_seed(toy.rank())
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, toy.FEATURES, generator=generator)).square().mean().backward()
            optimizer.step()
        return (
            [p.detach().clone() for p in model.parameters()],
            error,
            DistributedDataParallel.register_comm_hook is own,
        )

    (plain, error, _), (parameters, ours, restored) = run(False), run(True)
    return equal(plain, parameters), restored, ours, "only be called once" in error


def test_a_hook_registered_while_attached_goes_on_after_detach(two_ranks: Ranks, tmp_path: Path) -> None:
    for same, restored, error, as_ddp in two_ranks.run(registered_while_attached, str(tmp_path)):
        assert same
        assert restored
        assert as_ddp
        assert "only be called once" in error


def bad_hook(directory: str) -> str:
    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    optimizer = toy.optimizer_for("sgd", model.parameters())
    with gradmon.attach(model, optimizer):
        try:
            model.register_comm_hook(None, "no function")  # type: ignore[arg-type]
        except TypeError as raised:
            return str(raised)
    return ""


def test_what_is_no_hook_is_ddps_error(two_ranks: Ranks, tmp_path: Path) -> None:
    assert all("callable" in error for error in two_ranks.run(bad_hook, str(tmp_path)))


class Uneven(nn.Module):
    """A frozen parameter, one that no forward uses, and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(toy.FEATURES, 16)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.last.weight
        self.frozen.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.tied(torch.tanh(self.last(self.frozen(torch.tanh(self.first(inputs))))))


def uneven(directory: str, options: dict[str, Any], attached: bool) -> tuple[list[torch.Tensor], list[Any], list[Any]]:
    os.environ["GRADMON_DIR"] = directory
    inner = Uneven()
    model = DistributedDataParallel(inner, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    monitor = gradmon.attach(model, optimizer) if attached else None
    generator = torch.Generator().manual_seed(toy.rank())
    norms = []
    for step in range(12):
        optimizer.zero_grad()
        inputs = torch.randn(8, toy.FEATURES, generator=generator)
        used = [p for n, p in inner.named_parameters() if p.requires_grad and "unused" not in n]
        own = torch.cat([g.flatten() for g in torch.autograd.grad(inner(inputs).square().mean(), used)]).double()
        loss = model(inputs).square().mean() * (math.nan if (step, toy.rank()) == (10, 1) else 1)
        loss.backward()
        mean = own.clone()
        dist.all_reduce(mean)
        norms.append((float(own.norm()), float(mean.norm()) / dist.get_world_size()))
        optimizer.step()
    records = []
    if monitor is not None:
        monitor.detach()
        assert monitor.journal_path is not None
        records = [
            (r.local_grad_norm, r.grad_norm, r.action, r.culprit_rank)
            for _, r in read_journal(monitor.journal_path).steps
        ]
    return [p.detach().clone() for p in inner.parameters()], records, norms


@pytest.mark.parametrize(
    "options",
    [
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ],
    ids=lambda o: "+".join(o),
)
def test_unused_frozen_and_tied_parameters(two_ranks: Ranks, options: dict[str, Any], tmp_path: Path) -> None:
    """A tied weight is counted once; what has no gradient is not in the norm."""
    plain = two_ranks.run(uneven, str(tmp_path), options, False)
    attached = two_ranks.run(uneven, str(tmp_path), options, True)
    assert any(p.isnan().any() for p in plain[0][0]), "without gradmon the NaN must reach the weights"
    for parameters, records, norms in attached:
        assert all(p.isfinite().all() for p in parameters)
        assert equal(attached[0][0], parameters)
        assert len(records) == 12
        for step, ((local, whole, action, culprit), (own, mean)) in enumerate(zip(records, norms, strict=True)):
            if step == 10:
                assert (action, culprit) == ("skip", 1)
            else:
                assert action == "none"
                assert local == pytest.approx(own, rel=1e-5)
                assert whole == pytest.approx(mean, rel=1e-5)


def copied(directory: str) -> bool:
    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    with gradmon.attach(model, toy.optimizer_for("sgd", model.parameters())):
        register(model, "fp16")
        other = copy.deepcopy(model)
        other(torch.randn(4, toy.FEATURES)).square().mean().backward()
        return all(p.grad is not None for p in other.parameters())


def test_a_model_with_both_hooks_can_be_copied(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(copied, str(tmp_path)) == [True, True]
