"""Run: one training run. Its gradients, what was done about them, and how it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from boards import ask
from boards.ask import BY_RUN, STATE
from boards.frame import FIRST, ONE_RUN, RUN, Board, grown, of_run
from boards.parts import BAD, CALM, GOOD, NOTE, REST, WARN, Column, Line, Query, bars, grid, lines, number
from gradmon.rules import THRESHOLDS

_APPLIED = f'gradmon_actions_total{{{RUN},applied="yes"}}'
_ACTIONS = f"gradmon_actions_total{{{RUN}}}"
_DONE = (
    f'label_replace({ask.grew(_ACTIONS, "by (action, reason, applied)")} > 0, "note", " (watched)", "applied", "no")'
)
_STEP = f"max {BY_RUN} (gradmon_steps_total{{{FIRST}}})"
#: Between two points of a long range lie many steps: the largest norm among them, so that no spike is missed.
_NORM = (
    f"max by (cluster, run) ((max_over_time(gradmon_grad_norm{{{RUN}}}[$__interval]) or gradmon_grad_norm{{{RUN}}}) "
    f"and on (job, instance, run) gradmon_world_size{{{RUN}}})"
)


def _now() -> Sequence[Any]:
    return (
        number("State", "What the run does now; green is training.", "none", Query(f"max({ask.state()})"), words=STATE,
            empty="no run"),
        number("Step", "Optimizer steps made so far.", "none", Query(
            f"max(gradmon_steps_total{{{FIRST}}})"), decimals=0,
            steps=((None, NOTE),), spark=False),
        number("Steps per second", "Optimizer steps per second.", "none", Query(
            f"max({ask.steps_per_second()})"), decimals=2, steps=((None, NOTE),)),
        number("Ranks missing", "Processes the run should have and that no agent sees alive.", "none", Query(
            f"max({ask.missing()})"), steps=((None, GOOD), (1, BAD)), runbook="GradmonRankSilent"),
        number("Gradient norm / limit", "How large the gradients are against what gradmon calls a spike; 1 is the "
            "limit.", "none", Query(f"max({ask.over_limit()})"), decimals=2, steps=((None, GOOD), (1, BAD)),
            runbook="GradmonGradientExplosion"),
        number("Mean loss", "Mean loss over all ranks: how wrong the model is.", "none", Query(
            f"max({of_run('gradmon_mean_loss')})"), decimals=3, steps=((None, NOTE),)),
        number("Learning rate left", "100 % unless gradmon lowered the learning rate after an explosion.",
            "percentunit", Query(f"max({of_run('gradmon_learning_rate_scale_ratio')})"), decimals=0,
            steps=((None, WARN), (THRESHOLDS.learning_rate_scale_ratio, GOOD)), runbook="GradmonLearningRateBackedOff"),
        number("Steps healed", "Steps gradmon changed in the time shown so that they could not hurt.", "none", Query(
            f"{ask.grew(_APPLIED, 'by ()')} or vector(0)"), instant=True, decimals=0,
            steps=((None, GOOD), (1, NOTE))),
    )  # fmt: skip


def _gradients() -> Sequence[Any]:
    return (
        lines("Gradient norm", (
            "The length of all gradients together: how hard this step would push the weights. Above the red limit it "
            "is a spike, and gradmon shrinks or skips it; the green line is what the optimizer really used (0: the "
            "step was skipped, which a logarithmic axis can't show). Dashed vertical lines are actions and events."),
            "none",
            Query(_NORM, "norm"),
            Query(of_run("gradmon_grad_norm_applied"), "used by the optimizer"),
            Query(of_run("gradmon_grad_norm_limit"), "limit"),
            look={"norm": Line(NOTE), "used by the optimizer": Line(GOOD, width=1),
                  "limit": Line(BAD, dash=True, width=1)},
            log=True, fill=6, width=17, height=10, legend=("lastNotNull", "max"), runbook="GradmonGradientExplosion"),
        bars("What gradmon did", (
            "Actions in the time shown. rescale: gradients made smaller. skip: the step was left out. backoff: the "
            "learning rate was lowered. leave_out: one rank did not count. rollback: back to older weights. stop: "
            "training ended. (watched) means that nothing was changed, because the mode is observe."), "none",
            Query(f"sort_desc({_DONE})", "{{action}}: {{reason}}{{note}}"),
            width=7, height=10, decimals=0, steps=((None, NOTE),)),
        lines("Actions over time", "Steps per interval that gradmon changed, by what it did and why.", "none",
            Query(grown(_APPLIED, "action, reason"), "{{action}}: {{reason}}"), bars=True, height=7),
        lines("Events", "What several steps together showed: spikes or skips in a row, norms that drift up or "
            "vanish, replicas that differ, a loss or weights that behave unusually.", "none",
            Query(grown(f"gradmon_events_total{{{RUN}}}", "kind"), "{{kind}}"), bars=True, height=7),
        grid("Newest incident", "The rank and the parameter that broke first, last time: the place to look.",
            Column("Kind", f"max by (cluster, run, rank, parameter, kind) (gradmon_last_incident_info{{{RUN}}})",
                label="kind", hidden=True, width=75),
            Column("Rank", label="rank", width=50),
            Column("Parameter", label="parameter"),
            Column("Step", f"max {BY_RUN} (gradmon_last_incident_step{{{RUN}}})", unit="none", decimals=0, width=60),
            Column("When", f"max {BY_RUN} (gradmon_last_incident_timestamp_seconds{{{RUN}}}) * 1000",
                unit="dateTimeFromNow", width=125),
            sort="When", width=8, height=7),
    )  # fmt: skip


def _learning() -> Sequence[Any]:
    return (
        lines("Loss", (
            "How wrong the model is; it should fall. Mean over the ranks, the worst rank, and on validation data. "
            "Validation far above the mean: the model learns its data by heart."), "none",
            Query(of_run("gradmon_mean_loss"), "mean"),
            Query(of_run("gradmon_max_loss"), "worst rank"),
            Query(of_run("gradmon_validation_loss"), "validation"),
            look={"mean": Line(NOTE), "worst rank": Line(REST, width=1), "validation": Line(WARN)}, fill=0,
            legend=("lastNotNull", "min"), runbook="GradmonLossNotDecreasing"),
        lines("Learning rate", (
            "The learning rate the script sets, and the share of it that gradmon leaves (right axis): below 100 % it "
            "was lowered after an explosion and comes back step by step."), "none",
            Query(of_run("gradmon_learning_rate"), "set by the script"),
            Query(of_run("gradmon_learning_rate_scale_ratio"), "left by gradmon"),
            look={"set by the script": Line(NOTE), "left by gradmon": Line(CALM, right=True, unit="percentunit")},
            lowest=0, runbook="GradmonLearningRateBackedOff"),
        lines("Update to weight ratio", (
            "How far one step moves the weights, relative to their size. About 0.001 is usual; ten times that makes "
            "training unstable."), "none", Query(of_run("gradmon_update_ratio"), "update / weights"), log=True,
            color=NOTE),
        lines("Moments of the optimizer", "Norms of the optimizer's running means of gradients and of their squares. "
            "A second moment that jumps slows learning down for long after a spike.", "none",
            Query(of_run("gradmon_first_moment_norm"), "first"), Query(of_run("gradmon_second_moment_norm"), "second"),
            look={"first": Line(NOTE), "second": Line(WARN, width=1)}, log=True, fill=0, width=6),
        lines("Gradient noise scale over batch size", (
            "Above 1 the gradients are mostly noise and a larger batch still pays; far below 1 a smaller batch would "
            "learn as much per step."), "none", Query(of_run("gradmon_grad_noise_scale_ratio"), "noise / batch"),
            steps=((None, "transparent"), (1, NOTE)), lowest=0, color=CALM, width=6),
        lines("Before the ranks meet", (
            "Gradient norms of the single ranks before they are averaged. The largest far above the others' usual "
            "size: one rank has bad data or a bad GPU; all of them high: the training itself."), "none",
            Query(of_run("gradmon_local_grad_norm_max"), "largest rank"),
            Query(of_run("gradmon_local_grad_norm_rms"), "all ranks (rms)"),
            Query(of_run("gradmon_grad_norm"), "averaged"),
            look={"largest rank": Line(WARN, width=1), "all ranks (rms)": Line(NOTE), "averaged": Line(GOOD, width=1)},
            log=True, fill=0, width=6),
        lines("NaN and Inf", (
            "Elements of the averaged gradients that are not numbers, per interval. Such steps are skipped; the "
            "Ranks dashboard says whose they were."), "none",
            Query(grown(f"gradmon_nonfinite_elements_total{{{RUN}}}", "kind"), "{{kind}} elements"),
            bars=True, look={"nan elements": Line(BAD), "inf elements": Line(WARN)}, width=6,
            runbook="GradmonNonfiniteGradients"),
    )  # fmt: skip


def _detail() -> Sequence[Any]:
    return (
        lines("Largest and smallest gradient", "The extremes among all gradient elements before clipping; one "
            "element far out often comes before a spike.", "none",
            Query(of_run("gradmon_grad_max"), "largest"), Query(of_run("gradmon_grad_min"), "smallest"),
            Query(of_run("gradmon_grad_abs_max"), "largest absolute"),
            look={"largest": Line(WARN), "smallest": Line(NOTE), "largest absolute": Line(REST, width=1)}, fill=0),
        lines("Gradients that are exactly 0", "Share of all gradient elements that are 0. Near 100 % hardly anything "
            "is learnt: dead units, or numbers too small for the precision.", "percentunit",
            Query(of_run("gradmon_grad_zero_ratio"), "zero"), lowest=0, color=NOTE),
        lines("Loss scale", "Factor of the script's GradScaler (mixed precision) and steps it left out because scaled "
            "gradients overflowed. A few while it searches are normal.", "none",
            Query(of_run("gradmon_loss_scale"), "scale"),
            Query(grown(f"gradmon_scaler_skips_total{{{RUN}}}", "run"), "steps left out"),
            look={"scale": Line(NOTE), "steps left out": Line(WARN, right=True)}, runbook="GradmonScalerSkips"),
        lines("Steps since the weights were healthy", "How many steps ago the weights were last fit to be kept as a "
            "checkpoint; 0 is now. It grows while gradmon heals.", "none",
            Query(f"clamp_min({_STEP} - {of_run('gradmon_last_healthy_step')}, 0)",
                "steps"), lowest=0, color=WARN),
        lines("Ranks with finite gradients", "Ranks whose own gradients were numbers in the last step; a dip is a rank "
            "with NaN.", "none", Query(of_run("gradmon_healthy_ranks"), "finite"),
            Query(f"max {BY_RUN} (gradmon_world_size{{{RUN}}})", "all ranks"), lowest=0,
            look={"finite": Line(GOOD), "all ranks": Line(REST, dash=True, width=1)}),
        lines("Duration of a step", "Seconds per optimizer step, over the ranks. They wait for each other, so all are "
            "as slow as the slowest.", "s", *ask.band(f"gradmon_step_duration_seconds{{{RUN}}}"), look=ask.BAND,
            lowest=0, points=100, fill=0),
    )  # fmt: skip


def _rows() -> Sequence[tuple[str, Sequence[Any]]]:
    return (
        ("Now", _now()),
        ("Gradients, and what was done", _gradients()),
        ("Learning", _learning()),
        ("In detail", _detail()),
    )


BOARD = Board(
    "run",
    "gradmon / Run",
    "One training run: its gradients with their limit, what gradmon did, and how the model learns.",
    (ONE_RUN,),
    _rows,
)
