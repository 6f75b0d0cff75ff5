"""Alerts about gradients, what gradmon did to them, and the loss."""

from __future__ import annotations

from gradmon.rules.alert import Alert
from gradmon.rules.expressions import RUN, either, grown, grown_of_ranks, held, living_run, named, warm
from gradmon.rules.thresholds import THRESHOLDS as T
from gradmon.rules.thresholds import RuleSettings

_ACTIONS, _EVENTS = "gradmon_actions_total", "gradmon_events_total"
_WHERE = "rank {{ $labels.rank }}, parameter {{ $labels.parameter }}"
_STEPS = 'gradmon_steps_total{rank="0"}'
_OBSERVED = '{mode="observe"}'


def gradient_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """Explosions, NaN and Inf, skipped steps, vanishing."""
    return (*_step_alerts(settings), *_streak_alerts(settings))


def _step_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    window = settings.event_window
    return (
        *_explosion(settings),
        Alert(
            "GradmonSpike",
            "info",
            "events",
            named(grown(_ACTIONS, 'reason="spike"', window), "spike"),
            "{{ $labels.run }}: a gradient spike, {{ $labels.kind }} on rank {{ $labels.rank }}",
            "The gradient norm of run {{ $labels.run }} went far above its usual level and the step was rescaled or "
            "skipped (in observe mode: nothing was done). First seen on " + _WHERE + ".",
        ),
        Alert(
            "GradmonNonfiniteGradients",
            "info",
            "events",
            named(grown("gradmon_nonfinite_steps_total", "", window), "nonfinite"),
            "{{ $labels.run }}: NaN or Inf in the gradients, rank {{ $labels.rank }}",
            "Gradients of run {{ $labels.run }} held NaN or Inf; in guard mode the steps were skipped and the weights "
            "are as before. It began on " + _WHERE + ".",
        ),
        Alert(
            "GradmonManyNonfiniteSteps",
            "page",
            "events",
            named(
                _share_of_steps(
                    "gradmon_nonfinite_steps_total", settings.share_window, T.nonfinite_share_ratio, T.nonfinite_steps
                ),
                "nonfinite",
            ),
            "{{ $labels.run }}: {{ $value | humanizePercentage }} of the steps are NaN or Inf",
            "{{ $value | humanizePercentage }} of the last steps of run {{ $labels.run }} had NaN or Inf gradients: it "
            "burns GPU time and learns little. It began on " + _WHERE + ".",
        ),
    )


def _streak_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    window = settings.event_window
    return (
        Alert(
            "GradmonSkipStreak",
            "ticket",
            "events",
            named(_skip_streak(settings), "nonfinite|spike"),
            "{{ $labels.run }}: step after step is skipped",
            "Most of the last steps of run {{ $labels.run }} were skipped, so the weights hardly move. Last broken on "
            + _WHERE
            + " ({{ $labels.kind }}).",
        ),
        Alert(
            "GradmonScalerSkips",
            "ticket",
            "events",
            either(
                grown(_EVENTS, 'kind="scaler_streak"', window),
                _share_of_steps(
                    "gradmon_scaler_skips_total", settings.share_window, T.scaler_share_ratio, T.scaler_steps
                ),
            ),
            "{{ $labels.run }}: the GradScaler leaves out step after step",
            "The GradScaler of run {{ $labels.run }} keeps leaving out steps. That is no search for a scale any more: "
            "loss or gradients overflow float16, or are NaN whatever the scale.",
        ),
        Alert(
            "GradmonGradientsVanishing",
            "ticket",
            "events",
            grown(_EVENTS, 'kind="vanish"', window),
            "{{ $labels.run }}: the gradients have vanished",
            "The gradient norm of run {{ $labels.run }} has fallen to a small part of what it was, or to 0: it no "
            "longer learns.",
            board="gradmon-layers",
        ),
        Alert(
            "GradmonRankLeftOut",
            "ticket",
            "events",
            named(
                either(grown(_ACTIONS, 'action="leave_out"', window), grown(_EVENTS, 'kind="left_out_streak"', window)),
                "left_out",
            ),
            "{{ $labels.run }}: rank {{ $labels.rank }} is left out of the average",
            "Gradients of rank {{ $labels.rank }} of run {{ $labels.run }} were NaN or Inf "
            "(parameter {{ $labels.parameter }}); the other ranks go on without it.",
            board="gradmon-ranks",
        ),
    )


