from __future__ import annotations

import math
from typing import Any

import pytest

from gradmon.config import BackoffConfig
from gradmon.policy import Policy, incident
from gradmon.record import StepRecord


def record(reason: str = "healthy", step: int = 1, **changes: Any) -> StepRecord:
    action = {"spike": "rescale", "nonfinite": "skip", "max_norm": "rescale"}.get(reason, "none")
    values = {
        "step": step, "wall_seconds": 0.0, "step_seconds": 0.1, "grad_norm": 50.0, "grad_norm_applied": 1.0,
        "grad_norm_limit": 4.0, "local_grad_norm": 50.0, "nan_count": 0, "inf_count": 0, "local_nan_count": 0,
        "local_inf_count": 0, "action": action, "reason": reason, "applied": True, "culprit_rank": 3,
        "parameter": "head.weight", "learning_rate": 1e-3, "learning_rate_scale": 1.0,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def scales(reasons: str, config: BackoffConfig | None = None) -> list[float]:
    """The scale after each step; h healthy, s spike, n non-finite, u unsynced, c clipped by max_norm."""
    names = {"h": "healthy", "s": "spike", "n": "nonfinite", "u": "unsynced", "c": "max_norm"}
    policy = Policy(config or BackoffConfig(rewarm=1.5))
    after = []
    for letter in reasons:
        policy.update(record(names[letter]))
        after.append(policy.scale)
    return after


def test_two_spikes_in_a_row_halve_the_rate() -> None:
    assert scales("hsh") == [1, 1, 1]
    assert scales("hss") == [1, 1, 0.5]
    assert scales("ssss") == [1, 0.5, 0.5, 0.25]


def test_healthy_steps_bring_it_back() -> None:
    assert scales("sshhh") == [1, 0.5, 0.75, 1, 1]
    assert scales("ssch") == [1, 0.5, 0.75, 1], "a step the user's own limit clipped is healthy"


def test_skips_never_lower_the_rate() -> None:
    assert scales("nnnnnn") == [1] * 6
    assert scales("ssnn") == [1, 0.5, 0.5, 0.5], "and do not warm it up either"
    assert scales("snsu") == [1, 1, 0.5, 0.5], "a skip between two spikes does not make the first forgotten"


def test_floor_and_switch() -> None:
    assert scales("s" * 20)[-1] == 0.05
    assert scales("ssss", BackoffConfig(after_spikes=0)) == [1] * 4


def test_back_off_is_told_once_with_the_culprit() -> None:
    policy = Policy(BackoffConfig())
    assert policy.update(record("spike", 1)) == []
    (event,) = policy.update(record("spike", 2))
    assert (event.step, event.kind, event.action, event.rank) == (2, "spike_streak", "backoff", 3)
    assert "x0.5" in event.message


def test_state_goes_on() -> None:
    first, second = Policy(BackoffConfig()), Policy(BackoffConfig())
    for reason in ("spike", "spike", "healthy", "spike"):
        first.update(record(reason))
    second.load_state_dict(first.state_dict())
    assert len(second.update(record("spike"))) == len(first.update(record("spike"))) == 1
    assert second.scale == first.scale == pytest.approx(0.5 * 1.02 * 0.5)


def test_incidents_say_what_was_seen_and_done() -> None:
    assert incident(record("healthy")) is None
    assert incident(record("unsynced")) is None
    assert incident(record("max_norm")) is None
    spike = incident(record("spike"))
    assert spike is not None
    assert spike.message == "gradient norm 50 above the limit 4 on rank 3, head.weight: rescaled to 1"
    nan = incident(record("nonfinite", grad_norm=math.nan, nan_count=7))
    assert nan is not None
    assert nan.message == "7 NaN and 0 Inf gradient elements on rank 3, head.weight: skipped the step"
    watched = incident(record("spike", applied=False))
    assert watched is not None
    assert watched.message.endswith("only watched; would have rescaled")
