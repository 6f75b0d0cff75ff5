"""What gradmon writes down: one `StepRecord` per optimizer step, and one `Event` per thing worth telling.

Glossary, used with these meanings everywhere:

- *local*: of this rank's own gradients, before the all-reduce. Only a local number can name the rank that broke.
- *global*: of the gradients the optimizer is about to use, after the all-reduce; equal on every rank under DDP.
- *grad_norm*: the global 2-norm over all parameters, before any clipping, unscaled (a loss scale is divided out).
- *grad_norm_applied*: the norm of what the optimizer really used: after the script's own clip and after gradmon's.
- *incident*: a step whose gradients were not fit to be applied as they were.

Standard library only: this file is imported by the training process, the agent and the dashboard builder.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Protocol, SupportsFloat, cast

Action = Literal["none", "rescale", "skip", "leave_out", "backoff", "rollback", "stop"]
#: What one step can be.
StepReason = Literal["healthy", "max_norm", "spike", "nonfinite", "left_out", "unsynced", "scaler_skip", "diverging"]
#: What several steps together can show.
StreakReason = Literal[
    "spike_streak", "skip_streak", "scaler_streak", "left_out_streak", "drift", "vanish", "diverging", "replicas"
]
#: What the watches over loss, weights and data can find; the rules of the catalogue in `diagnose/CATALOGUE.md`.
LossReason = Literal[
    "loss_nonfinite", "loss_flat", "loss_rising", "loss_spike", "loss_low", "loss_constant", "loss_outlier", "overfit",
    "overtraining",
]  # fmt: skip
WeightReason = Literal[
    "update_large", "update_small", "weights_unchanged", "gradients_zero", "gradients_tiny", "moments_nonfinite"
]
DataReason = Literal[
    "data_nonfinite", "data_range", "data_constant", "data_duplicate", "class_imbalance", "token_share",
    "labels_out_of_range",
]  # fmt: skip
WatchReason = Literal[LossReason, WeightReason]
Reason = StepReason | StreakReason | WatchReason | DataReason

#: What is measured of each parameter's gradient, in this order. Counts are of elements; minimum, maximum and abs_max
#: are over the finite elements (without any: inf, -inf and 0). NaN stands for "not measured in this step"; for
#: sum_of_squares alone it means that an element is NaN.
STATISTICS = ("sum_of_squares", "nan_count", "inf_count", "zero_count", "abs_max", "minimum", "maximum")
#: Columns of a `Detail`: the statistics, and the norm of the last update over the norm of the weights.
DETAIL_COLUMNS = (*STATISTICS, "update_ratio")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step of one rank. Norms are unscaled 2-norms; None means "not measured here"."""

    step: int
    """Optimizer step, counted from 1; goes on after `load_state_dict`."""
    wall_seconds: float
    """Unix time at which the step ended; for display only."""
    step_seconds: float | None
    """Time since the end of the step before, without `monitor.paused()`; None for the first."""
    grad_norm: float
    """Global norm before any clipping; NaN or Inf when the gradients are not finite."""
    grad_norm_applied: float
    """Norm of what the optimizer used; 0 when the step was skipped."""
    grad_norm_limit: float | None
    """Norm above which this step was to be rescaled as a spike; None until the detector is active."""
    local_grad_norm: float | None
    """This rank's norm before the all-reduce; None where it could not be measured."""
    nan_count: int
    """NaN elements in the global gradients."""
    inf_count: int
    """Infinite elements in the global gradients."""
    local_nan_count: int
    """NaN elements in this rank's gradients before the all-reduce."""
    local_inf_count: int
    """Infinite elements in this rank's gradients before the all-reduce."""
    action: Action
    """What the verdict asks for; it was done only if `applied`."""
    reason: StepReason
    applied: bool
    """False in `mode: observe` and in topologies where gradmon only watches."""
    culprit_rank: int | None
    """Rank whose local gradients broke this step; None for a healthy step, or where no rank stands out."""
    parameter: str | None
    """Parameter that broke first in backward order (non-finite), or holds the largest norm (spike)."""
    learning_rate: float
    """First parameter group's rate as the scheduler set it, before gradmon's scale."""
    learning_rate_scale: float
    """Factor gradmon put on the rate in this step; 1 unless it backed off."""
    loss: float | None = None
    """As given to `observe`, mean over the micro-steps; of this rank alone."""
    memory_bytes: int | None = None
    """GPU memory held by tensors, or resident memory on CPU; the newest sample, a few seconds old at most."""
    grad_abs_max: float | None = None
    """Largest finite absolute value in the global gradients, before any clipping, unscaled."""
    grad_min: float | None = None
    grad_max: float | None = None
    zero_count: int | None = None
    """Elements of the global gradients that are exactly 0."""
    element_count: int | None = None
    """Elements of the global gradients, each sharded one counted once."""
    local_grad_norm_rms: float | None = None
    """Root of the mean of all ranks' squared local norms."""
    local_grad_norm_max: float | None = None
    """Largest local norm of any rank."""
    healthy_ranks: int | None = None
    """Ranks whose own gradients were finite."""
    micro_step: int | None = None
    """Backward of this step, from 1, that broke the culprit's gradients first; None where it was not watched."""
    mean_loss: float | None = None
    """Mean over the ranks of the newest loss each had observed before the gradients met; equal on all ranks."""
    max_loss: float | None = None
    loss_scale: float | None = None
    """GradScaler's factor in this step; None without one."""
    noise_scale_ratio: float | None = None
    """Gradient noise scale (McCandlish et al. 2018) over the global batch size, smoothed; above 1 a larger one pays."""
    left_out: bool = False
    """True if this rank's gradients were not finite and counted for nothing in the average."""
    busy_seconds: float | None = None
    """Time from the end of the step before until this rank's gradients met the others': data, forward, backward. None
    where they meet in ways that are not watched (all but DDP)."""
    data_wait_seconds: float | None = None
    """Time in which this rank waited for its DataLoader's next batch; None where it uses none."""
    update_ratio: float | None = None
    """Norm of the step's update over the norm of the weights, on a fixed sample of elements; this rank's shard."""

    @property
    def healthy(self) -> bool:
        """True if nothing was wrong with the gradients of this step."""
        return self.reason in ("healthy", "max_norm")

    @property
    def broken(self) -> bool:
        """True if the gradients were not fit to be applied: an incident. A GradScaler's skip is none."""
        return self.reason in ("spike", "nonfinite", "left_out")


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line in a log: what was seen at a step, and what was done about it."""

    step: int
    wall_seconds: float
    kind: Reason
    """What was seen."""
    action: Action
    """What was done; with `applied` False, what would have been done."""
    applied: bool
    rank: int | None
    """Rank that caused it, None where unknown."""
    parameter: str | None
    message: str
    """One sentence for a person."""


@dataclass(frozen=True, slots=True)
class Detail:
    """Statistics of every parameter in one step: at a cadence, and of every step that was not healthy."""

    step: int
    place: Literal["global", "local"]
    """Of the gradients after the all-reduce, or of this rank's own before it."""
    values: bytes
    """[P, len(DETAIL_COLUMNS)] float64 in this machine's byte order, unscaled; P in the order of the journal's
    `parameters`. A row of NaN is a parameter without a gradient."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a model, its data or its training: seen, measured, and what to do about it."""

    rule: str
    """Name in the catalogue, `dead_relu`."""
    where: str
    """Layer, parameter, operation or input it is about, `blocks.3.act`; empty if it is about all."""
    message: str
    """One sentence for a person, with the evidence in numbers."""
    measured: float | None = None
    threshold: float | None = None
    """What `measured` was compared with."""
    source: str = ""
    """Where threshold and formula come from: a paper, a rule of SageMaker Debugger, a fact of arithmetic."""
    cure: str = ""
    """What to change: code, where a few lines can say it."""
    severity: Literal["error", "warning", "info"] = "warning"

    def event(self, step: int, wall_seconds: float, rank: int | None = None) -> Event:
        """As it is told while training runs; nothing is done about it. `where` may name a rank, `rank 3`."""
        kind, where = cast("Reason", self.rule), self.where or None
        named = self.where.removeprefix("rank ")
        if named != self.where and named.isdecimal():
            rank, where = int(named), None
        return Event(step, wall_seconds, kind, "none", False, rank, where, self.message)


