"""What gradmon writes down: one `StepRecord` per optimizer step, one `Event` per thing worth telling, and METRICS.

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
from typing import Literal

Action = Literal["none", "rescale", "skip", "backoff"]
Reason = Literal[
    "healthy", "spike", "max_norm", "nonfinite", "spike_streak", "unsynced", "scaler_skip", "scaler_streak"
]
MetricKind = Literal["counter", "gauge"]

#: What is measured of each parameter's gradient, in this order. Counts are of elements; minimum, maximum and abs_max are
#: over the finite elements (without any: inf, -inf and 0). NaN stands for "not measured in this step"; for
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
    """Time since the end of the step before; None for the first."""
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
    reason: Reason
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
    """Gradient noise scale (McCandlish et al. 2018) over the global batch size, smoothed; above 1 a larger batch pays."""
    update_ratio: float | None = None
    """Norm of the step's update over the norm of the weights, on a fixed sample of elements; this rank's shard."""

    @property
    def healthy(self) -> bool:
        """True if nothing was wrong with the gradients of this step."""
        return self.reason in ("healthy", "max_norm")

    @property
    def broken(self) -> bool:
        """True if the gradients were not fit to be applied: an incident. A GradScaler's skip is none."""
        return self.reason in ("spike", "nonfinite")


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


@dataclass(frozen=True, slots=True)
class Metric:
    """One Prometheus metric. `unit` is for people; the name already ends in it where the conventions ask for that."""

    name: str
    kind: MetricKind
    unit: str
    labels: tuple[str, ...]
    help: str


_RUN = ("run",)
_RANK = ("run", "rank")

