"""What an attack on the measuring has found: each once went wrong, hung, or named the wrong one."""

from __future__ import annotations

import gc
import logging
import math
import os
import sqlite3
import weakref
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist
import toy
from ranks import Ranks
from sharded import Task
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from toy import equal

import gradmon
from gradmon.journal import JournalView, read_journal
from gradmon.record import DETAIL_COLUMNS, StepRecord


def view_of(monitor: gradmon.Monitor) -> JournalView:
    assert monitor.journal_path is not None
    return read_journal(monitor.journal_path)


def errors_of(view: JournalView) -> dict[str, float]:
    return {key[1][0]: count for key, count in view.counters.items() if "errors" in key[0] and count}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2)


def backward(model: nn.Module, weight: float = 1.0) -> None:
    inputs = torch.randn(8, toy.FEATURES, dtype=next(model.parameters()).dtype)
    (model(inputs).square().mean() * weight).backward()


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.bfloat16])
def test_measuring_updates_writes_to_no_weight(directory: Path, dtype: torch.dtype) -> None:
    """`double()` of a float64 tensor is the tensor itself."""

    def run(attached: bool) -> torch.Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(50, 40, dtype=dtype))
        holder = nn.ParameterDict({"weight": weight})
        optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
        config = {"measure": {"updates_every": 1}}
        monitor = gradmon.attach(holder, optimizer, config=config) if attached else None
        for _ in range(3):
            weight.grad = torch.randn(50, 40, dtype=dtype)
            optimizer.step()
        if monitor is not None:
            monitor.detach()
            assert all(made.update_ratio is not None for _, made in view_of(monitor).steps)
        return weight.detach().clone()

    assert equal(run(False), run(True))


def hand_written_clip(directory: str) -> tuple[list[torch.Tensor], list[tuple[int, str]]]:
    """Each optimizer's gradients are scaled just before its own step; a NaN on rank 1."""
    os.environ["GRADMON_DIR"] = directory
    inner = toy.build()
    model = DistributedDataParallel(inner) if dist.is_initialized() else inner
    listed = list(inner.parameters())
    optimizers = [torch.optim.SGD(listed[:4], lr=1e-2), torch.optim.SGD(listed[4:], lr=1e-2)]
    torch.manual_seed(toy.rank())
    with gradmon.attach(model, optimizers) as monitor:
        for step in range(1, 13):
            model.zero_grad()
            backward(model, math.nan if step == 10 and toy.rank() == dist_last() else 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad.mul_(0.5)
                optimizer.step()
    return [p.detach().clone() for p in listed], [(r.step, r.action) for _, r in view_of(monitor).steps]


def dist_last() -> int:
    return dist.get_world_size() - 1 if dist.is_initialized() else 0


def test_a_hand_written_clip_between_two_optimizers(two_ranks: Ranks, directory: Path) -> None:
    """One verdict for both: the second must not step into what the first was kept from."""
    for parameters, seen in (hand_written_clip(str(directory)), *two_ranks.run(hand_written_clip, str(directory))):
        assert all(p.isfinite().all() for p in parameters)
        assert seen == [(step, "skip" if step == 10 else "none") for step in range(1, 13)]


def frozen_when_wrapped(directory: str) -> tuple[list[torch.Tensor], list[str]]:
    os.environ["GRADMON_DIR"] = directory
    inner = toy.build()
    inner[0].weight.requires_grad_(False)
    model = DistributedDataParallel(inner)
    optimizer = sgd(model)
    torch.manual_seed(toy.rank())
    with gradmon.attach(model, optimizer) as monitor:
        inner[0].weight.requires_grad_(True)  # DDP will never average it
        for step in range(1, 13):
            model.zero_grad()
            backward(model)
            if step == 10 and toy.rank() == 1:
                inner[0].weight.grad[0, 0] = math.nan
            optimizer.step()
    averaged = [p.detach().clone() for p in inner.parameters() if p is not inner[0].weight]
    return averaged, [made.action for _, made in view_of(monitor).steps]


def test_a_parameter_that_ddp_does_not_average_decides_nothing(two_ranks: Ranks, tmp_path: Path) -> None:
    (_, first), (_, second) = two_ranks.run(frozen_when_wrapped, str(tmp_path))
    assert first[:10] == second[:10] == ["none"] * 10, "one rank alone must not skip"
    assert first == second, "what the NaN does to the rank's own loss afterwards is seen by both"


# --- hangs -----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each forward uses one of many; ranks use others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(toy.FEATURES, 1, bias=False) for _ in range(24))

    def forward(self, inputs: torch.Tensor, which: int) -> torch.Tensor:
        return self.experts[which](inputs)


def experts(directory: str) -> tuple[list[torch.Tensor], list[str]]:
    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(Experts(), find_unused_parameters=True)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizer = sgd(model)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 13):
            optimizer.zero_grad()
            which = (2 * step + 11 * toy.rank()) % 24
            (model(torch.randn(8, toy.FEATURES), which).square().mean()).backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], [made.reason for _, made in view_of(monitor).steps]