class Landing(Protocol):
    """A step on its way from the device to the host."""

    def landed(self) -> bool:
        """True once the values are readable without waiting."""

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        """The step and what is to be told of it. Called once, on the writer's thread."""

    def details(self) -> list[Detail]:
        """Statistics of every parameter that go with this step. Called once, on the writer's thread, after record()."""

    def findings(self) -> list[Event]:
        """What those show. Called once, on the writer's thread, after details()."""


class ValueCopy(Protocol):
    """A number on its way from the device to the host."""

    def landed(self) -> bool:
        """True once it is readable without waiting."""

    def values(self) -> SupportsFloat:
        """The number, waiting for it if need be."""


STEP_FIELDS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(StepRecord))
EVENT_FIELDS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Event))


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """Who wrote a journal. Written once, at attach."""

    run: str
    """Name of the run, `[A-Za-z0-9._-]{1,64}`, with `~2` behind it where a living run had the name already."""
    instance: str
    """One start of that run (a Slurm job, a torchrun); survives restarts of its workers."""
    attempt: int
    """Which set of workers of the instance: TORCHELASTIC_RESTART_COUNT, or more where a journal lies there already."""
    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    device: str
    mode: str
    topology: str
    """`single`, `ddp`, or `unrecognised: ...`, where gradmon only watches."""
    script: str
    version: str
    started_seconds: float
    """Unix time of attach."""
    gpu_uuid: str = ""
    """The rank's GPU as NVML names it, `GPU-` and the UUID; empty on CPU."""
    gpu_pci_bus_id: str = ""
    """Where it is plugged in, as NVML writes it (`00000000:3B:00.0`); empty on CPU and where torch does not tell."""


def finite(value: float | None) -> float | None:
    """`value` if it is a finite number, else None: what a gauge may show, since NaN hides in PromQL and breaks JSON."""
    return value if value is not None and math.isfinite(value) else None