def remedy_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """What gradmon did beyond single steps, and what can't be healed."""
    window = settings.event_window
    return (
        Alert(
            "GradmonLearningRateBackedOff",
            "ticket",
            "events",
            named(
                either(
                    grown(_ACTIONS, 'action="backoff", applied="yes"', window),
                    f"{living_run('gradmon_learning_rate_scale_ratio')} < {T.learning_rate_scale_ratio}",
                ),
                "spike",
            ),
            "{{ $labels.run }}: gradmon lowered the learning rate",
            "After spikes in a row gradmon lowered the learning rate of run {{ $labels.run }}; it comes back by itself "
            "with healthy steps. The spikes began on " + _WHERE + ".",
        ),
        Alert(
            "GradmonRollback",
            "ticket",
            "events",
            grown(_ACTIONS, 'action="rollback", applied="yes"', window),
            "{{ $labels.run }}: rolled back to a healthy snapshot",
            "Gradients and loss of run {{ $labels.run }} had grown; gradmon put weights and optimizer back to a "
            "healthy snapshot and lowered the learning rate. Data and schedules go on.",
        ),
        Alert(
            "GradmonTrainingStopped",
            "page",
            "events",
            _stopped(settings),
            "{{ $labels.run }}: gradmon stopped the training ({{ $labels.reason }})",
            "All ranks of run {{ $labels.run }} were stopped before the same step, with exit code 70. "
            '{{ if eq $labels.reason "diverging" }}Gradients and loss grew again, and the rollbacks are used up or '
            'failed.{{ else if eq $labels.reason "replicas" }}The ranks held different weights.'
            '{{ else if eq $labels.reason "scaler_streak" }}The GradScaler left out step after step.'
            "{{ else }}Step after step was NaN or Inf.{{ end }} The GPUs are idle until a person decides.",
        ),
        Alert(
            "GradmonReplicasDiverged",
            "page",
            "events",
            grown(_EVENTS, 'kind="replicas"', settings.lasting_window),
            "{{ $labels.run }}: the ranks hold different weights",
            "The bit-for-bit comparison of all ranks' weights found a difference in run {{ $labels.run }}. Each step "
            "makes it larger, and its checkpoints depend on which rank saves.",
            board="gradmon-ranks",
        ),
    )


def watch_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """What the watches over data, loss and weights found."""
    found, more_found = grown_of_ranks("data_findings", "gradmon_data_findings_total", settings.event_window)
    bad = held("bad_data", more_found)
    return (
        Alert(
            "GradmonBadData",
            "ticket",
            "ranks",
            bad[1]["record"],
            "{{ $labels.run }}: something is wrong with the data of rank {{ $labels.rank }}",
            "Batches of rank {{ $labels.rank }} of run {{ $labels.run }} hold NaN, values far out of range, the same "
            "samples again, or labels of mostly one class. The event names input, sample and index.",
            needs=(found, *bad),
            board="gradmon-ranks",
        ),
        Alert(
            "GradmonLossUnusual",
            "info",
            "events",
            grown(_EVENTS, 'kind=~"loss_(constant|flat|low|outlier|rising|spike)"', settings.event_window),
            "{{ $labels.run }}: the loss behaves unusually",
            "The loss of run {{ $labels.run }} spikes, stands still, is constant or suspiciously low, or one rank's "
            "stands out. The event says which, and gradmon report what it usually means.",
        ),
        Alert(
            "GradmonWeightsUnusual",
            "info",
            "events",
            grown(_EVENTS, 'kind=~"(update|weights|gradients|moments)_.+"', settings.event_window),
            "{{ $labels.run }}: weights move too far, too little or not at all",
            "Some parameters of run {{ $labels.run }} are moved by a large or tiny part of their size per step, or get "
            "no gradient. The event names them.",
            board="gradmon-layers",
        ),
        Alert(
            "GradmonEarlyStop",
            "info",
            "slow",
            f"{living_run('gradmon_early_stop')} == 1",
            "{{ $labels.run }}: the validation loss no longer falls",
            "The validation loss of run {{ $labels.run }} has not improved for many observations: training on costs "
            "GPU time and gains nothing. monitor.should_stop is true.",
        ),
    )


