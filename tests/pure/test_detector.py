from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmon.config import ClipConfig, TrendConfig
from gradmon.detector import ACTIVE_FROM, Detector, Limits, RunningMedian, RunningMinimum

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import detection

NAN, INF = math.nan, math.inf
#: Short windows, so that short sequences leave them.
SHORT = TrendConfig(drift_ratio=3, drift_steps=40, vanish_ratio=4, vanish_steps=32, vanish_after=30)


class Formulas:
    """The module's formulas, written down directly: everything anew from all levels, in every step."""

    def __init__(self, trend: TrendConfig) -> None:
        self.trend = trend
        self.steps = 0
        self.norms: list[float] = []
        self.levels: list[float] = []
        self.calm: list[float] = []

    def first_limit(self) -> float:
        window = self.levels[-65:]
        if len(self.levels) < 8:
            return INF
        jumps = [abs(b - a) for a, b in itertools.pairwise(self.levels)][-128:]
        sigma = max(0.05, 1.4826 * statistics.median(jumps) / math.sqrt(2))
        caution = math.log(max(1.0, 32 / len(window)))
        return statistics.median(window) + max(math.log(4) + caution, 6 * sigma)

    def spike_above(self) -> float:
        """In log space."""
        if len(self.levels) < 8 or len(self.calm) < 3:
            return self.first_limit()
        highest = max(self.medians(65, first=8))
        return max(self.first_limit(), min(statistics.median(self.calm[-3:]) + math.log(4), highest))

    def medians(self, size: int, first: int) -> list[float]:
        """Running medians, from the step on at which there are `first` values."""
        return [statistics.median(self.levels[max(0, i - size) : i]) for i in range(first, len(self.levels) + 1)]

    def drifting(self) -> bool:
        recent = self.medians(16, first=16)
        if not recent:
            return False
        level = recent[-1]
        if len(self.calm) >= 3:
            last = sorted(self.calm[-3:])
            level = max(level, min(last[2], last[1] + math.log(2)))
        return level > min(recent[-self.trend.drift_steps :]) + math.log(self.trend.drift_ratio)

    def vanished(self) -> bool:
        recent = self.medians(16, first=16)
        if self.norms and self.norms[-1] == 0:
            return True
        if not recent or len(self.norms) <= self.trend.vanish_after:
            return False
        return recent[-1] < max(recent[-self.trend.vanish_steps :]) - math.log(self.trend.vanish_ratio)

    def update(self, norm: float) -> None:
        self.norms.append(norm)
        if math.isfinite(norm) and norm > 0:
            level = math.log(norm)
            if level <= self.spike_above():
                self.calm.append(level)
            self.levels.append(level)