def test_unused_parameters_that_differ_by_rank_beside_the_scripts_hook(two_ranks: Ranks, tmp_path: Path) -> None:
    (left, first), (right, second) = two_ranks.run(experts, str(tmp_path))
    assert equal(left, right)
    assert first == second == ["healthy"] * 12


class _Angry(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter of the script's")


def fails_somewhere(directory: str, what: str) -> tuple[dict[str, float], list[StepRecord]]:
    """On rank 1 something of gradmon's raises once; then training must go on, with collectives in step."""
    kind = "sequence_parallel" if what == "clip" else "fsdp2"
    clip = 0.05 if what == "clip" else None
    nan = ((0, 5, 1, "up.weight"),) if what == "log" else ()
    logger = logging.getLogger("gradmon")
    angry = _Angry()
    if what == "log":
        logger.addFilter(angry)
    undo: Callable[[], None] = lambda: None  # noqa: E731
    if toy.rank() == 1 and what in ("updates", "clip", "rows"):
        undo = _break_once(what)
    try:
        config = {"measure": {"detail_every": 4, "updates_every": 3}}
        task = Task(directory, kind, 12, "sgd1", clip=clip, nan=nan, config=config)
        result = sharded.train(task)
    finally:
        undo()
        logger.removeFilter(angry)
    assert result.journal is not None
    return errors_of(result.journal), [made for _, made in result.journal.steps]


def _break_once(what: str) -> Callable[[], None]:
    from gradmon import measuring, monitor

    owner: Any
    name = {"updates": "UpdateSample", "clip": "measure", "rows": "_rows_of_backward"}[what]
    owner = monitor if what == "updates" else measuring.Measurer
    original, calls = getattr(owner, name), iter(range(1, 10_000))

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("made up")
        return original(*args, **kwargs)

    setattr(owner, name, breaks)
    return lambda: setattr(owner, name, original)


@pytest.mark.parametrize(("what", "acts_on"), [("log", True), ("updates", True), ("clip", False), ("rows", False)])
def test_whatever_fails_on_one_rank_nobody_waits(two_ranks: Ranks, what: str, acts_on: bool, tmp_path: Path) -> None:
    (none, first), (errors, second) = two_ranks.run(fails_somewhere, str(tmp_path), what)
    assert not none
    assert bool(errors) == (what != "log")
    assert [r.step for r in first] == [r.step for r in second] == list(range(1, 13))
    assert [(r.action, r.reason, r.applied) for r in first] == [(r.action, r.reason, r.applied) for r in second]
    assert first[-1].applied == acts_on, "a failure that may have made ranks differ ends the acting, on both alike"


def unequal_and_failing(directory: str) -> tuple[list[str], list[torch.Tensor]]:
    """Thread counts differ, gradmon fails on rank 1 in step 10, and a spike comes in step 11."""
    torch.set_num_threads(1 + toy.rank())
    try:
        task = Task(directory, "ddp", 14, "sgd1", spike=((0, 11),), fail=((1, 10),))
        result = sharded.train(task)
    finally:
        torch.set_num_threads(1)
    assert result.journal is not None
    return [made.action for _, made in result.journal.steps if made.applied], result.parameters


def test_after_a_failure_the_next_step_is_left_alone_by_all(two_ranks: Ranks, tmp_path: Path) -> None:
    """The rank that failed has learnt one norm less: its limits are others."""
    (first, left), (second, right) = two_ranks.run(unequal_and_failing, str(tmp_path))
    assert equal(left, right), "replicas stay equal"
    assert first == second
    assert "rescale" not in first


# --- what is left behind ---------------------------------------------------------------------------------------------


def leaves_nothing(directory: str) -> list[bool]:
    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    optimizer = sgd(model)
    monitor = gradmon.attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    monitor.detach()
    alive = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(monitor)]
    del model, optimizer, monitor
    gc.collect()
    return [reference() is not None for reference in alive]


