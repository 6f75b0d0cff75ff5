"""What must call somebody, with the labels that say who. Many runs at once, each with one trouble of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from shipped import Check
from worlds import GIB, Run, Value, fleet, input_series, ramp, step, text

from gradmon.rules import ALERTS, THRESHOLDS

AT = 900
"""When most troubles begin, in seconds."""


@dataclass
class Case:
    """A run in trouble; the alert fires between two moments (in seconds) with these labels, and is over after."""

    alert: str
    run: Run
    severity: str
    fires: int = AT + 60
    over: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    more: dict[str, Value] = field(default_factory=dict)

    def expectations(self) -> list[dict[str, object]]:
        labels = {"alertname": self.alert, "alertstate": "firing", "severity": self.severity, **self.labels}
        if "host" not in labels and "cluster" not in labels:
            labels["run"] = self.run.name
        expr = f"count({text('ALERTS', labels)})"
        made: list[dict[str, object]] = [
            {"expr": expr, "eval_time": f"{self.fires}s", "exp_samples": [{"labels": "{}", "value": 1}]}
        ]
        if self.over is not None:
            anything = f"count({text('ALERTS', {'alertname': self.alert, 'run': self.run.name})})"
            made.append({"expr": anything, "eval_time": f"{self.over}s", "exp_samples": []})
        return made


CASES: dict[str, Case] = {}
EVENT = AT + 360
"""By then an event of AT is over."""


def case(name: str, alert: str, severity: str, run: Run, *, fires: int = AT + 60, **options: object) -> None:
    assert name not in CASES
    run.name = run.nodes = name
    run.world = run.world if run.world != 4 else 2
    CASES[name] = Case(alert, run, severity, fires, **options)  # type: ignore[arg-type]


def event(kind: str, at: int = AT) -> Run:
    return Run().change("gradmon_events_total", step(at), kind=kind)


def action(action: str, reason: str, applied: str = "yes") -> Run:
    return Run().change("gradmon_actions_total", step(AT), action=action, reason=reason, applied=applied)


def who(rank: str, parameter: str, kind: str) -> dict[str, str]:
    return {"rank": rank, "parameter": parameter, "kind": kind}


HEAD = who("1", "head.weight", "spike")
UNKNOWN = who("unknown", "unknown", "unknown")

# Gradients.
case(
    "explosion",
    "GradmonGradientExplosion",
    "ticket",
    event("spike_streak").incident(AT, **HEAD),
    labels=HEAD,
    over=EVENT,
)
case("drift", "GradmonGradientExplosion", "ticket", event("drift"), labels=UNKNOWN, over=EVENT)
case(
    "explosion-watched",
    "GradmonGradientExplosion",
    "page",
    action("backoff", "spike_streak", "no").change("gradmon_events_total", step(AT), kind="spike_streak"),
    over=EVENT,
)
_observed = event("drift")
_observed.mode = "observe"
case("drift-watched", "GradmonGradientExplosion", "page", _observed)
# Two incidents within one episode: the first keeps the name. The next episode has its own.
case(
    "first-culprit",
    "GradmonSpike",
    "info",
    action("rescale", "spike").incident(AT, **HEAD, until=AT + 30).incident(AT + 30, "0", "token.weight", "spike"),
    labels=HEAD,
    fires=AT + 90,
)
case(
    "next-culprit",
    "GradmonSpike",
    "info",
    action("rescale", "spike").incident(AT - 240, **HEAD, until=AT).incident(AT, "0", "token.weight", "spike"),
    labels=who("0", "token.weight", "spike"),
)
# A spike before it does not lend its name to a NaN, nor one after it.
case(
    "nan",
    "GradmonNonfiniteGradients",
    "info",
    Run()
    .change("gradmon_nonfinite_steps_total", step(AT))
    .incident(AT - 30, "0", "token.weight", "spike", until=AT)
    .incident(AT, "1", "head.weight", "nonfinite", until=AT + 60)
    .incident(AT + 60, "0", "token.weight", "spike"),
    labels=who("1", "head.weight", "nonfinite"),
    fires=AT + 120,
    over=EVENT,
)
case("spike-skipped", "GradmonSpike", "info", action("skip", "spike"), labels=UNKNOWN, over=EVENT)
case(
    "many-nan",
    "GradmonManyNonfiniteSteps",
    "page",
    Run().change("gradmon_nonfinite_steps_total", ramp(AT, 0.1)),
    fires=AT + 420,
)
case("skips", "GradmonSkipStreak", "ticket", event("skip_streak"), over=EVENT)
case(
    "mostly-skipped",
    "GradmonSkipStreak",
    "ticket",
    Run().change("gradmon_actions_total", ramp(AT, 0.7), action="skip", reason="spike", applied="yes"),
    fires=AT + 150,
)
case("scaler", "GradmonScalerSkips", "ticket", event("scaler_streak"), over=EVENT)
case(
    "scaler-often",
    "GradmonScalerSkips",
    "ticket",
    Run().change("gradmon_scaler_skips_total", ramp(AT, 0.1)),
    fires=AT + 420,
)
case("vanished", "GradmonGradientsVanishing", "ticket", event("vanish"), over=EVENT)
case(
    "left-out",
    "GradmonRankLeftOut",
    "ticket",
    action("leave_out", "left_out").incident(AT, "1", "head.weight", "left_out"),
    labels=who("1", "head.weight", "left_out"),
    over=EVENT,
)
case("left-out-long", "GradmonRankLeftOut", "ticket", event("left_out_streak"), labels=UNKNOWN, over=EVENT)

# Remedies.
case("backed-off", "GradmonLearningRateBackedOff", "ticket", action("backoff", "spike_streak"), over=EVENT)
case(
    "scale-low",
    "GradmonLearningRateBackedOff",
    "ticket",
    Run().change("gradmon_learning_rate_scale_ratio", lambda t: 0.3 if AT <= t < AT + 300 else 1),
    over=AT + 360,
)
case("rolled-back", "GradmonRollback", "ticket", action("rollback", "diverging"), over=EVENT)
_stopped = action("stop", "diverging")
_stopped.end, _stopped.ends = AT + 30, "failed"
case("stopped", "GradmonTrainingStopped", "page", _stopped, labels={"reason": "diverging"}, fires=AT + 1200)
_restarted = action("stop", "skip_streak")
case("stopped-restarted", "GradmonTrainingStopped", "page", _restarted, labels={"reason": "skip_streak"}, over=EVENT)
case("replicas", "GradmonReplicasDiverged", "page", event("replicas"), fires=AT + 1200)

# The loss and the weights.
case(
    "loss-nan",
    "GradmonLossNotFinite",
    "ticket",
    Run().change("gradmon_nonfinite_losses_total", step(AT), rank="1"),
    labels={"rank": "1"},
    over=EVENT,
)
case("unfit", "GradmonWeightsUnfit", "ticket", Run().change("gradmon_healthy", step(AT, 1, 0)), fires=AT + 1020)
case(
    "overfit", "GradmonOverfitGap", "info", Run().change("gradmon_validation_loss", step(AT, 1.9, 2.4)), fires=AT + 720
)

# Ranks. One of two dies; a node of two goes away with its agent.
case(
    "failed",
    "GradmonRankFailed",
    "ticket",
    Run().change("gradmon_rank_up", step(AT, 1, 0), rank="1").change("gradmon_rank_failed", step(AT), rank="1"),
    labels={"rank": "1"},
)
# Rank 0 fails a minute after rank 1: the first keeps the name.
_both = Run(end=AT + 60, ends="failed").change("gradmon_rank_up", step(AT, 1, 0), rank="1")
_both.change("gradmon_rank_failed", step(AT), rank="1")
case("failed-both", "GradmonRankFailed", "ticket", _both, labels={"rank": "1"}, fires=AT + 300)
case(
    "silent",
    "GradmonRankSilent",
    "ticket",
    Run().change("gradmon_rank_up", step(AT, 1, 0), rank="1"),
    labels={"rank": "1"},
    fires=AT + 180,
)
_node = Run(world=3, away={"silent-node1": (AT, 10**9)})
case("silent-node", "GradmonRankSilent", "ticket", _node, labels={"rank": "unknown"}, fires=AT + 180)
case(
    "frozen",
    "GradmonRankFrozen",
    "ticket",
    Run().change("gradmon_last_heartbeat_age_seconds", lambda t: max(2, t - AT), rank="1"),
    labels={"rank": "1"},
    fires=AT + 120,
)
case("stuck", "GradmonRunStuck", "page", Run(steps=ramp(0, 1, AT), age=lambda t: max(1, t - AT)), fires=AT + 720)
case(
    "stuck-slow",
    "GradmonRunStuck",
    "page",
    Run(step_seconds=60, steps=ramp(0, 1 / 60, AT), age=lambda t: max(1, t - AT)),
    fires=AT + 1320,
)
_first = Run(steps=lambda _: 0, age=lambda t: t).change("gradmon_step_duration_seconds", lambda _: None)
case("stuck-before-first", "GradmonRunStuck", "page", _first, fires=1920)
case(
    "straggler",
    "GradmonStraggler",
    "ticket",
    Run(world=3, per_node=3).change("gradmon_busy_seconds_total", ramp(0, 0.9), rank="2"),
    labels={"rank": "2"},
    fires=AT,
)
# Shares are of ten minutes, so six of them make the share high enough.
case(
    "data-wait",
    "GradmonDataWait",
    "info",
    Run().change("gradmon_data_wait_seconds_total", ramp(0, 0.5)),
    fires=AT + 240,
)

# GPUs and hosts.
case(
    "gpu-full",
    "GradmonGpuMemoryNearlyFull",
    "ticket",
    Run().change("gradmon_gpu_memory_peak_allocated_bytes", 79 * GIB, rank="1"),
    labels={"rank": "1"},
)
case(
    "retries",
    "GradmonAllocatorRetries",
    "ticket",
    Run().change("gradmon_gpu_allocator_retries_total", step(AT, 0, 6), rank="1"),
    labels={"rank": "1"},
    over=AT + 660,
)
case(
    "oom",
    "GradmonGpuOutOfMemory",
    "ticket",
    Run().change("gradmon_gpu_allocator_ooms_total", step(AT), rank="1"),
    labels={"rank": "1"},
    over=AT + 660,
)
case(
    "ecc",
    "GradmonGpuEccErrors",
    "ticket",
    Run().change("gradmon_gpu_ecc_errors_total", step(AT, 3, 4), rank="1", kind="uncorrected"),
    labels={"rank": "1"},
    over=AT + 660,
)
case(
    "throttled",
    "GradmonGpuThrottled",
    "ticket",
    Run().change("gradmon_gpu_throttled", step(AT), rank="1", reason="hw_thermal_slowdown"),
    labels={"rank": "1"},
    fires=AT + 360,
)
case(
    "nvlink",
    "GradmonNvlinkErrors",
    "ticket",
    Run().change("gradmon_gpu_nvlink_errors_total", step(AT, 7, 200), rank="1", kind="crc"),
    labels={"rank": "1"},
    over=AT + 660,
)
case(
    "host-memory",
    "GradmonHostMemoryNearlyFull",
    "ticket",
    Run().change("gradmon_host_memory_available_bytes", 20 * GIB),
    labels={"host": "host-memory0"},
)

# What the watches found.
case(
    "bad-data",
    "GradmonBadData",
    "ticket",
    Run().change("gradmon_data_findings_total", step(AT), rank="1"),
    labels={"rank": "1"},
    over=AT + 660,
)
case("loss-unusual", "GradmonLossUnusual", "info", event("loss_spike"), over=EVENT)
case("weights-unusual", "GradmonWeightsUnusual", "info", event("weights_unchanged"), over=EVENT)
case("early-stop", "GradmonEarlyStop", "info", Run().change("gradmon_early_stop", step(AT, 0, 1)), fires=AT + 180)

# gradmon itself.
case(
    "unwell",
    "GradmonUnwell",
    "ticket",
    Run().change("gradmon_errors_total", step(AT), rank="1"),
    labels={"rank": "1"},
    over=AT + 660,
)
_broken = {"job": "gradmon", "cluster": "lab", "instance": "lab0:10855"}
case(
    "agent-unwell",
    "GradmonAgentUnwell",
    "ticket",
    Run(),
    labels={"cluster": "lab", "part": "store"},
    more={text("gradmon_agent_errors_total", {**_broken, "part": "store"}): step(AT)},
)
case(
    "target-down",
    "GradmonTargetDown",
    "ticket",
    Run(),
    labels={"cluster": "lab"},
    fires=AT + 360,
    more={text("up", _broken): step(AT, 1, 0)},
)

#: Hours: at one sample a minute.
LONG: dict[str, Case] = {}
_short, CASES = CASES, LONG
case("flat", "GradmonLossNotDecreasing", "info", Run().change("gradmon_mean_loss", 2), fires=4 * 3600 + 600)
case(
    "leak",
    "GradmonGpuMemoryLeak",
    "ticket",
    Run().change("gradmon_gpu_memory_allocated_bytes", ramp(0, 0.001 * GIB, base=41 * GIB), rank="1"),
    fires=3 * 3600,
)
case(
    "stuck-in-a-pause",
    "GradmonRunStuck",
    "page",
    Run(steps=ramp(0, 1, AT), age=lambda t: max(1, t - AT)).change("gradmon_paused", step(AT, 0, 1)),
    fires=AT + int(THRESHOLDS.paused_seconds) + 120,
)
CASES = _short
#: Those that need no run, or the absence of all.
ALONE = {"GradmonNoTarget", "GradmonWatchdog"}


def test_every_alert_has_a_case() -> None:
    assert {c.alert for c in (*CASES.values(), *LONG.values())} | ALONE == {a.name for a in ALERTS}
    told = {(c.alert, c.severity) for c in (*CASES.values(), *LONG.values())}
    assert told == {(a.name, a.severity) for a in ALERTS if a.name not in ALONE}


def failures(check: Check, cases: dict[str, Case], length: int, interval: int, **more: object) -> str:
    series = fleet("node0")
    for one in cases.values():
        series |= {**one.run.series(), **one.more}
    expectations = [e for one in cases.values() for e in one.expectations()]
    result = check(series, length, {"promql_expr_test": expectations, **more}, interval)
    assert result.returncode in {0, 1}, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def short_failures(check: Check) -> str:
    """What is not as it should be, and every alert's texts: promtool tells what it got where it expected nothing."""
    nothing = [{"alertname": c.alert, "eval_time": f"{c.fires}s", "exp_alerts": []} for c in CASES.values()]
    return failures(check, CASES, 2400, 30, alert_rule_test=nothing)


