"""Fleet: all runs at a glance, the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from boards import ask
from boards.ask import BY_RUN, STATE
from boards.frame import FIRST, RUN, RUNS, Board, of_run
from boards.parts import BAD, GOOD, NOTE, WARN, Column, Query, grid, lines, number, states
from gradmon.rules import THRESHOLDS

_OPEN = (
    "/d/gradmon-run/gradmon-run?var-datasource=${datasource}&var-cluster=${__data.fields.Cluster}"
    "&var-run=${__value.raw}&${__url_time_range}"
)
_APPLIED = f'gradmon_actions_total{{{RUN},applied="yes"}}'


def _now() -> Sequence[Any]:
    none_bad = ((None, GOOD), (1, BAD))
    suspect = f"min {BY_RUN} (gradmon_healthy{{{RUN}}} and on (job, instance, run) gradmon_world_size{{{RUN}}}) == 0"
    return (
        number("Runs training", "Runs of which at least one process lives.", "none", Query(
            f"count(max {BY_RUN} (gradmon_world_size{{{RUN}}})) or vector(0)"), steps=((None, NOTE),)),
        number("Ranks alive", "Processes that train, over all runs; usually one for each GPU.", "none", Query(
            f"sum({ask.alive(RUN)}) or vector(0)"), steps=((None, NOTE),)),
        number("Ranks missing", "Processes that runs should have and that no agent sees alive.", "none", Query(
            f"sum({ask.missing()}) or vector(0)"), steps=none_bad, runbook="GradmonRankSilent"),
        number("Runs without a step", (
            f"Runs that live, are not paused, and made no step for {THRESHOLDS.stuck_seconds / 60:g} minutes: they "
            "hang, or a checkpoint or evaluation takes very long."), "none", Query(
            f"count({ask.idle()} > {THRESHOLDS.stuck_seconds:g}) or vector(0)"), steps=none_bad,
            runbook="GradmonRunStuck"),
        number("Weights suspect", (
            "Runs whose newest weights should not push out an older checkpoint: a spike, NaN or rising loss is too "
            "near. It clears by itself when training is calm again."), "none", Query(f"count({suspect}) or vector(0)"),
            steps=((None, GOOD), (1, WARN))),
        number("Steps healed", (
            "Steps that gradmon changed in the time shown so that they could not hurt: gradients made smaller, "
            "steps skipped, learning rates lowered."), "none", Query(f"{ask.grew(_APPLIED, 'by ()')} or vector(0)"),
            instant=True, steps=((None, GOOD), (1, NOTE)), decimals=0),
        number("Steps with NaN", "Steps in the time shown whose gradients held NaN or Inf; they are skipped.", "none",
            Query(f"{ask.grew(f'gradmon_nonfinite_steps_total{{{RUN}}}', 'by ()')} or vector(0)"), instant=True,
            steps=((None, GOOD), (1, WARN)), decimals=0, runbook="GradmonNonfiniteGradients"),
        number("Agents down", "Nodes whose agent Prometheus can't reach: what happens there is not seen.", "none",
            Query('count(up{job="gradmon",cluster=~"$cluster"} == 0) or vector(0)'), steps=none_bad,
            runbook="GradmonTargetDown"),
    )  # fmt: skip


def _runs() -> Sequence[Any]:
    return (
        states("What each run was doing", (
            "Green is training. Violet: gradmon lowered the learning rate after an explosion and lets it come back. "
            "Orange: the weights are not fit to be kept as a checkpoint. Red: no step although nothing is paused. "
            "Grey: ended."), Query(ask.state(), "{{run}}"), STATE, height=6),
        grid("Runs, the worst first", (
            "One line per run. Norm / limit at 1 or above means a spike: the gradients are far larger than usual. "
            "Steps healed are those gradmon changed. Click on a run to open it."),
            Column("State", ask.state(), words=STATE, width=190),
            Column("Run", label="run", link=_OPEN),
            Column("Cluster", label="cluster", width=110),
            Column("Ranks alive", ask.alive(RUN), unit="none", decimals=0, width=100),
            Column("Missing", ask.missing(), unit="none", decimals=0, steps=((None, GOOD), (1, BAD)), width=85),
            Column("Step", f"max {BY_RUN} (gradmon_steps_total{{{FIRST}}})", unit="none", decimals=0, width=90),
            Column("Steps/s", f"max {BY_RUN} (rate(gradmon_steps_total{{{FIRST}}}[5m]))", unit="none",
                decimals=2, width=85),
            Column("Loss", f"max {BY_RUN} (gradmon_mean_loss{{{RUN}}})", unit="none", decimals=3, width=85),
            Column("Norm / limit", ask.over_limit(), unit="none", decimals=2, gauge=True, top=1.5, width=190,
                steps=((None, GOOD), (1, BAD))),
            Column("Learning rate", of_run("gradmon_learning_rate_scale_ratio"), unit="percentunit", decimals=0,
                steps=((None, WARN), (THRESHOLDS.learning_rate_scale_ratio, GOOD)), width=115),
            Column("Steps healed", ask.grew(_APPLIED), unit="none", decimals=0, width=115,
                steps=((None, GOOD), (1, NOTE))),
            Column("NaN steps", ask.grew(f"gradmon_nonfinite_steps_total{{{RUN}}}"), unit="none", decimals=0, width=95,
                steps=((None, GOOD), (1, WARN))),
            Column("Last step ago", f"min {BY_RUN} (gradmon_last_step_age_seconds{{{RUN}}})", unit="s", decimals=0,
                steps=((None, GOOD), (THRESHOLDS.stuck_seconds, BAD)), width=115),
            sort="State", height=8),
        grid("Newest incident of each run", (
            "Which rank and which parameter broke first when gradients last exploded or held NaN: the place to look. "
            "The rank is a process, usually one GPU; the parameter is a weight of the model."),
            Column("Run", label="run"),
            Column("Kind", f"max by (cluster, run, rank, parameter, kind) (gradmon_last_incident_info{{{RUN}}})",
                label="kind", hidden=True, width=100),
            Column("Rank", label="rank", width=80),
            Column("Parameter", label="parameter"),
            Column("Step", f"max {BY_RUN} (gradmon_last_incident_step{{{RUN}}})", unit="none", decimals=0, width=100),
            Column("When", f"max {BY_RUN} (gradmon_last_incident_timestamp_seconds{{{RUN}}}) * 1000",
                unit="dateTimeFromNow", width=160),
            sort="When", width=14, height=8),
        grid("Alerts now", (
            "Alerts of gradmon that fire, one per run. Page: act now. Ticket: look today. Info: it was healed. Empty "
            "is good, and also what you see when the alert rules are not loaded."),
            Column("Alert", f"max by (alertname, severity, run) (ALERTS{{alertstate=\"firing\",{RUN},"
                'alertname=~"Gradmon.+",severity!="none"})', label="alertname", hidden=True),
            Column("Severity", label="severity", width=100, text={"page": BAD, "ticket": WARN, "info": NOTE}),
            Column("Run", label="run"),
            sort="Severity", width=10, height=8, empty="no alert fires"),
    )  # fmt: skip


def _compare() -> Sequence[Any]:
    spike = ((None, "transparent"), (1, BAD))
    return (
        lines("Gradient norm over its limit", (
            "How large the gradients are, against the size at which gradmon calls them a spike: 1 is the limit. Runs "
            "of any size can be compared."), "none", Query(ask.over_limit(), "{{run}}"), steps=spike, lowest=0, fill=0,
            runbook="GradmonGradientExplosion"),
        lines("Loss", "Mean loss over all ranks: how wrong the model is. It should fall.", "none", Query(
            of_run("gradmon_mean_loss"), "{{run}}"), fill=0),
        lines("Steps per second", "Optimizer steps per second. A drop means a slow node, slow "
            "data, or a checkpoint.", "none", Query(ask.steps_per_second(), "{{run}}"), lowest=0, fill=0),
        lines("Learning rate left by gradmon", "100 % unless gradmon lowered the learning rate after an explosion; it "
            "comes back step by step.", "percentunit", Query(
            of_run("gradmon_learning_rate_scale_ratio"), "{{run}}"), lowest=0, highest=1, fill=0,
            runbook="GradmonLearningRateBackedOff"),
        lines("Steps healed over time", "Steps per interval that gradmon changed, by run.", "none", Query(
            f"sum by (run) ({_APPLIED}) - sum by (run) ({_APPLIED} offset $__interval) > 0", "{{run}}"), bars=True),
        lines("Ranks alive over time", "Processes alive, by run.", "none", Query(ask.alive(RUN), "{{run}}"), lowest=0,
            fill=0, points=100),
    )  # fmt: skip


def _rows() -> Sequence[tuple[str, Sequence[Any]]]:
    return (("Now", _now()), ("Runs", _runs()), ("Side by side", _compare()))


BOARD = Board(
    "fleet",
    "gradmon / Fleet",
    "All training runs at a glance: which train, which are in trouble, and what gradmon did about it.",
    (RUNS,),
    _rows,
    marked=False,
)
