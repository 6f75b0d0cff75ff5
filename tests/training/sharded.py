"""One small model, sharded in every way, and the same training by plain torch in one process to compare with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gradmon
from gradmon.journal import JournalView, read_journal

BATCH = 8
#: Every parameter becomes a DTensor; the norm works on a part of the batch, which leaves partial gradients behind.
SEQUENCE_PLAN = {
    "inner": ColwiseParallel(output_layouts=Shard(0), use_local_output=False),
    "norm": SequenceParallel(sequence_dim=0),
    "up": ColwiseParallel(input_layouts=Shard(0)),
    "down": RowwiseParallel(),
    "head": RowwiseParallel(input_layouts=Replicate()),
}


@dataclass(frozen=True)
class Task:
    """What to train, how it is spread over the ranks, and what goes wrong."""

    directory: str
    kind: str
    steps: int = 12
    optimizer: str = "sgd"
    attach: bool = True
    clip: float | None = None
    accumulate: int = 1
    sync_each: bool = False
    """With accumulation: reduce after every micro-step."""
    nan: tuple[tuple[int, int, int, str], ...] = ()
    """(data rank, step, micro-step, parameter): one element of that gradient is NaN."""
    spike: tuple[tuple[int, int], ...] = ()
    """(data rank, step): the loss is a thousand times too large."""
    fail: tuple[tuple[int, int], ...] = ()
    """(rank, step): gradmon itself breaks."""
    config: dict[str, Any] = field(default_factory=dict)
    copies_at: tuple[int, ...] = ()
    seed: int = 0
    first_feature_zero: bool = False
    bf16: bool = False
    """FSDP2 computes in bf16 and reduces in float32."""
    scaler: tuple[int, ...] | None = None
    """With a GradScaler; the steps whose loss is infinite."""


@dataclass
class Result:
    kind: str
    parameters: list[torch.Tensor]
    copies: dict[int, tuple[list[torch.Tensor], dict[str, Any]]]
    journal: JournalView | None
    said: list[str]
    scale: float = 1.0


class Net(nn.Module):
    """Sizes that no number of ranks divides evenly, and a bias of one element: most ranks hold none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(toy.FEATURES, 33)
        self.norm = nn.LayerNorm(33)
        self.up = nn.Linear(33, 32)
        self.down = nn.Linear(32, 20)
        self.head = nn.Linear(20, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.inner(inputs)))
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data_ranks(kind: str, world_size: int) -> int:
    """How many ranks see data of their own."""
    return {"single": 1, "tensor_parallel": 1, "sequence_parallel": 1, "fsdp2+tp": world_size // 2}.get(
        kind, world_size
    )


def data_rank(kind: str, rank: int, world_size: int) -> int:
    """Ranks that work on one batch together have the same number."""
    return rank // (world_size // data_ranks(kind, world_size))


