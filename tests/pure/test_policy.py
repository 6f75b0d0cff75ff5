from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmon.config import Config, load
from gradmon.policy import Policy, Trend, incident
from gradmon.record import Event, StepRecord

FINE = Trend(loss_over_best=1.0, loss=2.0)
BAD = Trend(drifting=True, loss_over_best=1.5, loss=3.0)
ROLLS_BACK = {"rollback": {"every_steps": 5}}


def record(reason: str = "healthy", step: int = 1, **changes: Any) -> StepRecord:
    action = {"spike": "rescale", "nonfinite": "skip", "max_norm": "rescale", "left_out": "leave_out"}.get(
        reason, "none"
    )
    values = {
        "step": step, "wall_seconds": 0.0, "step_seconds": 0.1, "grad_norm": 50.0, "grad_norm_applied": 1.0,
        "grad_norm_limit": 4.0, "local_grad_norm": 50.0, "nan_count": 0, "inf_count": 0, "local_nan_count": 0,
        "local_inf_count": 0, "action": action, "reason": reason, "applied": True, "culprit_rank": 3,
        "parameter": "head.weight", "learning_rate": 1e-3, "learning_rate_scale": 1.0,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


#: h healthy, c clipped by max_norm, s spike rescaled, S spike skipped, n non-finite, g GradScaler's skip, l rank left
#: out, u unsynced.
NAMES = {"h": "healthy", "s": "spike", "S": "spike", "n": "nonfinite", "g": "scaler_skip", "l": "left_out",
         "u": "unsynced", "c": "max_norm"}  # fmt: skip


class Run:
    """A policy fed letter by letter."""

    def __init__(self, config: dict[str, Any] | None = None, world_size: int = 4) -> None:
        self.policy = Policy(load(config or {}, {}).config, world_size)
        self.step = 0
        self.events: list[Event] = []
        self.scales: list[float] = []

    def feed(self, letters: str, trend: Trend = FINE, **more: Any) -> Run:
        for letter in letters:
            self.step += 1
            changes = {"action": "skip"} if letter in "Sg" else {}
            self.events += self.policy.update(record(NAMES[letter], self.step, **changes), trend, **more)
            self.scales.append(self.policy.scale)
        return self

    def told(self) -> list[tuple[int, str, str, bool]]:
        return [(e.step, e.kind, e.action, e.applied) for e in self.events]


def scales(letters: str, **backoff: Any) -> list[float]:
    """The scale after each step; two spikes within four steps halve it, a healthy step brings half of that back."""
    settings = {"after_spikes": 2, "within_steps": 4, "factor": 0.5, "rewarm": 1.5, **backoff}
    return Run({"backoff": settings}).feed(letters).scales


def test_spikes_within_a_few_steps_lower_the_rate_each_further_one_again() -> None:
    assert scales("hsh") == [1, 1, 1]
    assert scales("hss") == [1, 1, 0.5]
    assert scales("sssS") == [1, 0.5, 0.25, 0.125], "skipped or not"
    assert scales("shhs") == [1, 1, 1, 0.5], "not only in a row"
    assert scales("shhhs") == [1] * 5, "but within four steps"


def test_by_default_a_bad_stretch_of_three_steps_does_not_touch_the_rate() -> None:
    assert Run().feed("sSSh").scales == [1] * 4
    assert Run().feed("sSSS").scales == [1, 1, 1, 0.3]


def test_healthy_steps_bring_it_back() -> None:
    assert scales("sshhh") == [1, 0.5, 0.75, 1, 1]
    assert scales("ssch") == [1, 0.5, 0.75, 1], "a step the user's own limit clipped is healthy"
    assert scales("sslh") == [1, 0.5, 0.75, 1], "and so is one without a broken rank"


def test_steps_that_are_not_finite_never_lower_the_rate() -> None:
    assert scales("nnnnnn") == [1] * 6
    assert scales("ssnn") == [1, 0.5, 0.5, 0.5], "and do not warm it up either"
    assert scales("snsu") == [1, 1, 0.5, 0.5], "one between two spikes does not make the first forgotten"


def test_floor_and_switch() -> None:
    assert scales("s" * 20)[-1] == 0.05
    assert scales("ssss", after_spikes=0) == [1] * 4


def test_back_off_is_told_once_with_the_culprit() -> None:
    run = Run().feed("sSSS")
    assert run.told() == [(4, "spike_streak", "backoff", True)]
    assert run.events[0].rank == 3
    assert "4 spikes within 16 steps: learning rate lowered to x0.3" in run.events[0].message
    watched = Run().feed("ssss", acts=False)
    assert watched.told() == [(4, "spike_streak", "backoff", False)]
    assert "would be lowered" in watched.events[0].message


def test_the_first_spike_of_a_row_is_rescaled_the_next_are_skipped() -> None:
    config = {"clip": {"rescale_first": 1, "skip_next": 2}}
    skips = []
    run = Run(config)
    for letter in "hsSSssh":
        skips.append(run.policy.skips_spikes)
        run.feed(letter)
    assert skips == [False, False, True, True, False, False, False]
    assert not Run(config).feed("sh").policy.skips_spikes, "a healthy step ends the row"
    assert not Run({"clip": {"skip_next": 0}}).feed("s").policy.skips_spikes
    assert Run({"clip": {"rescale_first": 0}}).policy.skips_spikes


@pytest.mark.parametrize(
    ("letters", "stops_at"),
    [("n" * 12, 10), ("nnnnnhnnnnnnnnn", None), ("n" * 5 + "u" + "n" * 5, 11), ("n" * 9 + "s" + "n" * 9, None)],
)
def test_skips_in_a_row_stop_the_run(letters: str, stops_at: int | None) -> None:
    run = Run().feed(letters)
    stops = [event for event in run.events if event.action == "stop"]
    assert [e.step for e in stops] == ([] if stops_at is None else [stops_at])
    assert (run.policy.stop is None) == (stops_at is None)
    if stops:
        assert stops[0].kind == "skip_streak"
        assert "10 steps in a row were not finite on rank 3, head.weight" in stops[0].message
        assert stops[0].message.endswith("stopping all ranks")


def test_scaler_skips_stop_it_too_but_a_search_does_not() -> None:
    assert Run().feed("g" * 9 + "h" + "g" * 9).told() == []
    run = Run().feed("g" * 10)
    assert run.told() == [(10, "scaler_streak", "stop", True)]
    assert run.policy.stop is run.events[0]


def test_stopping_can_be_switched_off_and_is_only_said_where_nothing_is_done() -> None:
    never = {"stop": {"after_skips": 0, "after_scaler_skips": 0}}
    assert Run(never).feed("n" * 30 + "g" * 30).told() == [(40, "scaler_streak", "none", False)], "and not in silence"
    run = Run().feed("n" * 30, acts=False)
    assert run.told() == [(10, "skip_streak", "stop", False)]
    assert run.policy.stop is None
    assert "would have stopped" in run.events[0].message


def test_drift_alone_is_told_once_and_never_acts() -> None:
    run = Run(ROLLS_BACK)
    run.feed("h" * 20)
    run.feed("h" * 200, Trend(drifting=True, loss_over_best=1.0))
    assert run.told() == [(21, "drift", "none", False)]
    assert (run.policy.rollback_due, run.policy.stop, run.policy.scale) == (False, None, 1.0)
    run.feed("h").feed("h", Trend(drifting=True))
    assert run.told()[1:] == [(222, "drift", "none", False)], "told again after it had ended"


def test_vanished_gradients_are_told_once() -> None:
    run = Run().feed("hhh", Trend(vanished=True))
    assert run.told() == [(1, "vanish", "none", False)]


def test_a_twelvefold_level_shift_with_a_falling_loss_never_rolls_back_or_stops() -> None:
    run = Run(ROLLS_BACK).feed("h" * 50)
    run.feed("sSS" + "s" * 30, Trend(drifting=True, loss_over_best=0.99)).feed("h" * 300, Trend(True, False, 0.97))
    assert {e.action for e in run.events} == {"none", "backoff"}
    assert not run.policy.rollback_due
    assert run.policy.scale == 1.0


def test_drift_with_a_risen_loss_rolls_back_until_that_is_used_up() -> None:
    run = Run(ROLLS_BACK)
    run.feed("h" * 5)
    assert run.policy.snapshot_due
    run.policy.snapshot_taken()
    for number in (1, 2, 3):
        run.feed("h", BAD)
        assert run.policy.rollback_due
        event = run.policy.rolled_back(record(step=run.step), 5)
        assert (event.kind, event.action, event.applied) == ("diverging", "rollback", True)
        assert run.policy.scale == 0.3 or number > 1
        run.feed("h" * 31, BAD)
        assert not run.policy.rollback_due, "cooldown"
    assert run.policy.stop is None
    run.feed("h", BAD)
    assert run.policy.stop is not None
    assert "after 3 rollbacks" in run.policy.stop.message


def test_a_rollback_lowers_the_rate_and_healthy_steps_bring_it_back() -> None:
    run = Run({**ROLLS_BACK, "backoff": {"factor": 0.5, "rewarm": 1.5}}).feed("hhhhh").feed("h", BAD)
    run.policy.rolled_back(record(step=6), 5)
    assert run.policy.scale == 0.5
    assert run.policy.last_healthy_step == 5
    assert run.feed("hh").scales[-2:] == [0.75, 1.0]


def test_many_spikes_with_a_risen_loss_roll_back_without_drift() -> None:
    risen = Trend(loss_over_best=1.2)
    assert not Run(ROLLS_BACK).feed("sSS", risen).policy.rollback_due
    assert Run(ROLLS_BACK).feed("sSSS", risen).policy.rollback_due
    assert Run(ROLLS_BACK).feed("sSSS").feed("hhh", risen).policy.rollback_due, "the loss follows a little later"
    assert not Run(ROLLS_BACK).feed("sSSS").policy.rollback_due, "bad data, and the loss is fine"
    assert not Run(ROLLS_BACK).feed("sSSS").feed("h" * 16).feed("h", risen).policy.rollback_due


def test_without_a_snapshot_it_is_said_once_in_a_while() -> None:
    run = Run(ROLLS_BACK).feed("h", BAD)
    event = run.policy.cannot_roll_back(record())
    assert (event.action, event.applied) == ("none", False)
    assert not run.feed("h" * 31, BAD).policy.rollback_due
    assert run.feed("h", BAD).policy.rollback_due


def test_in_observe_mode_rollbacks_are_said_and_not_due() -> None:
    run = Run(ROLLS_BACK).feed("h" * 200, BAD, acts=False)
    assert run.told()[1:4] == [(1, "diverging", "rollback", False), (33, "diverging", "rollback", False),
                               (65, "diverging", "rollback", False)]  # fmt: skip
    assert run.told()[4:] == [(97, "diverging", "stop", False)]
    assert (run.policy.rollback_due, run.policy.stop, run.policy.scale) == (False, None, 1.0)


def test_without_rollback_growing_loss_and_gradients_are_told_only() -> None:
    assert {e.action for e in Run().feed("h" * 50, BAD).events} == {"none"}


@pytest.mark.parametrize(
    ("letters", "trend", "due"),
    [
        ("hhhh", FINE, False), ("hhhhh", FINE, True), ("hhhhnh", FINE, True), ("hhhhhn", FINE, True),
        ("hhhhhnn", FINE, False), ("hhhhhss", FINE, False), ("hhhhh", Trend(loss_over_best=1.06), False),
        ("hhhhh", Trend(), False), ("hhhhh", Trend(loss_over_best=1.0, loss=math.nan), False),
    ],
)  # fmt: skip
def test_snapshots_are_of_healthy_weights_near_the_best_loss(letters: str, trend: Trend, due: bool) -> None:
    assert Run(ROLLS_BACK).feed(letters, trend).policy.snapshot_due is due


def test_snapshots_need_rollback() -> None:
    assert not Run().feed("h" * 50).policy.snapshot_due


def test_a_rank_left_out_again_and_again_is_an_event() -> None:
    run = Run({"leave_out": {"report_after": 3}})
    run.feed("ll", left_out=(1,)).feed("h").feed("lll", left_out=(1, 2)).feed("l", left_out=(2,))
    assert run.told() == [(6, "left_out_streak", "none", False)] * 2
    assert [e.rank for e in run.events] == [1, 2]
    run.feed("ll", left_out=(2,)).feed("lll", left_out=(1,))
    assert [e.rank for e in run.events] == [1, 2, 1], "once per streak"


def test_differing_replicas_are_named_once() -> None:
    run = Run().feed("h", differing=(2,)).feed("h").feed("h", differing=(2,))
    assert run.told() == [(1, "replicas", "none", False)]
    assert run.events[0].rank == 2
    assert run.policy.why_unfit == "the weights of rank 2 differ"
    run.feed("h", differing=())
    assert run.policy.why_unfit == ""
    run.feed("h", differing=(0, 1, 2, 3))
    assert "no majority" in run.events[-1].message
    stopping = Run({"stop": {"on_divergence": True}}).feed("h", differing=(1,))
    assert stopping.told() == [(1, "replicas", "stop", True)]
    assert stopping.policy.stop is not None


@pytest.mark.parametrize(
    ("letters", "trend", "acts", "why"),
    [
        ("h", FINE, True, ""), ("hn", FINE, True, ""), ("hs", FINE, True, ""), ("hg", FINE, True, ""),
        ("hl", FINE, True, ""), ("hu", FINE, True, ""),
        ("hnn", FINE, True, "2 steps in a row"), ("hss", FINE, True, "2 spikes"), ("hn", FINE, False, "1 steps"),
        ("hs", FINE, False, "1 spikes"), ("h", Trend(loss=math.nan), True, "loss is not finite"),
        ("h", Trend(loss_over_best=1.2), True, "20% above its best"), ("h", Trend(drifting=True), True, ""),
    ],
)  # fmt: skip
def test_what_makes_a_checkpoint_unfit(letters: str, trend: Trend, acts: bool, why: str) -> None:
    policy = Run().feed(letters, trend, acts=acts).policy
    assert why in policy.why_unfit
    assert bool(policy.why_unfit) == bool(why)


def test_the_last_healthy_step_is_kept() -> None:
    run = Run().feed("hhh")
    assert run.policy.last_healthy_step == 3
    assert run.feed("nnn").policy.last_healthy_step == 4, "a lone skip leaves the weights as they were"
    assert run.feed("h").policy.last_healthy_step == 7
    assert run.feed("lll", left_out=(1,)).policy.last_healthy_step == 10, "the average was over healthy ranks"


def test_a_stop_comes_again_after_a_resume() -> None:
    """Whoever saves in a streak, or at the stop itself, and goes on, has not switched the stop off."""
    for letters in ("n" * 10, "n" * 20, "g" * 10):
        first, second = Run().feed(letters), Run()
        second.policy.load_state_dict(first.policy.state_dict())
        assert second.policy.stop is None
        assert second.feed(letters[:1]).policy.stop is not None
    first = Run(ROLLS_BACK)
    for _ in range(3):
        first.policy.rolled_back(record(), 1)
    first.feed("h" * 32, BAD).feed("h", BAD)
    assert first.policy.stop is not None
    second = Run(ROLLS_BACK)
    second.policy.load_state_dict(first.policy.state_dict())
    assert second.feed("h", BAD).policy.stop is not None


def test_one_stop_that_was_only_told_does_not_hide_another() -> None:
    run = Run(ROLLS_BACK).feed("n" * 10, acts=False).feed("h" * 120, BAD, acts=False)
    assert [e.kind for e in run.events if e.action == "stop"] == ["skip_streak", "diverging"]


def test_ranks_that_differed_are_forgotten_by_a_resume() -> None:
    first, second = Run().feed("h", differing=(1,)), Run()
    second.policy.load_state_dict(first.policy.state_dict())
    assert second.feed("h").policy.why_unfit == ""


def test_a_failed_rollback_ends_the_run() -> None:
    run = Run(ROLLS_BACK)
    event = run.policy.rollback_failed(record(), " on another rank")
    assert run.policy.stop is event
    assert "a rollback failed on another rank" in event.message


def test_rebaseline_forgets_streaks() -> None:
    run = Run().feed("sss")
    run.policy.rebaseline()
    assert run.feed("sss").scales[-1] == 1.0
    assert Run(ROLLS_BACK).feed("hhhhh").policy.snapshot_due
    fresh = Run(ROLLS_BACK).feed("hhhhh")
    fresh.policy.rebaseline()
    assert not fresh.policy.snapshot_due
    due = Run(ROLLS_BACK).feed("h", BAD)
    assert due.policy.rollback_due
    due.policy.rebaseline()
    assert not due.policy.rollback_due


letters = st.text(alphabet="hsSngluc", min_size=0, max_size=40)


@settings(deadline=None)  # the machine may be busy
@given(letters, letters, st.sampled_from([FINE, BAD, Trend()]))
def test_resumed_is_as_uninterrupted(before: str, after: str, trend: Trend) -> None:
    config = {**ROLLS_BACK, "leave_out": {"report_after": 3}}
    whole, first, second = Run(config), Run(config), Run(config)
    whole.feed(before, trend, left_out=(1,))
    first.feed(before, trend, left_out=(1,))
    second.policy.load_state_dict(json.loads(json.dumps(first.policy.state_dict())))
    second.step = first.step
    seen = len(whole.events)
    whole.feed(after, BAD, left_out=(1, 2))
    second.feed(after, BAD, left_out=(1, 2))
    # What stops the run is told again by whoever goes on all the same.
    known = [e for e in second.events if e.action != "stop"]
    assert known == [e for e in whole.events[seen:] if e.action != "stop"]
    assert {**second.policy.state_dict(), "told": 0} == {**whole.policy.state_dict(), "told": 0}


def test_the_state_of_the_first_version_loads() -> None:
    policy = Policy(Config())
    policy.load_state_dict({"streak": 1, "scale": 0.25, "scaler_skips": 9})
    assert policy.scale == 0.25
    assert policy.skips_spikes, "the streak goes on"
    policy.update(record("scaler_skip"), FINE)
    assert policy.stop is not None


def test_incidents_say_what_was_seen_and_done() -> None:
    assert incident(record("healthy")) is None
    assert incident(record("unsynced")) is None
    assert incident(record("max_norm")) is None
    spike = incident(record("spike"))
    assert spike is not None
    assert spike.message == "gradient norm 50 above the limit 4 on rank 3, head.weight: rescaled to 1"
    skipped = incident(record("spike", action="skip", grad_norm_applied=0.0))
    assert skipped is not None
    assert skipped.message == "gradient norm 50 above the limit 4 on rank 3, head.weight: skipped the step"
    nan = incident(record("nonfinite", grad_norm=math.nan, nan_count=7))
    assert nan is not None
    assert nan.message == "7 NaN and 0 Inf gradient elements on rank 3, head.weight: skipped the step"
    watched = incident(record("spike", applied=False))
    assert watched is not None
    assert watched.message.endswith("only watched; would have rescaled")
    left_out = incident(record("left_out"))
    assert left_out is not None
    assert left_out.message == (
        "gradients not finite before they were averaged on rank 3, head.weight: left the rank out of the average"
    )
