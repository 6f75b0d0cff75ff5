"""Recording rules: what several alerts and panels use, and the roll-ups per run that remote write forwards.

A name says level, what, and how it was combined: `run:gradmon_straggler:ratio` has the labels cluster and run. The
roll-ups are a few dozen series per run, whatever its size.
"""

from __future__ import annotations

from typing import Any

from gradmon.rules.expressions import RUN, living_ranks
from gradmon.rules.thresholds import SETTINGS, RuleSettings

_RANK = f"{RUN}, rank"
#: GPUs that clock low for reasons of cooling or power supply; a power cap under full load is usual.
THROTTLED = 'gradmon_gpu_throttled{reason=~"hw_.*|sw_thermal_slowdown"}'


def recording_rules(settings: RuleSettings = SETTINGS) -> dict[str, Any]:
    """A Prometheus rule file's content: the roll-ups of every run."""
    return {
        "groups": [
            _group("gradmon-ranks", settings.rank_interval, _ranks(settings)),
            _group("gradmon-resources", settings.slow_interval, {**_pace(settings), **_resources()}),
        ]
    }


def recorded_names(settings: RuleSettings = SETTINGS) -> tuple[str, ...]:
    """Names of all recorded series in `recording_rules`."""
    return tuple(r["record"] for group in recording_rules(settings)["groups"] for r in group["rules"])


def _group(name: str, interval: str, rules: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "interval": interval,
        "rules": [{"record": record, "expr": expr} for record, expr in rules.items()],
    }


def _ranks(settings: RuleSettings) -> dict[str, str]:
    window = settings.rate_window
    paused = "(gradmon_paused == 1) and on (cluster, instance, run, rank) (gradmon_rank_up == 1)"
    return {
        "run:gradmon_world_size:max": f"max by ({RUN}) (gradmon_world_size)",
        "run:gradmon_ranks_up:count": f"sum by ({RUN}) (gradmon_rank_up)",
        "run:gradmon_ranks_finished:count": f"sum by ({RUN}) (gradmon_rank_finished)",
        "run:gradmon_ranks_failed:count": f"sum by ({RUN}) (gradmon_rank_failed)",
        "run:gradmon_ranks_paused:count": f"count by ({RUN}) ({paused})",
        "run:gradmon_steps:max": f"max by ({RUN}) (gradmon_steps_total)",
        "run:gradmon_steps:rate": f'max by ({RUN}) (rate(gradmon_steps_total{{rank="0"}}[{window}]))',
        "run:gradmon_nonfinite_steps:rate": f"sum by ({RUN}) (rate(gradmon_nonfinite_steps_total[{window}]))",
        "run:gradmon_actions:rate": f"sum by ({RUN}, action, reason) (rate(gradmon_actions_total[{window}]))",
        "run:gradmon_last_step_age_seconds:min": f"min by ({RUN}) (gradmon_last_step_age_seconds)",
        "run:gradmon_heartbeat_age_seconds:max": f"max by ({RUN}) (gradmon_last_heartbeat_age_seconds)",
        **_spread("gradmon_step_duration_seconds", "median", "max"),
        **_spread("gradmon_local_grad_norm", "min", "median", "max"),
        **_spread("gradmon_loss", "min", "max"),
    }


def _pace(settings: RuleSettings) -> dict[str, str]:
    """Over so long that steps of minutes fit in."""
    window = settings.share_window
    steps = f'max by ({RUN}) (rate(gradmon_steps_total{{rank="0"}}[{window}]))'
    busy = f"max by ({_RANK}) (rate(gradmon_busy_seconds_total[{window}]) > 0)"
    waiting = living_ranks(f"rate(gradmon_data_wait_seconds_total[{window}])")
    return {
        # All ranks of a run make the same steps.
        "rank:gradmon_step_busy_seconds:mean": f"{busy} / on ({RUN}) group_left () ({steps} > 0)",
        "run:gradmon_step_busy_seconds:median": f"quantile by ({RUN}) (0.5, rank:gradmon_step_busy_seconds:mean)",
        "run:gradmon_step_busy_seconds:max": f"max by ({RUN}) (rank:gradmon_step_busy_seconds:mean)",
        "run:gradmon_straggler:ratio": (
            "run:gradmon_step_busy_seconds:max / (run:gradmon_step_busy_seconds:median > 0)"
        ),
        "run:gradmon_data_wait_ratio:median": f"quantile by ({RUN}) (0.5, {waiting})",
    }


def _resources() -> dict[str, str]:
    capacity = "gradmon_gpu_memory_capacity_bytes"
    rules = {f"run:{capacity}:min": f"min by ({RUN}) ({capacity})"}
    for what in ("allocated", "reserved", "peak_allocated"):
        # Of the smallest GPU, where they differ; dividing rank by rank takes twice as long.
        most = _over_living("max", f"gradmon_gpu_memory_{what}_bytes")
        rules[f"run:gradmon_gpu_memory_{what}_ratio:max"] = f"{most} / on ({RUN}) run:{capacity}:min"
    return {
        **rules,
        **_spread("gradmon_gpu_memory_allocated_bytes", "max"),
        **_spread("gradmon_gpu_utilisation_ratio", "min", "median"),
        **_spread("gradmon_gpu_temperature_celsius", "max"),
        **_spread("gradmon_process_resident_memory_bytes", "max"),
        "run:gradmon_gpu_power_watts:sum": _over_living("sum", "gradmon_gpu_power_watts"),
        "run:gradmon_gpus_throttled:count": f"count by ({RUN}) (rank:gradmon_throttled_gpu:bad)",
    }


def _spread(metric: str, *combinations: str) -> dict[str, str]:
    """A few lines per run instead of one per rank."""
    return {f"run:{metric}:{name}": _over_living(name, metric) for name in combinations}


def _over_living(what: str, expression: str) -> str:
    """min, max, sum or median over the living ranks of a run. All but the last first per node: there are fewer."""
    if what == "median":
        return f"quantile by ({RUN}) (0.5, {living_ranks(expression)})"
    return f"{what} by ({RUN}) ({living_ranks(f'{what} by (cluster, instance, run) ({expression})')})"