def spread(model: Net, kind: str, *, bf16: bool = False) -> nn.Module:
    """`model` in the way of `kind`."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "single":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "tensor_parallel":
        mesh = init_device_mesh("cpu", (world,))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        return parallelize_module(model, mesh, plan)
    if kind == "sequence_parallel":
        return parallelize_module(model, init_device_mesh("cpu", (world,)), SEQUENCE_PLAN)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    elif kind == "fsdp2+tp":
        both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], SEQUENCE_PLAN)
        mesh = both["data"]
    else:
        mesh = init_device_mesh("cpu", (world,))
    for part in (model.inner, model.up):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def batch(task: Task, data: int, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(((task.seed * 100 + data) * 1000 + step) * 10 + micro)
    inputs = torch.randn(BATCH, toy.FEATURES, generator=generator)
    if task.first_feature_zero:
        inputs[:, 0] = 0
    return inputs, inputs.sum(1, keepdim=True) * 0.1, 1000.0 if (data, step) in task.spike else 1.0


def loss_of(model: nn.Module, task: Task, data: int, step: int, micro: int) -> torch.Tensor:
    inputs, targets, weight = batch(task, data, step, micro)
    return (model(inputs) - targets).square().mean() * weight / task.accumulate


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def copy_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """This rank's own parts."""

    def own(value: Any) -> Any:
        value = value.to_local() if isinstance(value, DTensor) else value
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    state = {i: {k: own(v) for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    return [own(p) for p in model.parameters()], state


class Poison:
    """Sets one element of one parameter's gradient to NaN, once, on the way to where it is accumulated."""

    def __init__(self, model: nn.Module) -> None:
        self.target = ""
        self._model = model

    def arm(self, name: str) -> None:
        self.target = name

    def hook(self, name: str) -> Any:
        def poison(gradient: torch.Tensor) -> torch.Tensor:
            if self.target != name:
                return gradient
            self.target = ""
            gradient = gradient.clone()
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.view(-1)[0] = float("nan")
            return gradient

        return poison


def train(task: Task) -> Result:
    """Train on this rank; the loop is what a user would write."""
    os.environ["GRADMON_DIR"] = task.directory
    inner = build(task.seed)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data = data_rank(task.kind, rank, world)
    poison = Poison(inner)
    lively = {name for *_, name in task.nan}
    for name, module in inner.named_modules():
        if any(owner.rpartition(".")[0] == name for owner in lively):
            module.register_forward_pre_hook(_poisoned(module, name, poison, lively))
    model = spread(inner, task.kind, bf16=task.bf16)
    optimizer = toy.optimizer_for(task.optimizer, model.parameters())
    monitor = gradmon.attach(model, optimizer, config=task.config or None) if task.attach else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4, enabled=task.scaler is not None)
    copies = {}
    for step in range(1, task.steps + 1):
        optimizer.zero_grad()
        for micro in range(1, task.accumulate + 1):
            _synchronise(model, task, last=micro == task.accumulate)
            for broken in task.nan:
                if broken[:3] == (data, step, micro):
                    poison.arm(broken[3])
            loss = loss_of(model, task, data, step, micro)
            scaler.scale(loss * math.inf if step in (task.scaler or ()) else loss).backward()
        if task.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        if (rank, step) in task.fail and monitor is not None:
            monitor._measurer.measure = _broken  # type: ignore[method-assign]
        scaler.step(optimizer)
        scaler.update()
        if (rank, step) in task.fail and monitor is not None:
            del monitor._measurer.measure
        if monitor is not None:
            monitor.observe(loss=loss.detach())
        if step in task.copies_at:
            copies[step] = copy_of(model, optimizer)
    journal, kind, said = None, "", []
    if monitor is not None:
        kind, said = str(monitor._topology), sorted(monitor._say._once)
        monitor.detach()
        assert monitor.journal_path is not None
        journal = read_journal(monitor.journal_path)
    return Result(kind, [whole(p) for p in model.parameters()], copies, journal, said, scaler.get_scale())


def _broken(**_kwargs: Any) -> Any:
    raise RuntimeError("made up")


def _poisoned(module: nn.Module, name: str, poison: Poison, lively: set[str]) -> Any:
    """Hooks the parameter that this forward really uses: under FSDP2 that is not the sharded one."""
    hooked: set[int] = set()

    def before(*_args: Any) -> None:
        for kind, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{kind}" if name else kind
            if full in lively and id(parameter) not in hooked:
                hooked.add(id(parameter))
                parameter.register_hook(poison.hook(full))

    return before


def _synchronise(model: nn.Module, task: Task, *, last: bool) -> None:
    sync = last or task.sync_each
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync  # what no_sync() does
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(sync)


def reference(task: Task, world: int) -> list[tuple[float, list[float]]]:
    """(global norm, local norms by data rank) of every step, by plain torch in float64 from one process's gradients."""
    model = build(task.seed)
    optimizer = toy.optimizer_for(task.optimizer, model.parameters())
    norms = []
    count = data_ranks(task.kind, world)
    for step in range(1, task.steps + 1):
        own = []
        for data in range(count):
            model.zero_grad()
            for micro in range(1, task.accumulate + 1):
                loss_of(model, task, data, step, micro).backward()
            own.append([p.grad.double() for p in model.parameters()])
        mean = [sum(parts) / count for parts in zip(*own, strict=True)]
        norms.append((_norm(mean), [_norm(gradients) for gradients in own]))
        for parameter, gradient in zip(model.parameters(), mean, strict=True):
            parameter.grad = gradient.float()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
    return norms


def first_gradients(task: Task, world: int) -> list[torch.Tensor]:
    """The mean gradients of the first step by plain torch, in float64."""
    model, count = build(task.seed), data_ranks(task.kind, world)
    every = []
    for data in range(count):
        model.zero_grad()
        loss_of(model, task, data, 1, 1).backward()
        every.append([p.grad.double() for p in model.parameters()])
    return [sum(parts) / count for parts in zip(*every, strict=True)]


def _norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients]).norm())
