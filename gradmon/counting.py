"""What steps and events add to the counters of a rank's journal. Pure."""

from __future__ import annotations

import math
from typing import get_args

from gradmon.record import DataReason, Event, StepRecord, StreakReason, WatchReason

#: A counter's name and its labels beside run and rank, in the order METRICS lists them.
CounterKey = tuple[str, tuple[str, ...]]

#: What is done to one step, and what follows from several: (action, reason). Each counter is born at 0.
_STEP_ACTIONS = (
    ("rescale", "spike"), ("skip", "spike"), ("rescale", "max_norm"), ("skip", "nonfinite"), ("leave_out", "left_out"),
)  # fmt: skip
_EVENT_ACTIONS = (
    ("backoff", "spike_streak"), ("rollback", "diverging"), ("stop", "skip_streak"), ("stop", "scaler_streak"),
    ("stop", "diverging"), ("stop", "replicas"),
)  # fmt: skip
#: Equal on all ranks, and counted for the run.
_RUN_EVENTS = (*get_args(StreakReason), *get_args(WatchReason))


def count_step(record: StepRecord, rank: int) -> dict[CounterKey, float]:
    """What one step adds to the counters of `rank`'s journal."""
    added: dict[CounterKey, float] = {}
    added["gradmon_steps_total", ()] = 1
    added["gradmon_local_nonfinite_elements_total", ("nan",)] = record.local_nan_count
    added["gradmon_local_nonfinite_elements_total", ("inf",)] = record.local_inf_count
    added["gradmon_nonfinite_elements_total", ("nan",)] = record.nan_count
    added["gradmon_nonfinite_elements_total", ("inf",)] = record.inf_count
    added["gradmon_nonfinite_steps_total", ()] = int(record.reason == "nonfinite")
    added["gradmon_scaler_skips_total", ()] = int(record.reason == "scaler_skip")
    added["gradmon_nonfinite_losses_total", ()] = int(record.loss is not None and not math.isfinite(record.loss))
    added["gradmon_left_out_steps_total", ()] = int(record.left_out)
    added["gradmon_data_findings_total", ()] = 0
    for name, seconds in (("busy", record.busy_seconds), ("data_wait", record.data_wait_seconds)):
        if seconds is not None:
            added[f"gradmon_{name}_seconds_total", ()] = seconds
    for kind in ("spike", "nonfinite", "left_out"):  # born at 0: a counter first seen above 0 fires no alert
        added["gradmon_incidents_total", (kind,)] = int(record.reason == kind and record.culprit_rank == rank)
    applied = "yes" if record.applied else "no"
    for action, reason in _STEP_ACTIONS:
        done = int(record.action == action and record.reason == reason)
        added["gradmon_actions_total", (action, reason, applied)] = done
    for action, reason in _EVENT_ACTIONS:
        added.setdefault(("gradmon_actions_total", (action, reason, applied)), 0)
    for kind in _RUN_EVENTS:
        added["gradmon_events_total", (kind,)] = 0
    return added


def count_event(event: Event) -> dict[CounterKey, float]:
    """What an event adds that no step record has counted already."""
    added: dict[CounterKey, float] = {}
    if event.kind in _RUN_EVENTS:
        added["gradmon_events_total", (event.kind,)] = 1
    if event.kind in get_args(DataReason):
        added["gradmon_data_findings_total", ()] = 1
    if (event.action, event.kind) in _EVENT_ACTIONS:
        added["gradmon_actions_total", (event.action, event.kind, "yes" if event.applied else "no")] = 1
    return added
