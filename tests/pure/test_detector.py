from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradmon.config import ClipConfig
from gradmon.detector import ACTIVE_FROM, Detector, RunningMedian


def published_limit(norms: list[float]) -> tuple[float, float]:
    """The formula of the design, written down directly: (spike_above, rescale_to)."""
    levels = [math.log(n) for n in norms if math.isfinite(n) and n > 0]
    jumps = [abs(b - a) for a, b in itertools.pairwise(levels)][-128:]
    window = levels[-65:]
    middle = statistics.median(window)
    sigma = max(0.05, 1.4826 * statistics.median(jumps) / math.sqrt(2))
    caution = math.log(max(1.0, 32 / len(window)))
    return math.exp(middle + max(math.log(4) + caution, 6 * sigma)), math.exp(middle)


norms = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([math.nan, math.inf, 0.0, 1e30]))


@given(st.lists(norms, min_size=1, max_size=300))
def test_limits_are_the_formula(values: list[float]) -> None:
    detector = Detector(ClipConfig())
    for value in values:
        detector.update(value)
    limits = detector.limits()
    if sum(1 for v in values if math.isfinite(v) and v > 0) < ACTIVE_FROM:
        assert limits.spike_above == limits.rescale_to == math.inf
    else:
        above, to = published_limit(values)
        assert limits.spike_above == pytest.approx(above)
        assert limits.rescale_to == pytest.approx(to)


@given(st.lists(st.floats(-10, 10), max_size=40), st.integers(1, 12))
def test_running_median(values: list[float], size: int) -> None:
    running = RunningMedian(size)
    for i, value in enumerate(values, start=1):
        running.append(value)
        assert running.median() == statistics.median(values[max(0, i - size) : i])


def noisy(count: int, level: float = 0.5, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [level * math.exp(generator.gauss(0, 0.1)) for _ in range(count)]


def alarms(values: list[float]) -> list[int]:
    detector = Detector(ClipConfig())
    found = []
    for i, value in enumerate(values):
        if math.isfinite(value) and value > detector.limits().spike_above:
            found.append(i)
        detector.update(value)
    return found


def test_nothing_finite_poisons_it() -> None:
    healthy = noisy(200)
    assert alarms(healthy) == []
    broken = [*healthy[:100], math.nan, math.inf, 1e30, *healthy[100:]]
    assert alarms(broken) == [102]


def test_a_spike_does_not_blind_it() -> None:
    values = noisy(200)
    values[100], values[105] = 500.0, 500.0
    assert alarms(values) == [100, 105]


def test_every_step_of_a_burst_is_seen() -> None:
    values = noisy(200)
    values[100:120] = [30 * v for v in values[100:120]]
    assert alarms(values) == list(range(100, 120))


def test_a_level_shift_is_relearned() -> None:
    values = noisy(200) + noisy(400, level=5.0, seed=1)
    found = alarms(values)
    assert found[0] == 200
    assert found[-1] < 200 + 65, "after half a window the new level is normal"


def test_it_goes_on_where_it_was_saved() -> None:
    first, second = Detector(ClipConfig()), Detector(ClipConfig())
    for value in noisy(150):
        first.update(value)
    second.load_state_dict(first.state_dict())
    assert second.limits() == first.limits()
    for value in noisy(100, seed=3):
        first.update(value)
        second.update(value)
    assert second.limits() == first.limits()


def test_fixed_clip_holds_from_the_first_step() -> None:
    assert Detector(ClipConfig(max_norm=2.0)).limits().max_norm == 2.0
    assert Detector(ClipConfig()).limits().max_norm == math.inf