def loss_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """The loss, and whether the weights are fit to be kept."""
    losses, more_losses = grown_of_ranks("nonfinite_losses", "gradmon_nonfinite_losses_total", settings.event_window)
    lost = held("nonfinite_loss", more_losses)
    return (
        Alert(
            "GradmonLossNotFinite",
            "ticket",
            "ranks",
            lost[1]["record"],
            "{{ $labels.run }}: the loss is NaN or Inf on rank {{ $labels.rank }}",
            "Rank {{ $labels.rank }} of run {{ $labels.run }} observed a loss that is NaN or Inf.",
            needs=(losses, *lost),
        ),
        Alert(
            "GradmonLossNotDecreasing",
            "info",
            "slow",
            _loss_not_decreasing(),
            "{{ $labels.run }}: the loss has not fallen for three hours",
            "The mean loss of run {{ $labels.run }} over the last half hour is no lower than three hours before.",
            wait="30m",
        ),
        Alert(
            "GradmonOverfitGap",
            "info",
            "slow",
            warm(living_run(f"({_overfit()})"), T.warmup_steps),
            "{{ $labels.run }}: the validation loss rises above the training loss",
            "Run {{ $labels.run }} fits its training data but no longer new data: validation loss {{ $value | "
            "humanize }}, well above the training loss and above its own lowest value.",
            wait="10m",
        ),
        Alert(
            "GradmonWeightsUnfit",
            "ticket",
            "slow",
            warm(f"({living_run('gradmon_healthy')} == 0)", T.warmup_steps),
            "{{ $labels.run }}: no checkpoint worth keeping for 15 minutes",
            "gradmon has held the weights of run {{ $labels.run }} unfit to be kept for 15 minutes: the loss is not "
            "finite or has risen, gradients drift, or ranks differ. Keep the older checkpoints.",
            wait="15m",
        ),
    )


def _explosion(settings: RuleSettings) -> tuple[Alert, Alert]:
    streak = grown(_EVENTS, 'kind=~"spike_streak|drift"', settings.event_window)
    # applied="no" without observe mode: gradmon can't act on this model, or has withdrawn after a failure of its own.
    not_applied = grown(_ACTIONS, 'applied="no"', settings.event_window)
    unattended = f"({either(f'max by ({RUN}) (gradmon_run_info{_OBSERVED})', not_applied)})"
    summary = "{{ $labels.run }}: gradients explode, rank {{ $labels.rank }}, {{ $labels.parameter }}"
    what = (
        "Gradients of run {{ $labels.run }} spike again and again, or drift far above their usual level. It began on "
        + _WHERE
        + ' ({{ $labels.kind }}; "unknown": on all ranks alike). '
    )
    return (
        Alert(
            "GradmonGradientExplosion",
            "page",
            "events",
            named(f"(({streak})\nand on ({RUN}) {unattended})", "spike", "nonfinite"),
            summary,
            what + "Nothing is done about it: gradmon only watches this run.",
        ),
        Alert(
            "GradmonGradientExplosion",
            "ticket",
            "events",
            named(f"(({streak})\nunless on ({RUN}) {unattended})", "spike", "nonfinite"),
            summary,
            what + "gradmon rescales or skips such steps and lowers the learning rate.",
        ),
    )


def _share_of_steps(counter: str, window: str, share: float, at_least: int) -> str:
    """Share of the window's steps that a counter of the run counted, where it is above `share`."""
    counted = f"sum by ({RUN}) (increase({counter}[{window}]))"
    steps = f"sum by ({RUN}) (increase({_STEPS}[{window}]))"
    return f"(({counted} / ({steps} > 0) > {share})\nand on ({RUN}) {counted} >= {at_least})"


def _skip_streak(settings: RuleSettings) -> str:
    streak = grown(_EVENTS, 'kind="skip_streak"', settings.event_window)
    skips = 'gradmon_actions_total{action="skip", applied="yes"}'
    most = _share_of_steps(skips, settings.rate_window, T.skip_share_ratio, T.skip_steps)
    return either(streak, most)


def _stopped(settings: RuleSettings) -> str:
    """Said for long, as it does not heal; but no longer once the run is back."""
    selector, by = 'action="stop", applied="yes"', f"{RUN}, reason"
    now, lately = (grown(_ACTIONS, selector, w, by) for w in (settings.event_window, settings.lasting_window))
    return f"({now})\nor\n(({lately})\nunless on ({RUN}) (max by ({RUN}) (gradmon_rank_up) == 1))"


def _loss_not_decreasing() -> str:
    now, before = "avg_over_time(gradmon_mean_loss[30m])", "avg_over_time(gradmon_mean_loss[30m] offset 3h)"
    flat = living_run(f"({now} > {before} - {T.loss_fall_ratio} * abs({before}))")
    return (
        f"{flat}\nand on ({RUN}) {same_attempt('3h')}"
        f"\nand on ({RUN}) (max by ({RUN}) (increase({_STEPS}[3h])) > {T.warmup_steps})"
    )


def same_attempt(before: str) -> str:
    """True for a run that has not been restarted since: values from before a restart are no measure."""
    return f"(gradmon_run_info and gradmon_run_info offset {before})"


def _overfit() -> str:
    training, validation = "avg_over_time(gradmon_mean_loss[30m])", "gradmon_validation_loss"
    lowest = f"min_over_time({validation}[6h])"
    return (
        f"({validation} > {training} + {T.overfit_ratio} * abs({training}))"
        f" and ({validation} > {lowest} + {T.overfit_rise_ratio} * abs({lowest}))"
    )