@st.composite
def runs(draw: st.DrawFn, size: int = 120) -> list[float]:
    """Norms that wander, jump, rise, fall, and are none at all."""
    level, found = 0.0, []
    for _ in range(draw(st.integers(1, 8))):
        slope, spread = draw(st.floats(-0.3, 0.3)), draw(st.sampled_from([0.0, 0.02, 0.3]))
        generator = random.Random(draw(st.integers(0, 2**16)))
        for _ in range(draw(st.integers(1, size // 6))):
            level = max(-20.0, min(20.0, level + slope))
            found.append(math.exp(level + generator.gauss(0, spread)))
        found += draw(st.lists(st.sampled_from([NAN, INF, 0.0, 1e30, 3.0 * found[-1], 20.0 * found[-1]]), max_size=3))
    return found[:size]


@settings(max_examples=60, deadline=None)
@given(runs())
def test_limits_and_trends_are_the_formulas(norms: list[float]) -> None:
    detector, formulas = Detector(ClipConfig(), SHORT), Formulas(SHORT)
    for norm in norms:
        limits, above = detector.limits(), formulas.spike_above()
        if above == INF:
            assert limits == Limits()
            assert len(formulas.levels) < ACTIVE_FROM
        else:
            assert math.log(limits.spike_above) == pytest.approx(above, abs=1e-9)
            assert math.log(limits.rescale_to) == pytest.approx(statistics.median(formulas.levels[-65:]), abs=1e-9)
        detector.update(norm)
        formulas.update(norm)
        assert detector.drifting == formulas.drifting()
        assert detector.vanished == formulas.vanished()


@given(st.lists(st.floats(-10, 10), max_size=40), st.integers(1, 12))
def test_running_median(values: list[float], size: int) -> None:
    running = RunningMedian(size)
    for i, value in enumerate(values, start=1):
        running.append(value)
        assert running.median() == statistics.median(values[max(0, i - size) : i])
        assert RunningMedian(size, values[:i]).median() == running.median()
    assert math.isnan(RunningMedian(size).median())


@given(st.lists(st.integers(-5, 5), max_size=40), st.integers(1, 12), st.integers(0, 40))
def test_running_minimum(values: list[int], size: int, saved_at: int) -> None:
    running = RunningMinimum(size)
    assert running.minimum() == INF
    for i, value in enumerate(values, start=1):
        running.append(value)
        assert running.minimum() == min(values[max(0, i - size) : i])
        if i == saved_at:
            running = RunningMinimum(size, running.kept())
        assert len(running.kept()) <= size


# Spikes


def noisy(count: int, level: float = 0.5, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [level * math.exp(generator.gauss(0, 0.1)) for _ in range(count)]


def alarms(norms: Sequence[float], clip: ClipConfig = ClipConfig()) -> list[int]:  # noqa: B008 - it is frozen
    detector = Detector(clip)
    found = []
    for i, norm in enumerate(norms):
        if math.isfinite(norm) and norm > detector.limits().spike_above:
            found.append(i)
        detector.update(norm)
    return found


@pytest.mark.parametrize("strange", [NAN, INF, -INF, 0.0, -0.0, 1e30, 1e-30])
def test_nothing_poisons_it(strange: float) -> None:
    healthy = noisy(400)
    healthy[300:320] = [30 * n for n in healthy[300:320]]
    assert alarms(healthy) == list(range(300, 320))
    broken = [*healthy[:100], *[strange] * 20, *healthy[100:]]
    found = alarms(broken)
    assert found[-20:] == list(range(320, 340)), "it sees as well after as before"
    assert found[:-20] == (list(range(100, 120)) if strange == 1e30 else []), "and nothing that is not there"


def test_poisoned_limits_are_those_without_the_poison() -> None:
    clean, poisoned = Detector(ClipConfig()), Detector(ClipConfig())
    for norm in noisy(100):
        clean.update(norm)
        poisoned.update(norm)
        for strange in (NAN, INF, 0.0):
            poisoned.update(strange)
    assert clean.limits() == poisoned.limits()


def test_a_spike_does_not_blind_it() -> None:
    values = noisy(200)
    values[100], values[105] = 500.0, 5.0
    assert alarms(values) == [100, 105]


def test_a_level_shift_is_relearned() -> None:
    found = alarms(noisy(200) + noisy(400, level=6.0, seed=1))
    assert found == list(range(200, 233)), "x12: after half a window, 33 steps, the new level is normal"
    assert alarms(noisy(200, level=6.0) + noisy(400, seed=1)) == []


def test_the_users_ratio_and_sigmas_count() -> None:
    norms = [*noisy(200), 3.0]
    assert alarms(norms) == [200]
    assert alarms(norms, ClipConfig(spike_ratio=8.0)) == []
    assert alarms(norms, ClipConfig(spike_sigmas=30.0)) == []


def smooth(*legs: tuple[float, int], start: float = 1.0) -> list[float]:
    """Norms that change by a constant factor per step, leg after leg."""
    found = [start]
    for factor, steps in legs:
        for _ in range(steps):
            found.append(found[-1] * factor)
    return found


def test_a_smooth_rise_to_where_it_has_been_is_no_spike() -> None:
    """Adam at convergence: the norm grows a hundredfold, and comes back."""
    norms = smooth((0.99, 700), (1.26, 20), (0.9, 40), (0.99, 100), (1.26, 20))
    assert norms[720] > 90 * norms[700], "far above any limit that a lagging median sets"
    assert alarms(norms) == []
    assert len(alarms(norms[500:])) > 10, "a run that has never been so high has no such excuse"


def test_the_excuse_ends_where_it_has_never_been() -> None:
    norms = smooth((0.99, 700), (1.26, 60))
    highest = statistics.median(norms[:8])
    found = alarms(norms)
    assert [i for i in range(700, 761) if norms[i] > highest] == found
    assert len(found) > 10


def test_the_first_norms_do_not_say_where_it_has_been() -> None:
    norms = [1e3, 1e3, *smooth((0.99, 700), (1.26, 60))]
    assert len([n for n in alarms(norms) if n > 700]) >= 10


def test_a_jump_has_no_excuse() -> None:
    norms = smooth((0.99, 700))
    norms[650], norms[660], norms[680:700] = 8 * norms[650], 100 * norms[660], [20 * n for n in norms[680:700]]
    assert all(n < norms[0] for n in norms[1:]), "it has been higher before"
    assert alarms(norms) == [650, 660, *range(680, 700)]


def test_fixed_clip_holds_from_the_first_step() -> None:
    assert Detector(ClipConfig(max_norm=2.0)).limits() == Limits(max_norm=2.0)
    detector = Detector(ClipConfig(max_norm=2.0))
    for norm in noisy(100):
        detector.update(norm)
    assert detector.limits().max_norm == 2.0
    assert detector.limits().spike_above < 3
    assert Detector(ClipConfig()).limits().max_norm == INF


# Trends


def fed(norms: Sequence[float], trend: TrendConfig = TrendConfig()) -> Detector:  # noqa: B008 - it is frozen
    detector = Detector(ClipConfig(), trend)
    for norm in norms:
        detector.update(norm)
    return detector


def test_a_lasting_rise_is_a_drift_and_ends() -> None:
    low, high = noisy(200), noisy(3000, level=6.0, seed=1)
    assert not fed([*low, *high[:8]]).drifting, "half of the last 16 are low"
    assert fed([*low, *high[:10]]).drifting
    assert fed([*low, *high[:1500]]).drifting
    assert not fed([*low, *high]).drifting, "the low level is more than 2000 steps ago"
    assert not fed([*low, *noisy(100, level=4.0, seed=1)]).drifting, "x8 is none"
    assert fed([*low, *noisy(100, level=4.0, seed=1)], TrendConfig(drift_ratio=6)).drifting
    assert not fed([*high, *low]).drifting


def test_spikes_are_no_drift() -> None:
    norms = noisy(200)
    norms[190:197] = [500.0] * 7
    assert not fed(norms).drifting
    assert not fed([*norms[:190], *[500.0] * 7]).drifting


def test_gradients_that_vanish() -> None:
    gone = [n / 3000 for n in noisy(600, seed=1)]
    assert fed([*noisy(1100), *gone[:10]]).vanished
    assert not fed([*noisy(1100), *gone[:8]]).vanished
    assert not fed([*noisy(900), *gone[:90]]).vanished, "too early in the run"
    assert fed([*noisy(900), *gone[:102]]).vanished
    assert not fed([*noisy(1100), *gone]).vanished, "that is its level now"
    assert not fed([*noisy(1100), *(n / 500 for n in noisy(100, seed=1))]).vanished


def test_a_norm_of_zero_has_vanished_at_once() -> None:
    assert fed([0.5, 0.0]).vanished
    assert fed([0.0]).vanished
    assert not fed([0.5, 0.0, 0.5]).vanished
    assert not fed([0.5, 0.0, NAN]).vanished


def observed(losses: Sequence[float | None]) -> Detector:
    detector = Detector(ClipConfig())
    for loss in losses:
        detector.update(0.5, loss)
    return detector


def has_risen(detector: Detector) -> bool:
    """As the policy asks, with the default `trend.loss_ratio`."""
    return (detector.loss_over_best or 0.0) > 1.15


@given(st.lists(st.one_of(st.floats(0.5, 10), st.sampled_from([NAN, INF, -INF, None])), min_size=18, max_size=60))
def test_loss_over_best_is_its_formula(losses: list[float | None]) -> None:
    finite = [x for x in losses if x is not None and math.isfinite(x)]
    medians = [statistics.median(finite[i - 16 : i]) for i in range(16, len(finite) + 1)]
    detector = observed(losses)
    if not medians:
        assert detector.loss_over_best is None
        assert not has_risen(detector)
    else:
        best = min(medians)
        rise = (medians[-1] - best) / max(best, 2 / 3 * (medians[0] - best))
        assert detector.loss_over_best == pytest.approx(1 + rise)
        assert has_risen(detector) == (1 + rise > 1.15)


def test_what_loss_says() -> None:
    assert observed([2.0] * 15).loss_over_best is None
    assert observed([2.0] * 16).loss_over_best == 1.0
    risen = observed([2.0] * 30 + [2.4] * 20)
    assert risen.loss_over_best == 1.2
    assert has_risen(risen)
    assert has_risen(observed([2.0] * 30 + [2.32] * 20))
    assert not has_risen(observed([2.0] * 30 + [2.28] * 20))
    assert not has_risen(observed([2.0] * 30 + [50.0] * 7 + [NAN] * 100)), "NaN moves no median"
    assert observed([0.5] * 20 + [-0.5] * 40 + [3.0] * 20).loss_over_best is None, "a ratio to a loss below 0 is none"
    assert observed([0.0] * 40).loss_over_best is None
    assert not has_risen(observed([1.0] * 16 + [1e-6] * 40 + [3e-3] * 20)), "it bounces near 0, and has lost nothing"
    assert has_risen(observed([1.0] * 16 + [1e-6] * 40 + [0.2] * 20))


# State


def whole(detector: Detector) -> tuple[Limits, bool, bool, float | None, bool]:
    return (
        detector.limits(), detector.drifting, detector.vanished, detector.loss_over_best,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(runs(), runs(), st.lists(st.sampled_from([NAN, None, 1.0, 2.0, 3.0]), min_size=240, max_size=240))
def test_resumed_is_uninterrupted(before: list[float], later: list[float], losses: list[float | None]) -> None:
    first, second = Detector(ClipConfig(), SHORT), Detector(ClipConfig(), SHORT)
    for norm, loss in zip(before, losses, strict=False):
        first.update(norm, loss)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second.load_state_dict(state)
    assert whole(second) == whole(first)
    for norm, loss in zip(later, losses[120:], strict=False):
        first.update(norm, loss)
        second.update(norm, loss)
        assert whole(second) == whole(first)
    assert second.state_dict() == first.state_dict()


def test_state_of_a_long_run_is_no_longer_than_its_windows() -> None:
    long = fed([*noisy(300), *smooth((1.002, 3000), start=0.5)])
    assert len(json.dumps(long.state_dict())) < 200_000
    resumed = Detector(ClipConfig())
    resumed.load_state_dict(long.state_dict())
    assert long.drifting and resumed.drifting
    fresh = Detector(ClipConfig())
    fresh.load_state_dict(fed(noisy(50)).state_dict())
    fresh.load_state_dict(Detector(ClipConfig()).state_dict())
    assert whole(fresh) == whole(Detector(ClipConfig())), "loading leaves nothing of what was there"


def test_state_of_the_first_version_is_understood() -> None:
    levels = [math.log(n) for n in noisy(65)]
    old = {"levels": levels, "jumps": [abs(b - a) for a, b in itertools.pairwise(levels)], "last": levels[-1]}
    detector = Detector(ClipConfig())
    detector.load_state_dict(old)
    assert detector.limits() == fed(noisy(65)).limits()
    assert not detector.drifting and not detector.vanished and detector.loss_over_best is None
    for norm in noisy(200, level=8.0, seed=1):
        detector.update(norm, 2.0)
    assert detector.drifting or detector.limits().spike_above > 20
    assert detector.loss_over_best == 1.0


def test_a_shorter_window_holds_after_a_resume_too() -> None:
    saved = fed([*noisy(100), *noisy(100, level=8.0, seed=1)])
    assert saved.drifting
    resumed = Detector(ClipConfig(), TrendConfig(drift_steps=50))
    resumed.load_state_dict(saved.state_dict())
    resumed.update(8.0)
    assert not resumed.drifting


def test_rebaseline_forgets_every_reference() -> None:
    detector = Detector(ClipConfig())
    for norm in smooth((0.99, 700), (1.1, 60)):
        detector.update(norm, 1.0)
    for norm in noisy(20, level=50.0):
        detector.update(norm, 3.0)
    assert detector.drifting and has_risen(detector) and detector.limits().spike_above < 50
    detector.rebaseline()
    fresh = Detector(ClipConfig())
    assert whole(detector) == whole(fresh) == (Limits(), False, False, None)
    for norm in noisy(300, level=50.0, seed=2):
        detector.update(norm, 3.0)
        fresh.update(norm, 3.0)
        assert whole(detector) == whole(fresh)
    assert detector.limits().spike_above > 100


def test_rebaseline_does_not_start_the_run_anew() -> None:
    detector = fed(noisy(1000))
    detector.rebaseline()
    for norm in [*noisy(30), *(n / 3000 for n in noisy(12, seed=1))]:
        detector.update(norm)
    assert detector.vanished, "step 1000 was long ago"


# Gates of the benchmark, on fewer seeds


@pytest.mark.parametrize("regime", detection.REGIMES)
def test_false_alarms_are_rare(regime: str) -> None:
    found = 0
    for seed in range(100, 102):
        norms = detection.healthy(regime, 10_000, seed)
        assert len(norms) == 10_000 and min(norms) > 0
        found += len(alarms(norms))
    assert found / 2 <= 5


def test_convergence_needs_the_second_limit() -> None:
    norms = detection.healthy(detection.CONVERGENCE, 10_000, 100)
    assert min(norms) < 1e-6 * norms[0], "it converges"
    assert detection.first_limit_alone(norms) > 100, "and then jitters"
    formulas = Formulas(TrendConfig())
    expected = 0
    for norm in norms[:400]:
        expected += math.log(norm) > formulas.first_limit()
        formulas.update(norm)
    assert detection.first_limit_alone(norms[:400]) == expected


@pytest.mark.parametrize(("factor", "first"), [(30, 12), (10, 40), (5, 40)])
def test_every_spike_is_seen(factor: float, first: int) -> None:
    for seed in range(12):
        detector = Detector(ClipConfig())
        for step, norm in enumerate(detection.healthy("flat", 300, seed), start=1):
            if step >= first:
                assert detector.limits().spike_above < factor * detection.LEVEL, (seed, step)
            detector.update(norm)


def test_every_step_of_a_burst_is_seen() -> None:
    for seed in range(12):
        norms = detection.healthy("flat", 400, seed)
        norms[200:220] = [30 * n for n in norms[200:220]]
        assert alarms(norms) == list(range(200, 220)), seed


@pytest.mark.parametrize("regime", ["flat", "decay x100"])
@pytest.mark.parametrize("rate", detection.RATES)
def test_ramps_are_seen_before_they_reach_twelvefold(regime: str, rate: float) -> None:
    for seed in range(6):
        norms = detection.healthy(regime, 2000, seed)
        detector = fed(norms[:1600])
        assert not detector.drifting
        for k, norm in enumerate(norms[1600:], start=1):
            if norm * rate**k > detector.limits().spike_above:
                break
            detector.update(norm * rate**k)
            if detector.drifting:
                break
        assert 2 < rate**k < 12, seed
