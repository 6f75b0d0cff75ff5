"""Every number the rules compare with, and every time they look back or wait.

The dashboards draw the same thresholds, so that a line on a panel and an alert mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Where the runbook is read; each alert adds its own heading. Whoever keeps a copy writes its address here.
RUNBOOK_URL = "https://github.com/gradmon/gradmon/blob/main/dashboards/RUNBOOK.md"

#: The scrape job's name, in every configuration gradmon ships.
JOB = "gradmon"


@dataclass(frozen=True, slots=True)
class RuleSettings:
    """Times of the rules, as PromQL writes them. The defaults fit a scrape every 5 s.

    A window holds at least four scrapes, so that one lost scrape changes nothing.
    """

    event_interval: str = "5s"
    """Between evaluations of what must be told at once."""
    rank_interval: str = "15s"
    """Between evaluations of what looks at every rank."""
    slow_interval: str = "1m"
    """Between evaluations of what changes over minutes and hours."""
    event_window: str = "5m"
    """How long an event stays an alert after it happened."""
    lasting_window: str = "1h"
    """The same for what does not heal by itself: a stopped run, replicas that differ."""
    episode: str = "60"
    """Seconds; incidents closer together than this are one episode, and alerts name its first culprit."""
    rate_window: str = "2m"
    """For rates per rank."""
    share_window: str = "10m"
    """For shares of steps."""
    wait: str = "2m"
    """How long a rank may be missing: longer than an agent takes to start again."""


#: In production: scrape and evaluation every 5 s.
SETTINGS = RuleSettings()
#: The same where Prometheus scrapes every 15 s, for very many ranks.
SETTINGS_15S = RuleSettings(event_interval="15s", rank_interval="30s")
#: On one machine for some minutes: scrape every second, events that are over after seconds.
DEMO = RuleSettings(
    event_interval="1s",
    rank_interval="2s",
    slow_interval="10s",
    event_window="10s",
    lasting_window="10s",
    episode="5",
    rate_window="10s",
    share_window="1m",
)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Numbers that alerts compare with. Ratios are shares or factors; times are seconds."""

    warmup_steps: int = 100
    """A run's first steps, in which loss, memory and speed are not yet what they will be."""
    nonfinite_share_ratio: float = 0.05
    """Share of steps that are not finite, in the last `share_window`."""
    nonfinite_steps: int = 5
    """At least that many, so that one NaN in few steps is not many."""
    skip_share_ratio: float = 0.5
    """Share of the steps of the last `rate_window` that were skipped."""
    skip_steps: int = 5
    scaler_share_ratio: float = 0.05
    """Share of steps the GradScaler leaves out. One step in 2,000 is usual."""
    scaler_steps: int = 25
    """More than its search from 65,536 down to 1 takes."""
    learning_rate_scale_ratio: float = 0.99
    """Below it, gradmon has backed off."""
    heartbeat_age_seconds: float = 60.0
    """A process beats every 5 s, whatever it does."""
    stuck_seconds: float = 600.0
    stuck_steps: float = 20.0
    """And that many median steps."""
    first_step_seconds: float = 1800.0
    """Loading, compiling and warming up before the first step."""
    paused_seconds: float = 7200.0
    """No evaluation or checkpoint takes as long without a step."""
    straggler_ratio: float = 1.3
    """Busy time per step of the slowest rank over the median rank's."""
    straggler_step_ratio: float = 0.05
    """And what it costs is this share of a step, else nobody would notice."""
    data_wait_ratio: float = 0.3
    """Share of its time the median rank waits for data."""
    gpu_memory_ratio: float = 0.97
    """Tensors at their peak, over the GPU's memory."""
    gpu_leak_ratio: float = 0.02
    """Share of the GPU's memory by which tensors have grown within two hours."""
    allocator_retries: int = 5
    """Cache flushes of one rank's allocator in `share_window`."""
    nvlink_errors: int = 100
    """Repaired link errors of one GPU in `share_window`."""
    host_memory_available_ratio: float = 0.05
    loss_fall_ratio: float = 0.001
    """Less than this within three hours is no decrease."""
    overfit_ratio: float = 0.1
    """Share by which the validation loss is above the training loss."""
    overfit_rise_ratio: float = 0.02
    """And above the lowest validation loss of the last six hours."""


THRESHOLDS = Thresholds()
