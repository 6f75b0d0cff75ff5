"""What must not call anybody: each case over every alert, minute by minute, with production times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from shipped import Check
from worlds import FOREVER, Run, Value, fleet, ramp, step

#: Everything that fires, but the Watchdog.
FIRING = 'ALERTS{alertstate="firing", alertname!="GradmonWatchdog"}'


@dataclass
class Case:
    """Series, and the minutes from and to which nothing fires."""

    series: dict[str, Value]
    to: int
    since: int = 0
    interval: int = 30


def healthy() -> Case:
    """Four hours, with the ups and downs every run has."""
    run = Run()
    run.change("gradmon_gpu_memory_allocated_bytes", lambda t: (40 + t // 60 % 7) * 2.0**30)
    run.change("gradmon_actions_total", ramp(0, 0.1), action="rescale", reason="max_norm", applied="yes")
    run.change("gradmon_gpu_throttled", 1, reason="sw_power_cap")
    run.change("gradmon_gpu_ecc_errors_total", 5)
    run.change("gradmon_gpu_nvlink_errors_total", 5000)
    run.change("gradmon_scaler_skips_total", ramp(0, 1 / 2000))
    return Case(fleet() | run.series(), 240, interval=60)


def finished() -> Case:
    """Its gauges stay as they were in a bad moment."""
    run = Run(end=600).change("gradmon_learning_rate_scale_ratio", 0.3).change("gradmon_healthy", 0)
    run.change("gradmon_gpu_throttled", 1).change("gradmon_paused", 1)
    run.change("gradmon_gpu_memory_peak_allocated_bytes", 79.9 * 2.0**30)
    return Case(fleet() | run.series(), 85, since=12, interval=60)


def finished_while_rank_0_saves() -> Case:
    run = Run(end=1800)
    for rank in "123":
        run.change("gradmon_rank_up", step(600, 1, 0), rank=rank)
        run.change("gradmon_rank_finished", step(600, 0, 1), rank=rank)
    run.change("gradmon_paused", step(600, 0, 1), rank="0").change("gradmon_steps_total", ramp(0, 1, 600))
    run.age = lambda t: max(1, t - 600)
    return Case(fleet() | run.series(), 40)


def pre_empted() -> Case:
    run = Run(end=600, ends="killed").change("gradmon_healthy", 0).change("gradmon_paused", 1)
    return Case(fleet() | run.series(), 80, interval=60)


def requeued() -> Case:
    """Back on other nodes two minutes later, while the old ones still show its dead ranks and their counters."""
    old = Run(end=600, ends="killed").change("gradmon_nonfinite_steps_total", step(60))
    old.incident(60, "1", "head.weight", "nonfinite")
    old.change("gradmon_actions_total", step(60), action="skip", reason="nonfinite", applied="yes")
    old.change("gradmon_mean_loss", 2)
    new = Run(begin=720, nodes="other")
    return Case(fleet("node0", "node1", "other0", "other1") | old.series() | new.series(), 80, since=7, interval=60)


def requeued_on_one_of_the_nodes() -> Case:
    """A swapped node: the other one's agent goes on, its ranks with other numbers."""
    old = Run(end=600, ends="killed", world=2, per_node=2, nodes="gone")
    new = Run(begin=700, world=4, nodes="node")
    return Case(fleet("gone0", "node0", "node1") | old.series() | new.series(), 80, interval=60)


def paused() -> Case:
    """An evaluation of fifteen minutes, then steps again; the age counts from before it until then."""
    steps: Value = lambda t: min(t, 600) if t < 1530 else 600 + t - 1530  # noqa: E731
    run = Run(steps=steps, age=lambda t: t - 600 if 600 <= t < 1530 else 1)
    run.change("gradmon_paused", lambda t: float(600 <= t < 1500))
    return Case(fleet() | run.series(), 40)


def no_run() -> Case:
    return Case(fleet(), 80, interval=60)


def agent_restarted(gone: int, port: str = "") -> Case:
    """Series vanish for a minute and counters go on; what they counted was told before.

    With `port`, the new agent listens there. Stops and diverged replicas are told for an hour, so that they count only
    where the agent restarts after that.
    """
    counts = OLD_COUNTS + (LASTING_COUNTS if gone > 4000 else [])
    run = Run(away={"node0": (gone, FOREVER if port else gone + 60)})
    new = Run(away={"node0": (0, gone + 60)})
    for name, labels in counts:
        run.change(name, step(120, 0, 3), **labels)
    run.incident(120, "1", "head.weight", "nonfinite")
    new.changes = run.changes
    series = run.series()
    if port:
        moved = {k: v for k, v in new.series().items() if "node0" in k}
        series |= {k.replace("node0:10855", f"node0:{port}"): v for k, v in moved.items()}
    to = gone // 60 + 13
    return Case(fleet() | series, to, since=63 if gone > 4000 else 13)


