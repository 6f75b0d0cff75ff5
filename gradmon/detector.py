"""Norms and losses -> what the next step's norm may be, and where they are going. Pure Python, no torch, no clock.

With n the global norm and y = log n, over finite n > 0 only, and r the configured `spike_ratio`:

- m = median of the last 65 y;
- sigma = max(0.05, 1.4826 * median of the last 128 |y(t) - y(t-1)| / sqrt 2), the noise of one step;
- f = log max(1, 32 / number of values): more room while little is known;
- a spike is y > max(m + max(log r + f, `spike_sigmas` * sigma), min(c + log r, h)), from the 8th value on, with
  c = the middle one of the last three y that were no spikes, and h = the highest m so far.

All finite values enter the windows, alarmed ones too. Medians bear that, and it is what keeps the detector from being
poisoned (a spike moves nothing) and from locking in (a lasting level shift is the new normal after half a window).

The second limit, min(c + log r, h), is for smooth training. At convergence Adam's steps outgrow the shrunken gradients
again and again: the norm rises by a fifth per step, a hundredfold in all, and comes back by itself, far above any
limit that a lagging median sets. Such a rise is no spike while it leads to where the run has been before. A sudden
jump is one at once (c does not follow it), and so is every norm that is above h and the first limit. Where norms
only go up and down by their noise, h is below the first limit and changes nothing.

Trends, over the steps that have a y; told, no limit depends on them:

- drift: max(median of the last 16 y, d) > log `drift_ratio` + the lowest median of 16 in the last `drift_steps`, with
  d = the highest of the last three y that were no spikes, but at most c + log 2. d is the faster of the two: a rise
  that the second limit lets through is a drift as soon as it has gone so far;
- vanished: the median of the last 16 y < the highest one in the last `vanish_steps` - log `vanish_ratio`, after
  `vanish_after` steps; or the norm is 0;
- the loss over its best: 1 + (l - b) / max(b, 2/3 (a - b)), with l = median of the last 16 finite losses, b = the
  lowest such median so far and a = the first one. That is l / b, unless b is small beside what has been learnt: a loss
  that has fallen to a thousandth of its start bounces around it by multiples, and has lost nothing.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gradmon.config import ClipConfig, TrendConfig

WINDOW = 65
DIFFERENCES = 128
#: Levels, and losses, that a trend is judged by.
RECENT = 16
#: Fewer values than this say nothing.
ACTIVE_FROM = 8
_CALM = 3
_SIGMA_FLOOR = 0.05
#: Consistent with a normal distribution: sigma = 1.4826 * median absolute deviation.
_MAD_TO_SIGMA = 1.4826
_FULL_CONFIDENCE = 32
_LOG_2 = math.log(2)
_LEARNT_SHARE = 2 / 3
_DEFAULT_TREND = TrendConfig()


@dataclass(frozen=True, slots=True)
class Limits:
    """How a step will be judged; known before the step."""

    spike_above: float = math.inf
    """A finite norm above this is a spike."""
    rescale_to: float = math.inf
    """Norm a spike is scaled down to: the running median."""
    max_norm: float = math.inf
    """The user's fixed clip."""
    skip_above: float = math.inf
    """A finite norm above this is skipped, not rescaled; set by the policy within a streak of spikes."""