@pytest.fixture(scope="module")
def long_failures(check: Check) -> str:
    return failures(check, LONG, 5 * 3600, 60)


def expect_none(output: str, one: Case) -> None:
    for expectation in one.expectations():
        quoted = str(expectation["expr"]).replace('"', '\\"')
        found = re.search(re.escape(f'expr: "{quoted}"') + r".*\n.*\n.*", output)
        assert not found, found.group(0)


@pytest.mark.parametrize("name", CASES)
def test_it_fires(name: str, short_failures: str) -> None:
    expect_none(short_failures, CASES[name])


@pytest.mark.parametrize("name", LONG)
def test_it_fires_after_hours(name: str, long_failures: str) -> None:
    expect_none(long_failures, LONG[name])


def test_no_target(check: Check) -> None:
    expr = 'count(ALERTS{alertname="GradmonNoTarget", alertstate="firing"})'
    fires = {"expr": expr, "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": 1}]}
    assert check({}, 1200, {"promql_expr_test": [fires]}, 60).returncode == 0


#: Alerts on counters, each with the counter and a value that has been reached before the first scrape.
BORN: dict[str, tuple[str, dict[str, str]]] = {
    "GradmonGradientExplosion": ("gradmon_events_total", {"kind": "spike_streak"}),
    "GradmonSpike": ("gradmon_actions_total", {"action": "rescale", "reason": "spike", "applied": "yes"}),
    "GradmonNonfiniteGradients": ("gradmon_nonfinite_steps_total", {}),
    "GradmonSkipStreak": ("gradmon_events_total", {"kind": "skip_streak"}),
    "GradmonScalerSkips": ("gradmon_events_total", {"kind": "scaler_streak"}),
    "GradmonGradientsVanishing": ("gradmon_events_total", {"kind": "vanish"}),
    "GradmonRankLeftOut": ("gradmon_events_total", {"kind": "left_out_streak"}),
    "GradmonLearningRateBackedOff": (
        "gradmon_actions_total", {"action": "backoff", "reason": "spike_streak", "applied": "yes"}
    ),
    "GradmonRollback": ("gradmon_actions_total", {"action": "rollback", "applied": "yes"}),
    "GradmonTrainingStopped": ("gradmon_actions_total", {"action": "stop", "reason": "diverging", "applied": "yes"}),
    "GradmonReplicasDiverged": ("gradmon_events_total", {"kind": "replicas"}),
    "GradmonLossNotFinite": ("gradmon_nonfinite_losses_total", {"rank": "1"}),
    "GradmonAllocatorRetries": ("gradmon_gpu_allocator_retries_total", {"rank": "1"}),
    "GradmonGpuOutOfMemory": ("gradmon_gpu_allocator_ooms_total", {"rank": "1"}),
    "GradmonUnwell": ("gradmon_errors_total", {"rank": "1"}),
    "GradmonBadData": ("gradmon_data_findings_total", {"rank": "1"}),
    "GradmonLossUnusual": ("gradmon_events_total", {"kind": "loss_spike"}),
    "GradmonWeightsUnusual": ("gradmon_events_total", {"kind": "weights_unchanged"}),
}  # fmt: skip


