"""Loops as people write them beyond plain DDP and FSDP2: model parts in a container, and torch.compile everywhere.

The model is that of `sharded`, cut in two where there are parts. What is compared is a run without gradmon that leaves
out the broken step by itself, and one with gradmon in which that step's batch holds a NaN on one rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sharded
import torch
import torch.distributed as dist
import toy
from raw_containers import OptimizersContainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import gradmon
from gradmon.journal import JournalView, read_journal

BROKEN = 7
"""The step that is left out; its batch on rank 1 holds a NaN where gradmon is attached."""
STEPS = 12


@dataclass
class Raw:
    before: Any
    """Parameters and states before the broken step; this rank's own parts."""
    after: Any
    """After it."""
    end: Any
    names: list[str]
    topology: str
    journal: JournalView | None
    norms: list[float]
    """By torch, before the clip: what the loop logs."""


class Front(nn.Module):
    """The first part, with the names its layers have in the whole model."""

    def __init__(self, whole: sharded.Net) -> None:
        super().__init__()
        self.inner, self.norm = whole.inner, whole.norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.inner(inputs)))


class Back(nn.Module):
    """The second part."""

    def __init__(self, whole: sharded.Net) -> None:
        super().__init__()
        self.up, self.down, self.head = whole.up, whole.down, whole.head

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(inputs)))))


@dataclass
class Made:
    """What a script has built: what it attaches, what it calls."""

    model: Any
    optimizer: Any
    optimizers: list[torch.optim.Optimizer]
    forward: Callable[[torch.Tensor], torch.Tensor]
    step: Callable[[], Any]
    parameters: list[torch.Tensor]


def parts(mesh: Any, backend: str) -> Made:
    """As torchtitan: blocks compiled, every part sharded, an optimizer for each, all in one container."""
    whole = sharded.build()
    model_parts: list[nn.Module] = [Front(whole), Back(whole)]
    for block in (whole.inner, whole.up, whole.down):
        if backend:
            block.compile(backend=backend)
        fully_shard(block, mesh=mesh)
    for part in model_parts:
        fully_shard(part, mesh=mesh)
    optimizer = OptimizersContainer(model_parts, lr=3e-3, fused=True)
    parameters = [p for part in model_parts for p in part.parameters()]
    return Made(model_parts, optimizer, optimizer.optimizers, nn.Sequential(*model_parts), optimizer.step, parameters)


def build(kind: str) -> Made:
    world = dist.get_world_size()
    if kind.startswith("parts"):
        names = ("replicate", "shard")
        mesh = (
            init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
            if kind == "parts, hsdp"
            else init_device_mesh("cpu", (world,))
        )
        return parts(mesh, "aot_eager" if kind == "parts, compiled" else "")
    model: nn.Module = sharded.build()
    if kind == "ddp of compiled":
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    elif kind == "ddp of compiled in place":
        model.compile(backend="aot_eager")
    model = DistributedDataParallel(model)
    if kind == "compiled ddp and step":
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    optimizer = toy.optimizer_for("fused_adamw" if kind.endswith("step") else "adamw", model.parameters())
    step = torch.compile(optimizer.step, backend="eager") if kind.endswith("step") else optimizer.step
    return Made(model, optimizer, [optimizer], model, step, list(model.parameters()))


def clip(parameters: list[torch.Tensor], max_norm: float) -> float:
    """As torchtitan's `dist_utils.clip_grad_norm_`: one norm over all parts."""
    total = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(total, DTensor):
        total = total.full_tensor()
    clip_grads_with_norm_(parameters, max_norm, total)
    return float(total)


def train(directory: str, kind: str, max_norm: float | None, attach: bool) -> Raw:
    """The loop is what a user would write."""
    os.environ["GRADMON_DIR"] = directory
    made = build(kind)
    # only now, as the compiled kinds have taken the step already
    monitor = gradmon.attach(made.model, made.optimizer) if attach else None
    task = sharded.Task(directory, kind)
    kept: dict[int, Any] = {}
    norms = []
    for step in range(1, STEPS + 1):
        made.optimizer.zero_grad()
        inputs, targets, _ = sharded.batch(task, toy.rank(), step, 1)
        if attach and (toy.rank(), step) == (1, BROKEN):
            inputs[0, 0] = math.nan
        (made.forward(inputs) - targets).square().mean().backward()
        if attach or step != BROKEN:
            if max_norm is not None:
                norms.append(clip(made.parameters, max_norm))
            made.step()
        kept[step] = [sharded.copy_of(nn.ParameterList(made.parameters), o) for o in made.optimizers]
    names, topology, journal = [], "", None
    if monitor is not None:
        names, topology = monitor._watched.names, str(monitor._topology)
        monitor.detach()
        assert monitor.journal_path is not None
        journal = read_journal(monitor.journal_path)
    torch._dynamo.reset()
    return Raw(kept[BROKEN - 1], kept[BROKEN], kept[STEPS], names, topology, journal, norms)