#: Counters that stood still for long, and must not be taken for new.
OLD_COUNTS: list[tuple[str, dict[str, str]]] = [
    ("gradmon_nonfinite_steps_total", {}),
    ("gradmon_nonfinite_losses_total", {}),
    *(
        ("gradmon_events_total", {"kind": k})
        for k in ("spike_streak", "skip_streak", "scaler_streak", "vanish", "drift", "loss_spike", "weights_unchanged")
    ),
    *(("gradmon_actions_total", {"action": a}) for a in ("rescale", "skip", "backoff", "rollback", "leave_out")),
    ("gradmon_scaler_skips_total", {}),
    ("gradmon_errors_total", {}),
    ("gradmon_data_findings_total", {}),
    ("gradmon_gpu_allocator_retries_total", {}),
    ("gradmon_gpu_allocator_ooms_total", {}),
    ("gradmon_gpu_ecc_errors_total", {}),
]
LASTING_COUNTS: list[tuple[str, dict[str, str]]] = [
    ("gradmon_events_total", {"kind": "replicas"}),
    ("gradmon_actions_total", {"action": "stop"}),
]


def scaled_down() -> Case:
    """torchrun goes on with the four ranks of one node; the other node still shows its dead ones."""
    before = Run(world=8, per_node=4, end=600, ends="killed")
    after = Run(world=4, per_node=4, begin=600)
    old = {k: v for k, v in before.series().items() if "node1" in k}
    node0 = {k: v for k, v in before.series().items() if "node0" in k}
    series = {**after.series(), **old}
    for name, value in node0.items():
        then = after.series().get(name)
        series[name] = lambda t, a=value, b=then: a(t) if t < 600 else (b(t) if b else None)
    return Case(fleet() | series, 80, interval=60)


def first_steps() -> Case:
    """Nothing is settled yet: 100 steps of 10 s, uneven ranks, slow data, weights not yet known to be fit."""
    run = Run(step_seconds=10, end=1000)
    run.change("gradmon_busy_seconds_total", ramp(0, 0.95), rank="3")
    run.change("gradmon_data_wait_seconds_total", ramp(0, 0.8))
    run.change("gradmon_healthy", 0).change("gradmon_validation_loss", ramp(0, 0.01, base=11))
    return Case(fleet() | run.series(), 30)


def first_step_compiles() -> Case:
    run = Run(begin=0, steps=ramp(1500, 1), age=lambda t: t if t < 1500 else 1)
    run.change("gradmon_step_duration_seconds", lambda t: 1 if t >= 1500 else None)
    return Case(fleet() | run.series(), 40)


def scaler_search() -> Case:
    run = Run().change("gradmon_scaler_skips_total", ramp(0, 1, 16))
    return Case(fleet() | run.series(), 30)


def one_nonfinite_step_among_few() -> Case:
    """Steps of three minutes: one NaN is a third of ten minutes, and still only one. Its info is over by then."""
    run = Run(step_seconds=180).change("gradmon_nonfinite_steps_total", step(900))
    return Case(fleet() | run.series(), 40, since=21)


def slow_steps() -> Case:
    """Steps of five minutes: nothing for 10 minutes is no hang."""
    run = Run(step_seconds=300, age=lambda t: t % 900)
    return Case(fleet() | run.series(), 60, interval=60)


CASES: dict[str, Callable[[], Case]] = {
    "healthy": healthy,
    "run finished": finished,
    "run finished, rank 0 still saves": finished_while_rank_0_saves,
    "job pre-empted": pre_empted,
    "job requeued": requeued,
    "job requeued, one node swapped": requeued_on_one_of_the_nodes,
    "evaluation of 15 minutes": paused,
    "no run at all": no_run,
    "agent restarted": lambda: agent_restarted(4200),
    "agent restarted soon": lambda: agent_restarted(1020),
    "agent restarted on another port": lambda: agent_restarted(1020, port="10856"),
    "elastic scale-down": scaled_down,
    "first 100 steps": first_steps,
    "first step compiles": first_step_compiles,
    "scaler search": scaler_search,
    "one NaN in few steps": one_nonfinite_step_among_few,
    "slow steps": slow_steps,
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_fires(name: str, check: Check) -> None:
    case = CASES[name]()
    silent = [
        {"expr": FIRING, "eval_time": f"{minute}m", "exp_samples": []} for minute in range(case.since, case.to + 1)
    ]
    # Never vacuous: the rules were evaluated until the end.
    watchdog = 'ALERTS{alertname="GradmonWatchdog", alertstate="firing", severity="none"}'
    silent.append({"expr": watchdog, "eval_time": f"{case.to}m", "exp_samples": [{"labels": watchdog, "value": 1}]})
    result = check(case.series, case.to * 60, {"promql_expr_test": silent}, case.interval)
    assert result.returncode == 0, result.stdout + result.stderr