#: Every metric gradmon exports. Those labelled by run alone are equal on all ranks and come from one rank of the run.
METRICS: tuple[Metric, ...] = (
    Metric(
        "gradmon_run_info",
        "gauge",
        "1",
        ("run", "run_instance", "attempt", "world_size", "mode", "topology", "script", "version"),
        "Always 1; what is constant for a run. The only place for the instance and the attempt.",
    ),
    Metric(
        "gradmon_rank_info",
        "gauge",
        "1",
        ("run", "rank", "local_rank", "host", "world_size", "device"),
        "Always 1; where a rank runs. Join on run and rank.",
    ),
    Metric(
        "gradmon_grad_norm",
        "gauge",
        "norm",
        _RUN,
        "Global gradient norm before clipping; the last finite value.",
    ),
    Metric(
        "gradmon_grad_norm_applied",
        "gauge",
        "norm",
        _RUN,
        "Norm of the gradients the optimizer used, after all clipping; 0 after a skipped step.",
    ),
    Metric(
        "gradmon_grad_norm_limit",
        "gauge",
        "norm",
        _RUN,
        "Norm above which a step is a spike; absent until the detector is active.",
    ),
    Metric(
        "gradmon_learning_rate",
        "gauge",
        "1",
        _RUN,
        "Learning rate set by the script, before gradmon's scale.",
    ),
    Metric(
        "gradmon_learning_rate_scale_ratio",
        "gauge",
        "ratio",
        _RUN,
        "Factor gradmon puts on the learning rate; 1 unless it backed off.",
    ),
    Metric(
        "gradmon_nonfinite_steps_total",
        "counter",
        "steps",
        _RUN,
        "Steps whose global gradients held NaN or Inf.",
    ),
    Metric(
        "gradmon_actions_total",
        "counter",
        "actions",
        ("run", "action", "reason", "applied"),
        "What gradmon did to a step, and why. applied=no: what it would have done where it only watches.",
    ),
    Metric(
        "gradmon_last_incident_info",
        "gauge",
        "1",
        ("run", "rank", "parameter", "kind"),
        "Always 1; the newest incident of a run: rank and parameter that broke first. One series per run, replaced.",
    ),
    Metric(
        "gradmon_last_incident_step",
        "gauge",
        "steps",
        _RUN,
        "Step of the newest incident.",
    ),
    Metric(
        "gradmon_grad_abs_max",
        "gauge",
        "1",
        _RUN,
        "Largest absolute value in the global gradients before clipping; from the newest step with full statistics.",
    ),
    Metric("gradmon_grad_min", "gauge", "1", _RUN, "Smallest value in the global gradients before clipping."),
    Metric("gradmon_grad_max", "gauge", "1", _RUN, "Largest value in the global gradients before clipping."),
    Metric("gradmon_grad_zero_ratio", "gauge", "ratio", _RUN, "Share of the global gradients' elements that are 0."),
    Metric(
        "gradmon_local_grad_norm_rms",
        "gauge",
        "norm",
        _RUN,
        "Root mean square over all ranks of their gradient norms before the all-reduce.",
    ),
    Metric(
        "gradmon_local_grad_norm_max",
        "gauge",
        "norm",
        _RUN,
        "Largest gradient norm of any rank before the all-reduce.",
    ),
    Metric("gradmon_healthy_ranks", "gauge", "ranks", _RUN, "Ranks whose own gradients were finite in the last step."),
    Metric("gradmon_mean_loss", "gauge", "1", _RUN, "Mean loss over all ranks; the last finite value."),
    Metric("gradmon_max_loss", "gauge", "1", _RUN, "Largest loss of any rank; the last finite value."),
    Metric("gradmon_loss_scale", "gauge", "1", _RUN, "Factor of the script's GradScaler; absent without one."),
    Metric(
        "gradmon_scaler_skips_total",
        "counter",
        "steps",
        _RUN,
        "Steps that the script's GradScaler left out because scaled gradients overflowed; normal while it searches.",
    ),
    Metric(
        "gradmon_grad_noise_scale_ratio",
        "gauge",
        "ratio",
        _RUN,
        "Gradient noise scale over the global batch size, smoothed; above 1 a larger batch still pays.",
    ),
    Metric(
        "gradmon_update_ratio",
        "gauge",
        "ratio",
        _RUN,
        "Norm of the optimizer's update over the norm of the weights, on a sample of elements.",
    ),
    Metric("gradmon_steps_total", "counter", "steps", _RANK, "Optimizer steps this rank has finished."),
    Metric(
        "gradmon_local_grad_norm",
        "gauge",
        "norm",
        _RANK,
        "This rank's gradient norm before the all-reduce; the last finite value.",
    ),
    Metric(
        "gradmon_local_nonfinite_elements_total",
        "counter",
        "elements",
        ("run", "rank", "kind"),
        "NaN or Inf elements in this rank's gradients before the all-reduce.",
    ),
    Metric(
        "gradmon_nonfinite_elements_total",
        "counter",
        "elements",
        ("run", "kind"),
        "NaN or Inf elements in the gradients the optimizer was given, after the all-reduce.",
    ),
    Metric(
        "gradmon_incidents_total",
        "counter",
        "steps",
        ("run", "rank", "kind"),
        "Steps broken by this rank's own gradients.",
    ),
    Metric("gradmon_loss", "gauge", "1", _RANK, "Loss this rank observed last; the last finite value."),
    Metric(
        "gradmon_nonfinite_losses_total",
        "counter",
        "steps",
        _RANK,
        "Steps whose observed loss was NaN or Inf.",
    ),
    Metric(
        "gradmon_last_step_timestamp_seconds",
        "gauge",
        "seconds",
        _RANK,
        "Unix time at which this rank finished its last step.",
    ),
    Metric("gradmon_step_duration_seconds", "gauge", "seconds", _RANK, "Duration of this rank's last step."),
    Metric(
        "gradmon_rank_up",
        "gauge",
        "bool",
        _RANK,
        "1 while the rank's process lives; 0 when it has ended or was killed.",
    ),
    Metric(
        "gradmon_rank_finished",
        "gauge",
        "bool",
        _RANK,
        "1 when the rank ended by itself without an exception.",
    ),
    Metric(
        "gradmon_last_heartbeat_timestamp_seconds",
        "gauge",
        "seconds",
        _RANK,
        "Unix time of the rank's last heartbeat; it beats every 5 s also while no step is made.",
    ),
    Metric(
        "gradmon_process_resident_memory_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Resident memory of the rank's process.",
    ),
    Metric("gradmon_process_cpu_seconds_total", "counter", "seconds", _RANK, "CPU time of the rank's process."),
    Metric("gradmon_host_memory_available_bytes", "gauge", "bytes", _RANK, "Memory available on the rank's host."),
    Metric(
        "gradmon_gpu_memory_allocated_bytes",
        "gauge",
        "bytes",
        _RANK,
        "GPU memory held by tensors (torch allocator); absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_reserved_bytes",
        "gauge",
        "bytes",
        _RANK,
        "GPU memory held by the torch allocator; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_peak_allocated_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Highest GPU memory held by tensors so far; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_allocator_retries_total",
        "counter",
        "retries",
        _RANK,
        "Allocations that first failed and went through after the cache was flushed; absent without a GPU.",
    ),
    Metric(
        "gradmon_errors_total",
        "counter",
        "errors",
        ("run", "rank", "part"),
        "Failures of gradmon itself inside the training process; training goes on without that part.",
    ),
    Metric("gradmon_agent_errors_total", "counter", "errors", ("part",), "Failures of the agent itself."),
    Metric("gradmon_agent_journals", "gauge", "files", (), "Journals the agent reads."),
    Metric("gradmon_agent_info", "gauge", "1", ("host", "version"), "Always 1; the agent that answers."),
)

METRICS_BY_NAME: dict[str, Metric] = {m.name: m for m in METRICS}

#: Names a sample of `resources.sample` may carry, and the metric each becomes.
RESOURCE_METRICS: dict[str, str] = {
    "resident_memory_bytes": "gradmon_process_resident_memory_bytes",
    "cpu_seconds": "gradmon_process_cpu_seconds_total",
    "host_memory_available_bytes": "gradmon_host_memory_available_bytes",
    "gpu_memory_allocated_bytes": "gradmon_gpu_memory_allocated_bytes",
    "gpu_memory_reserved_bytes": "gradmon_gpu_memory_reserved_bytes",
    "gpu_memory_peak_allocated_bytes": "gradmon_gpu_memory_peak_allocated_bytes",
    "gpu_allocator_retries": "gradmon_gpu_allocator_retries_total",
}


def finite(value: float | None) -> float | None:
    """`value` if it is a finite number, else None: what a gauge may show, since NaN hides in PromQL and breaks JSON."""
    return value if value is not None and math.isfinite(value) else None
