"""Training runs that need more than one step of repair, in one process, DDP and FSDP2, for the tests of the ladder.

Everything an `Outcome` holds is plain values and plain tensors, whole ones under FSDP2, so that ranks can be compared.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any, get_args

import sharded
import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.distributed.tensor import DTensor

import gradmon
from gradmon.journal import JournalView, read_journal
from gradmon.record import DataReason


@dataclass(frozen=True)
class Job:
    """What to train, how it is spread, and what goes wrong when."""

    directory: str
    kind: str = "single"
    steps: int = 40
    optimizer: str = "fused_adamw"
    config: dict[str, Any] = field(default_factory=dict)
    nan: tuple[tuple[int, int], ...] = ()
    """(rank, step): one input is NaN."""
    spike: tuple[tuple[int, int], ...] = ()
    """(rank, step): the loss is a thousand times too large."""
    wreck: int = 0
    """After this step all weights are 40 times too large, on all ranks alike."""
    level_shift: tuple[int, float] | None = None
    """From this step on the loss's gradient is so many times larger, and the loss itself is not."""
    observe: bool = True
    loss_nan: tuple[int, ...] = ()
    """Steps whose observed loss is NaN."""
    swallow: bool = False
    """The loop goes on after gradmon has stopped it, as a broad `except` would."""
    seed: int = 0


@dataclass
class Outcome:
    parameters: list[torch.Tensor]
    copies: dict[int, list[torch.Tensor]]
    """Step -> parameters after it."""
    state: dict[str, Any]
    """Of the monitor."""
    healthy: list[bool]
    stopped: tuple[str, int, int] | None
    """(message, exit code, step), if gradmon stopped the run."""
    stops: int
    journal: JournalView
    moments: list[torch.Tensor]
    rate: float

    @property
    def events(self) -> list[tuple[int, str, str, bool]]:
        """Without what was found in the data, which is each rank's own."""
        told = (e for _, e in self.journal.events if e.kind not in get_args(DataReason))
        return [(e.step, e.kind, e.action, e.applied) for e in told]

    @property
    def actions(self) -> dict[int, str]:
        """Step -> what was done to it."""
        return {r.step: r.action for _, r in self.journal.steps if r.action != "none"}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A plain copy; a collective for a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def loss_of(model: nn.Module, job: Job, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is observed, what backward is called on)."""
    generator = torch.Generator().manual_seed((job.seed * 1000 + step) * 100 + rank())
    inputs = torch.randn(16, toy.FEATURES, generator=generator)
    targets = torch.tanh(inputs.sum(1, keepdim=True) * 0.2)
    if (rank(), step) in job.nan:
        inputs[0, 0] = float("nan")
    loss = (model(inputs) - targets).square().mean() + 0.5
    weight = 1000.0 if (rank(), step) in job.spike else 1.0
    if job.level_shift is not None and step >= job.level_shift[0]:
        weight *= job.level_shift[1]
    seen = loss.detach() * (float("nan") if step in job.loss_nan else 1.0)
    return seen, loss * weight


def train(job: Job) -> Outcome:
    """The loop is what a user would write."""
    model = sharded.spread(sharded.build(job.seed), job.kind)
    optimizer = toy.optimizer_for(job.optimizer, model.parameters())
    config = {"dir": job.directory, "agent": {"start": "off"}, **job.config}
    monitor = gradmon.attach(model, optimizer, config=config)
    copies: dict[int, list[torch.Tensor]] = {}
    healthy: list[bool] = []
    stopped, stops = None, 0
    for step in range(1, job.steps + 1):
        optimizer.zero_grad()
        seen, loss = loss_of(model, job, step)
        loss.backward()
        if job.observe:
            monitor.observe(loss=seen)
        try:
            optimizer.step()
        except gradmon.TrainingStopped as error:
            stops += 1
            stopped = stopped or (str(error), error.code, step)
            if not job.swallow:
                break
        copies[step] = [whole(p) for p in model.parameters()]
        healthy.append(monitor.is_healthy())
        if step == job.wreck:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(40.0)
    state = json.loads(json.dumps(monitor.state_dict()))
    monitor.detach()
    assert monitor.journal_path is not None
    moments = [whole(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return Outcome(
        parameters=[whole(p) for p in model.parameters()], copies=copies, state=copy.deepcopy(state), healthy=healthy,
        stopped=stopped, stops=stops, journal=read_journal(monitor.journal_path), moments=moments,
        rate=optimizer.param_groups[0]["lr"],
    )  # fmt: skip


def assert_equal_ranks(outcomes: list[Outcome]) -> None:
    """Weights, moments, and what gradmon knows, bit for bit; and that something was compared."""
    first = outcomes[0]
    assert first.parameters
    assert all(torch.isfinite(p).all() for p in first.parameters)
    for other in outcomes[1:]:
        assert toy.equal(other.parameters, first.parameters)
        assert toy.equal(other.moments, first.moments)
        assert other.state == first.state
        assert other.healthy == first.healthy
        assert other.events == first.events
        assert other.actions == first.actions