def test_every_alert_on_a_counter_has_a_born_case() -> None:
    growing = {a.name for a in ALERTS if "unless on" in a.expr and "increase(" in a.expr}
    growing |= {a.name for a in ALERTS for needed in a.needs if needed["record"].endswith(":nonzero")}
    # Agents and drivers live longer than runs: their counters are there before anything can fail.
    older = {"GradmonAgentUnwell", "GradmonGpuEccErrors", "GradmonNvlinkErrors"}
    assert growing == BORN.keys() | older


@pytest.mark.parametrize("requeued", [False, True], ids=["new run", "requeued"])
def test_counters_above_zero_when_first_scraped(requeued: bool, check: Check) -> None:
    """Also where the agent of a node that the run was on before still shows its 0."""
    series, expected = fleet(), []
    for alert, (counter, labels) in BORN.items():
        run = Run(name=alert.lower(), nodes=alert.lower(), world=2, begin=AT).change(counter, 9, **labels)
        series |= run.series()
        if requeued:
            series |= Run(name=run.name, nodes=f"old-{run.nodes}", world=2, end=AT - 120, ends="killed").series()
        expr = f'count(ALERTS{{alertname="{alert}", alertstate="firing", run="{run.name}"}})'
        expected.append({"expr": expr, "eval_time": f"{AT + 30}s", "exp_samples": [{"labels": "{}", "value": 1}]})
        expected.append({"expr": f'increase({counter}{{run="{run.name}"}}[5m]) > 0', "eval_time": f"{AT + 30}s"})
    result = check(series, AT + 60, {"promql_expr_test": expected}, 30)
    assert result.returncode == 0, result.stdout + result.stderr


def test_messages_say_who(short_failures: str) -> None:
    """promtool prints what it got where it got what it did not expect: every text, expanded."""
    alerts = {one.alert for one in CASES.values()}
    assert all(f'alertname="{name}"' in short_failures for name in alerts)
    assert "error expanding" not in short_failures
    assert "no value" not in short_failures
    assert 'summary="explosion: gradients explode, rank 1, head.weight"' in short_failures
    assert "/d/gradmon-run?var-cluster=main&var-run=explosion" in short_failures
    assert "RUNBOOK.md#gradmongradientexplosion" in short_failures


def test_the_input_is_what_it_says() -> None:
    lines = input_series({"up": lambda t: None if t == 30 else 1.0}, 30, 60)
    assert lines == [{"series": "up", "values": "1 stale 1"}]
    assert THRESHOLDS.stuck_seconds < 720 - 60
