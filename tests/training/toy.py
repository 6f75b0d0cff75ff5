"""A small model and its training loop, with faults scheduled by (rank, step). Used by the tests that train."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradmon
from gradmon.journal import JournalView, read_journal

FEATURES = 24


@dataclass(frozen=True)
class Job:
    """What to train, and what goes wrong."""

    directory: str
    steps: int = 30
    optimizer: str = "fused_adamw"
    attach: bool = True
    clip: float | None = None
    accumulate: int = 1
    nan: tuple[tuple[int, int], ...] = ()
    """(rank, step): one input of that batch is NaN."""
    spike: tuple[tuple[int, int], ...] = ()
    """(rank, step): the loss is a thousand times too large."""
    config: dict[str, Any] = field(default_factory=dict)
    copies_at: tuple[int, ...] = ()
    """Steps after which parameters and optimizer state are kept."""
    seed: int = 0


@dataclass
class Outcome:
    parameters: list[torch.Tensor]
    state: dict[str, Any]
    copies: dict[int, tuple[list[torch.Tensor], dict[str, Any]]]
    norms: list[tuple[float, float]]
    """By plain torch: (local norm, global norm before the script's clip) of every step."""
    journal: JournalView | None
    rate: float


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def optimizer_for(kind: str, parameters: Any) -> torch.optim.Optimizer:
    parameters = list(parameters)
    makers = {
        "sgd1": lambda: torch.optim.SGD(parameters, lr=1e-2, foreach=False),
        "fused_adamw": lambda: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=3e-3, foreach=True),
        "fused_adam": lambda: torch.optim.Adam(parameters, lr=3e-3, fused=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    }
    return makers[kind]()


def batch(job: Job, generator: torch.Generator, step: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    inputs = torch.randn(8, FEATURES, generator=generator)
    targets = inputs.sum(1, keepdim=True) * 0.1
    if (rank(), step) in job.nan:
        inputs[0, 0] = float("nan")
    return inputs, targets, 1000.0 if (rank(), step) in job.spike else 1.0


def copy_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], dict[str, Any]]:
    state = {
        i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
        for i, s in optimizer.state_dict()["state"].items()
    }
    return [p.detach().clone() for p in model.parameters()], state


def reference_norms(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, weight: float) -> torch.Tensor:
    """This rank's own gradient by plain torch, flat, float64; leaves `.grad` alone."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    loss = (inner(inputs) - targets).square().mean() * weight
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(inner.parameters()))]).double()


def train(job: Job) -> Outcome:
    """Train on this rank; the loop is what a user would write."""
    os.environ["GRADMON_DIR"] = job.directory
    inner = build(job.seed)
    model = DistributedDataParallel(inner) if dist.is_initialized() else inner
    optimizer = optimizer_for(job.optimizer, model.parameters())
    generator = torch.Generator().manual_seed(100 * job.seed + rank())
    monitor = gradmon.attach(model, optimizer, config=job.config or None) if job.attach else None
    copies, norms = {}, []
    for step in range(1, job.steps + 1):
        optimizer.zero_grad()
        flat = torch.zeros(())
        for micro in range(job.accumulate):
            inputs, targets, weight = batch(job, generator, step)
            flat = flat + reference_norms(model, inputs, targets, weight) / job.accumulate
            last = micro == job.accumulate - 1
            with contextlib.nullcontext() if last or model is inner else model.no_sync():
                loss = (model(inputs) - targets).square().mean() * weight / job.accumulate
                loss.backward()
        averaged = flat.clone()
        if dist.is_initialized():
            dist.all_reduce(averaged)
            averaged /= dist.get_world_size()
        norms.append((float(flat.norm()), float(averaged.norm())))
        if job.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        if monitor is not None:
            monitor.observe(loss=loss)
        if step in job.copies_at:
            copies[step] = copy_of(inner, optimizer)
    journal = None
    if monitor is not None:
        monitor.detach()
        assert monitor.journal_path is not None
        journal = read_journal(monitor.journal_path)
    parameters, state = copy_of(inner, optimizer)
    return Outcome(parameters, state, copies, norms, journal, optimizer.param_groups[0]["lr"])


def train_both(job: Job) -> tuple[Outcome, Outcome]:
    """The same job without gradmon and with it."""
    import dataclasses

    return train(dataclasses.replace(job, attach=False)), train(job)


def equal(left: Any, right: Any) -> bool:
    """Bit for bit, through lists and dicts."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)