class RunningMedian:
    """Median of the last `size` values; O(log size) comparisons per value."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._recent: deque[float] = deque(values, maxlen=size)
        self._sorted = sorted(self._recent)

    def __len__(self) -> int:
        return len(self._recent)

    def append(self, value: float) -> None:
        """Add a finite value, forget the oldest one beyond `size`."""
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent[0])]
        self._recent.append(value)
        bisect.insort(self._sorted, value)

    def median(self) -> float:
        """The middle value, or the mean of the middle two; NaN when empty."""
        n = len(self._sorted)
        if n == 0:
            return math.nan
        return self._sorted[n // 2] if n % 2 else (self._sorted[n // 2 - 1] + self._sorted[n // 2]) / 2

    def values(self) -> list[float]:
        """Oldest first."""
        return list(self._recent)


class RunningMinimum:
    """Minimum of the last `size` values; O(1) per value on average.

    Keeps only what can still become the minimum: values that rise from the oldest to the newest.
    """

    def __init__(self, size: int, kept: Iterable[tuple[int, float]] = ()) -> None:
        self._size = size
        self._count = 0
        self._kept = deque((-age, value) for age, value in kept)

    def append(self, value: float) -> None:
        """Add a finite value, forget those beyond `size`."""
        self._count += 1
        while self._kept and self._kept[-1][1] >= value:
            self._kept.pop()
        self._kept.append((self._count, value))
        while self._kept[0][0] <= self._count - self._size:
            self._kept.popleft()

    def minimum(self) -> float:
        """Infinite when empty."""
        return self._kept[0][1] if self._kept else math.inf

    def kept(self) -> list[tuple[int, float]]:
        """(Age, value), oldest first: all that is needed to go on."""
        return [(self._count - index, value) for index, value in self._kept]


class Detector:
    """Learns from every step's global norm and loss what the next norm may be, and whether training goes astray.

    Args:
        clip: what counts as a spike.
        trend: what counts as a drift and as vanished.
    """

    def __init__(self, clip: ClipConfig, trend: TrendConfig = _DEFAULT_TREND) -> None:
        self._clip, self._trend = clip, trend
        self._log_ratio = math.log(clip.spike_ratio)
        self._steps = 0
        self._start({})

    def update(self, norm: float, loss: float | None = None) -> None:
        """Take in a finished step.

        Args:
            norm: global, before any clipping. Zero, NaN and Inf are no level and are left out.
            loss: mean over the ranks; None where it was not observed, left out where it is not finite.
        """
        self._steps += 1
        self._zero = norm == 0
        if loss is not None and math.isfinite(loss):
            self._learn_loss(loss)
        if math.isfinite(norm) and norm > 0:
            self._learn_level(math.log(norm))

    def limits(self) -> Limits:
        """Limits for the next step; no spike limit before `ACTIVE_FROM` values."""
        max_norm = math.inf if self._clip.max_norm is None else self._clip.max_norm
        if len(self._levels) < ACTIVE_FROM:
            return Limits(max_norm=max_norm)
        return Limits(_exp(self._spike_level()), _exp(self._levels.median()), max_norm)

    @property
    def drifting(self) -> bool:
        """True while norms are `drift_ratio` times their lowest level of the last `drift_steps` steps."""
        if len(self._recent) < RECENT:
            return False
        level = self._recent.median()
        if len(self._calm) == _CALM:
            level = max(level, min(max(self._calm), self._calm_level() + _LOG_2))
        return level > self._lowest.minimum() + math.log(self._trend.drift_ratio)

    @property
    def vanished(self) -> bool:
        """True while norms are `vanish_ratio` times smaller than the highest of the last `vanish_steps` steps, or 0."""
        if self._zero or len(self._recent) < RECENT or self._steps <= self._trend.vanish_after:
            return self._zero
        highest = -self._negated.minimum()
        return self._recent.median() < highest - math.log(self._trend.vanish_ratio)

    @property
    def loss_over_best(self) -> float | None:
        """How far the running loss is above its best, 1 at it; None before 16 losses and where that is not above 0."""
        if len(self._losses) < RECENT or self._best_loss <= 0:
            return None
        best = self._best_loss
        return 1 + (self._losses.median() - best) / max(best, _LEARNT_SHARE * (self._first_loss - best))

    def rebaseline(self) -> None:
        """Forget every reference: after a deliberate change of batch size or data mix, all is new."""
        self._start({})

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes later limits and trends, as plain values that JSON can hold."""
        return {
            "steps": self._steps,
            "levels": self._levels.values(),
            "jumps": self._jumps.values(),
            "last": self._last,
            "calm": list(self._calm),
            "highest": self._highest if math.isfinite(self._highest) else None,
            "lowest_recent": [list(pair) for pair in self._lowest.kept()],
            "negated_recent": [list(pair) for pair in self._negated.kept()],
            "zero": self._zero,
            "losses": self._losses.values(),
            "first_loss": self._first_loss if math.isfinite(self._first_loss) else None,
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. What an older version did not save starts anew."""
        self._start(state)
        self._steps = state.get("steps", len(self._levels))

    def _start(self, known: Mapping[str, Any]) -> None:
        """Set what is remembered of earlier steps: to nothing, or to what was saved."""
        levels = known.get("levels", ())
        self._levels = RunningMedian(WINDOW, levels)
        self._recent = RunningMedian(RECENT, levels)
        self._jumps = RunningMedian(DIFFERENCES, known.get("jumps", ()))
        self._last: float | None = known.get("last")
        self._calm: deque[float] = deque(known.get("calm", ()), maxlen=_CALM)
        highest, best_loss = known.get("highest"), known.get("best_loss")
        self._highest: float = -math.inf if highest is None else highest
        self._lowest = RunningMinimum(self._trend.drift_steps, known.get("lowest_recent", ()))
        self._negated = RunningMinimum(self._trend.vanish_steps, known.get("negated_recent", ()))
        self._zero = bool(known.get("zero"))
        self._losses = RunningMedian(RECENT, known.get("losses", ()))
        self._best_loss: float = math.inf if best_loss is None else best_loss
        first_loss = known.get("first_loss")
        self._first_loss: float = self._best_loss if first_loss is None else first_loss

    def _learn_loss(self, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) == RECENT:
            if math.isinf(self._first_loss):
                self._first_loss = self._losses.median()
            self._best_loss = min(self._best_loss, self._losses.median())

    def _learn_level(self, level: float) -> None:
        if level <= self._spike_level():
            self._calm.append(level)
        if self._last is not None:
            self._jumps.append(abs(level - self._last))
        self._last = level
        self._levels.append(level)
        self._recent.append(level)
        if len(self._levels) >= ACTIVE_FROM:
            self._highest = max(self._highest, self._levels.median())
        if len(self._recent) == RECENT:
            self._lowest.append(self._recent.median())
            self._negated.append(-self._recent.median())

    def _spike_level(self) -> float:
        """The logarithm of the spike limit."""
        count = len(self._levels)
        if count < ACTIVE_FROM:
            return math.inf
        sigma = max(_SIGMA_FLOOR, _MAD_TO_SIGMA * self._jumps.median() / math.sqrt(2))
        caution = math.log(max(1.0, _FULL_CONFIDENCE / count))
        margin = max(self._log_ratio + caution, self._clip.spike_sigmas * sigma)
        return max(self._levels.median() + margin, min(self._calm_level() + self._log_ratio, self._highest))

    def _calm_level(self) -> float:
        """The middle one of the last three that were no spikes: follows a rise, not a jump."""
        return sorted(self._calm)[_CALM // 2] if len(self._calm) == _CALM else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
