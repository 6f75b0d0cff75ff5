"""Norms -> limits: what the next step's gradient norm may be. Pure Python, no torch, no clock.

With n the global norm and y = log n, over finite n > 0 only:

- m = median of the last 65 y;
- sigma = max(0.05, 1.4826 * median of the last 128 |y(t) - y(t-1)| / sqrt 2), the noise of one step;
- f = log max(1, 32 / number of values): more room while little is known;
- a spike is y - m > max(log 4 + f, 6 sigma).

All finite values enter the window, alarmed ones too. Medians bear that, and it is what keeps the detector from being
poisoned (a spike moves nothing) and from locking in (a lasting level shift is the new normal after half a window).
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from gradmon.config import ClipConfig

WINDOW = 65
DIFFERENCES = 128
#: Fewer values than this say nothing.
ACTIVE_FROM = 8
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


class RunningMedian:
    """Median of the last `size` values; O(log size) comparisons per value."""

    def __init__(self, size: int) -> None:
        self._recent: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []

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


class Detector:
    """Learns from every step's global norm what the next one may be."""

    def __init__(self, config: ClipConfig) -> None:
        self._config = config
        self._levels = RunningMedian(WINDOW)
        self._jumps = RunningMedian(DIFFERENCES)
        self._last: float | None = None

    def update(self, norm: float) -> None:
        """Take in the norm of a finished step. Zero, NaN and Inf are no level and are left out."""
        if not (math.isfinite(norm) and norm > 0):
            return
        level = math.log(norm)
        if self._last is not None:
            self._jumps.append(abs(level - self._last))
        self._last = level
        self._levels.append(level)

    def limits(self) -> Limits:
        """Limits for the next step; no spike limit before `ACTIVE_FROM` values."""
        max_norm = math.inf if self._config.max_norm is None else self._config.max_norm
        count = len(self._levels)
        if count < ACTIVE_FROM:
            return Limits(max_norm=max_norm)
        middle = self._levels.median()
        sigma = max(_SIGMA_FLOOR, _MAD_TO_SIGMA * self._jumps.median() / math.sqrt(2))
        caution = math.log(max(1.0, _FULL_CONFIDENCE / count))
        margin = max(math.log(self._config.spike_ratio) + caution, self._config.spike_sigmas * sigma)
        return Limits(spike_above=_exp(middle + margin), rescale_to=_exp(middle), max_norm=max_norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes later limits, as plain values."""
        return {"levels": self._levels.values(), "jumps": self._jumps.values(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._levels, self._jumps = RunningMedian(WINDOW), RunningMedian(DIFFERENCES)
        for value in state["levels"]:
            self._levels.append(value)
        for value in state["jumps"]:
            self._jumps.append(value)
        self._last = state["last"]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