def test_a_detached_model_can_be_freed(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(leaves_nothing, str(tmp_path)) == [[False] * 3] * 2


# --- the wrong one named ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "broken", "expected"),
    [
        ([4, 4], (1, 1), None),  # in the first step nobody knew yet that there would be four
        ([4, 4, 4], (3, 3), 3),
        ([4, 2, 4], (3, 3), None),  # after a short step the third of four was taken for a step's last
    ],
)
def test_a_micro_step_is_named_only_where_all_before_it_were_measured(
    directory: Path, plan: list[int], broken: tuple[int, int], expected: int | None
) -> None:
    model = toy.build()
    optimizer = sgd(model)
    with gradmon.attach(model, optimizer) as monitor:
        for step, micros in enumerate(plan, start=1):
            optimizer.zero_grad()
            for micro in range(1, micros + 1):
                backward(model, math.nan if (step, micro) == broken else 1.0)
            optimizer.step()
    (found,) = (made for _, made in view_of(monitor).steps if made.action == "skip")
    assert (found.step, found.micro_step) == (broken[0], expected)


def thrown_away(directory: str, kind: str) -> list[tuple[Any, ...]]:
    """In step 6 rank 1 has a NaN and the script leaves the step out; in step 9 rank 0 has one."""
    os.environ["GRADMON_DIR"] = directory
    task = Task(directory, kind)
    model = sharded.spread(sharded.build(), kind)
    optimizer = sgd(model)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 12):
            optimizer.zero_grad()
            weight = math.nan if (step, toy.rank()) in ((6, 1), (9, 0)) else 1.0
            (sharded.loss_of(model, task, toy.rank(), step, 1) * weight).backward()
            if step != 6:
                optimizer.step()
    return [
        (made.step, made.action, made.culprit_rank, made.local_nan_count > 0, made.healthy_ranks)
        for _, made in view_of(monitor).steps
    ]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_the_script_threw_away_is_nobodys_fault_later(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    for rank, seen in enumerate(two_ranks.run(thrown_away, str(tmp_path), kind)):
        broken = [(8, "skip", 0, rank == 0, 1)]
        assert seen == [
            *((s, "none", None, False, 2) for s in range(1, 8)),
            *broken,
            *((s, "none", None, False, 2) for s in (9, 10)),
        ]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_a_scaler_that_steps_two_optimizers(directory: Path, clip: bool) -> None:
    """It unscales them one after the other, so at the first step the second's gradients still carry the scale."""
    model = toy.build()
    listed = list(model.parameters())
    optimizers = [torch.optim.SGD(listed[:4], lr=1e-2), torch.optim.SGD(listed[4:], lr=1e-2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    expected = []
    with gradmon.attach(model, optimizers) as monitor:
        for _ in range(10):
            model.zero_grad()
            inputs = torch.randn(8, toy.FEATURES)
            own = torch.autograd.grad(model(inputs).square().mean(), listed)
            expected.append(math.sqrt(sum(float(g.double().square().sum()) for g in own)))
            scaler.scale(model(inputs).square().mean()).backward()
            if clip:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(listed, 0.1)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    view = view_of(monitor)
    assert not errors_of(view)
    assert [r.grad_norm for _, r in view.steps] == pytest.approx(expected, rel=1e-5)
    assert all(r.action == "none" for _, r in view.steps)


@pytest.mark.parametrize("when", ["before", "after"])
def test_losses_belong_to_their_step_after_a_resume(directory: Path, when: str) -> None:
    model = toy.build()
    optimizer = sgd(model)

    def train(monitor: gradmon.Monitor, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model)
            if when == "before":
                monitor.observe(loss=float(step))
            optimizer.step()
            if when == "after":
                monitor.observe(loss=float(step))

    with gradmon.attach(model, optimizer) as monitor:
        train(monitor, range(1, 4))
        state = monitor.state_dict()
    with gradmon.attach(model, optimizer) as monitor:
        monitor.load_state_dict(state)
        train(monitor, range(4, 9))
    assert [(r.step, r.loss) for _, r in view_of(monitor).steps] == [(s, float(s)) for s in range(4, 9)]


def dtensor_losses(directory: str) -> tuple[list[float | None], dict[str, float], bool]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    optimizer = sgd(model)
    mesh = init_device_mesh("cpu", (2,))
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 5):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            kind = Replicate() if step < 4 else Partial()
            monitor.observe(loss=DTensor.from_local(torch.tensor(float(step)), mesh, [kind]))
        said = any("left out" in line for line in monitor._say._once)
    view = view_of(monitor)
    return [made.loss for _, made in view.steps], errors_of(view), said


def test_a_loss_that_is_a_dtensor(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(dtensor_losses, str(tmp_path)) == [([1.0, 2.0, 3.0, None], {}, True)] * 2


def test_replaced_parameters_are_watched(directory: Path) -> None:
    model = toy.build()
    optimizer = sgd(model)
    with gradmon.attach(model, optimizer) as monitor:
        old = weakref.ref(model[5].weight)
        for step in range(1, 12):
            if step == 5:
                model[5].weight = nn.Parameter(model[5].weight.detach().clone())
                optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            backward(model)
            if step == 9:
                model[5].weight.grad[0, 0] = math.nan
            optimizer.step()
        gc.collect()
        assert old() is None, "the old one can be freed"
    assert all(p.isfinite().all() for p in model.parameters())
    assert [made.step for _, made in view_of(monitor).steps if made.action == "skip"] == [9]


def test_a_default_device_does_not_matter(directory: Path) -> None:
    """`meta` stands in for a GPU: tensors made without a device would be nowhere."""
    model = toy.build()
    optimizer = sgd(model)
    torch.set_default_device("meta")
    try:
        with gradmon.attach(model, optimizer) as monitor:
            for _ in range(12):
                optimizer.zero_grad()
                model(torch.randn(8, toy.FEATURES, device="cpu")).square().mean().backward()
                optimizer.step()
                monitor.observe(loss=1.0)
        view = view_of(monitor)
    finally:
        torch.set_default_device(None)
    assert not errors_of(view)
    assert [(made.reason, made.loss) for _, made in view.steps] == [("healthy", 1.0)] * 12


def test_several_devices_cost_no_record(directory: Path) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, device="meta")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradmon.attach(model, optimizer, config={"measure": {"updates_every": 1}}) as monitor:
        assert "several devices" in str(monitor._topology)
        for _ in range(3):
            model[0](torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
    assert len(view_of(monitor).steps) == 3


def python_reducer(directory: str) -> tuple[str, bool]:
    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    model._use_python_reducer = True  # what optimize_ddp="python_reducer" sets
    with gradmon.attach(model, sgd(model)) as monitor:
        return str(monitor._topology), bool(model._comm_hooks)


def test_the_python_reducer_is_watched_only(two_ranks: Ranks, tmp_path: Path) -> None:
    for topology, hooked in two_ranks.run(python_reducer, str(tmp_path)):
        assert topology.startswith("ddp: compiled autograd averages")
        assert not hooked


# --- details of a broken step ----------------------------------------------------------------------------------------


def tables(path: Path, step: int) -> dict[str, list[list[float]]]:
    """Place -> [P][8] of the details written for a step."""
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT place, stats FROM details WHERE step = ?", (step,)).fetchall()
    width = len(DETAIL_COLUMNS)
    made = {}
    for place, values in found:
        flat = array("d", values).tolist()
        made[place] = [flat[i : i + width] for i in range(0, len(flat), width)]
    return made


def spike_under_a_scaler(directory: str, kind: str) -> tuple[StepRecord, dict[str, list[list[float]]]]:
    """Step 11 is off the cadence of full statistics; `up.bias` is frozen, and so without a gradient."""
    os.environ["GRADMON_DIR"] = directory
    inner = sharded.build()
    inner.up.bias.requires_grad_(False)
    task = Task(directory, kind, spike=((1, 11),))
    model = sharded.spread(inner, kind)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 13):
            optimizer.zero_grad()
            scaler.scale(sharded.loss_of(model, task, toy.rank(), step, 1)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.journal_path is not None
    (record,) = (made for _, made in view_of(monitor).steps if made.step == 11)
    return record, tables(monitor.journal_path, 11)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_details_of_a_spike_are_unscaled_and_of_all_ranks(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    names = [name for name, _ in sharded.build().named_parameters()]
    frozen = names.index("up.bias")
    for rank, (record, found) in enumerate(two_ranks.run(spike_under_a_scaler, str(tmp_path), kind)):
        assert (record.reason, record.culprit_rank) == ("spike", 1)
        assert set(found) == ({"global", "local"} if rank == 0 else {"local"})
        for place, norm in (("local", record.local_grad_norm), ("global", record.grad_norm)):
            rows = found.get(place)
            if rows is None:
                continue
            watched = [row for i, row in enumerate(rows) if i != frozen] if len(rows) == len(names) else rows
            assert norm is not None
            assert math.sqrt(sum(row[0] for row in watched)) == pytest.approx(norm, rel=1e-5)
            if len(rows) == len(names):
                assert all(map(math.isnan, rows[frozen])), "a row of NaN is a parameter without a gradient"
        if rank == 0 and kind == "fsdp2":
            assert all(math.isnan(value) for row in found["global"] for value in row[4:7]), "not this rank's shards'"
