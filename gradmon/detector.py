"""Norms and losses -> limits and trends: what the next step's norm may be, and where the run is going. Pure Python.

With n the global norm and y = log n, over finite n > 0 only:

- m = median of the last 65 y;
- sigma = max(0.05, 1.4826 * median of the last 128 |y(t) - y(t-1)| / sqrt 2), the noise of one step;
- f = log max(1, 32 / number of values): more room while little is known;
- a spike is y - m > max(log 4 + f, 6 sigma).

All finite values enter the window, alarmed ones too. Medians bear that, and it is what keeps the detector from being
poisoned (a spike moves nothing) and from locking in (a lasting level shift is the new normal after half a window).

The *level* is the median of the last 16 y. Gradients drift while it is above log 10 + its minimum over the last 2000
steps; they have vanished while it is below its maximum over the last 500 steps - log 1000, or a norm is exactly 0. The
*running loss* is the median of the last 16 finite losses, and is compared with the best it has been.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradmon.config import ClipConfig, TrendConfig

WINDOW = 65
DIFFERENCES = 128
#: Fewer values than this say nothing.
ACTIVE_FROM = 8
#: Values whose median is the level, or the running loss.
LEVEL = 16
_SIGMA_FLOOR = 0.05
#: Consistent with a normal distribution: sigma = 1.4826 * median absolute deviation.
_MAD_TO_SIGMA = 1.4826
_FULL_CONFIDENCE = 32


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
        self._recent: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._recent)

    @property
    def full(self) -> bool:
        """True once there are `size` values."""
        return len(self._recent) == self._recent.maxlen

    def append(self, value: float) -> None:
        """Add a finite value, forget the oldest one beyond `size`."""
        if self.full:
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


class SlidingMinimum:
    """Minimum of the values of the last `steps` steps; O(1) per value, on average.

    Of all values only those are kept that are smaller than every later one.
    """

    def __init__(self, steps: int, kept: Iterable[tuple[int, float]] = ()) -> None:
        self._steps = steps
        self._kept: deque[tuple[int, float]] = deque((int(step), float(value)) for step, value in kept)

    def append(self, step: int, value: float) -> None:
        """The value of `step`; steps only grow."""
        while self._kept and self._kept[-1][1] >= value:
            self._kept.pop()
        self._kept.append((step, value))
        while self._kept[0][0] <= step - self._steps:
            self._kept.popleft()

    def minimum(self) -> float:
        """Infinite when empty."""
        return self._kept[0][1] if self._kept else math.inf

    def kept(self) -> list[tuple[int, float]]:
        """What makes another one of it."""
        return list(self._kept)


class Detector:
    """Learns from every step what the next one may be. Give it values that are equal on all ranks."""

    def __init__(self, clip: ClipConfig, trend: TrendConfig | None = None) -> None:
        self._clip = clip
        self._trend = TrendConfig() if trend is None else trend
        self._steps = 0
        self.rebaseline()

    def rebaseline(self) -> None:
        """Forget every reference, for a deliberate change of batch size or data."""
        self._last: float | None = None
        self._levels = RunningMedian(WINDOW)
        self._jumps = RunningMedian(DIFFERENCES)
        self._recent = RunningMedian(LEVEL)
        self._lowest = SlidingMinimum(self._trend.drift_steps)
        self._highest = SlidingMinimum(self._trend.vanish_steps)  # of the negative level
        self._losses = RunningMedian(LEVEL)
        self._best_loss = math.inf
        self._zero = False

    def update(self, norm: float, loss: float | None = None) -> None:
        """Take in a finished step. Zero, NaN and Inf are no level and are left out, and so is such a loss.

        Args:
            norm: global, before any clipping.
            loss: mean over the ranks; None where none is observed.
        """
        self._steps += 1
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
            if self._losses.full:
                self._best_loss = min(self._best_loss, self._losses.median())
        self._zero = norm == 0
        if not (math.isfinite(norm) and norm > 0):
            return
        level = math.log(norm)
        if self._last is not None:
            self._jumps.append(abs(level - self._last))
        self._last = level
        self._levels.append(level)
        self._recent.append(level)
        if self._recent.full:
            self._lowest.append(self._steps, self._recent.median())
            self._highest.append(self._steps, -self._recent.median())

    def limits(self) -> Limits:
        """Limits for the next step; no spike limit before `ACTIVE_FROM` values."""
        max_norm = math.inf if self._clip.max_norm is None else self._clip.max_norm
        count = len(self._levels)
        if count < ACTIVE_FROM:
            return Limits(max_norm=max_norm)
        middle = self._levels.median()
        sigma = max(_SIGMA_FLOOR, _MAD_TO_SIGMA * self._jumps.median() / math.sqrt(2))
        caution = math.log(max(1.0, _FULL_CONFIDENCE / count))
        margin = max(math.log(self._clip.spike_ratio) + caution, self._clip.spike_sigmas * sigma)
        return Limits(spike_above=_exp(middle + margin), rescale_to=_exp(middle), max_norm=max_norm)

    @property
    def drifting(self) -> bool:
        """True while recent norms are many times their lowest level."""
        return self._recent.full and self._recent.median() - self._lowest.minimum() > math.log(self._trend.drift_ratio)

    @property
    def vanished(self) -> bool:
        """True while recent norms are a tiny part of their highest level, or the newest is exactly 0."""
        if self._steps <= self._trend.vanish_after:
            return False
        fallen = -self._highest.minimum() - self._recent.median() if self._recent.full else 0.0
        return self._zero or fallen > math.log(self._trend.vanish_ratio)

    @property
    def loss_over_best(self) -> float | None:
        """Running loss over the best it has been; None before 16 losses, and where it is not above 0."""
        if not self._losses.full or not self._best_loss > 0:
            return None
        return self._losses.median() / self._best_loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes later answers, as plain values."""
        return {
            "steps": self._steps,
            "last": self._last,
            "levels": self._levels.values(),
            "jumps": self._jumps.values(),
            "recent": self._recent.values(),
            "lowest": self._lowest.kept(),
            "highest": self._highest.kept(),
            "losses": self._losses.values(),
            "best_loss": None if math.isinf(self._best_loss) else self._best_loss,
            "zero": self._zero,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; what an older version did not save starts anew."""
        best = state.get("best_loss")
        self._steps = int(state.get("steps", len(state["levels"])))
        self._last = state["last"]
        self._levels = RunningMedian(WINDOW, state["levels"])
        self._jumps = RunningMedian(DIFFERENCES, state["jumps"])
        self._recent = RunningMedian(LEVEL, state.get("recent", ()))
        self._lowest = SlidingMinimum(self._trend.drift_steps, state.get("lowest", ()))
        self._highest = SlidingMinimum(self._trend.vanish_steps, state.get("highest", ()))
        self._losses = RunningMedian(LEVEL, state.get("losses", ()))
        self._best_loss = math.inf if best is None else float(best)
        self._zero = bool(state.get("zero", False))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
