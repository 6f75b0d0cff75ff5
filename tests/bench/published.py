"""Rules that others have published for gradient norms, each as its own code has it. Pure Python.

A rule sees a step's global norm (and loss) and answers with the factor that the step's gradients are multiplied by: 1
leaves them, less clips, 0 skips, and NaN is what the published arithmetic makes of NaN: the gradients are lost, healthy
ones too. A factor *multiplies*, as published: 0 times a NaN gradient is NaN, so 0 is an exact skip for finite
gradients only, unless the rule says otherwise (`skips_exactly`).

`flagged` says whether the rule calls the step anomalous. Rules that only clip have no word for it, and clip healthy
steps by construction (AutoClip nine of ten); their word is taken to be a factor below `ANOMALOUS`, the same x4 that
gradmon's own limit starts from. A constant clip inside another rule is never a flag.
"""

from __future__ import annotations

import bisect
import math
import operator
from abc import ABC, abstractmethod
from collections import deque

#: A pure clipper calls a step anomalous where it cuts it to less than this.
ANOMALOUS = 0.25


class Rule(ABC):
    """A published rule. After `judge`, `flagged` tells of the same step."""

    name: str
    skips_exactly = False
    """True if a factor of 0 means that the optimizer is not called, not that its update is multiplied by 0."""

    def __init__(self) -> None:
        self.flagged = False

    @abstractmethod
    def judge(self, norm: float, loss: float | None = None) -> float:
        """The factor for this step's gradients; the state moves on."""


class Clip(Rule):
    """`torch.nn.utils.clip_grad_norm_`: g *= min(1, c / (n + 1e-6)), c = 1. The minimum keeps NaN."""

    name = "Clip 1.0"

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        self.max_norm = max_norm

    def judge(self, norm: float, loss: float | None = None) -> float:
        factor = clip_factor(norm, self.max_norm)
        self.flagged = factor < ANOMALOUS
        return factor


class AutoClip(Rule):
    """Seetharaman et al. 2020, github.com/pseeth/autoclip: clips to the 10th percentile of all norms so far.

    The current norm is one of them. One NaN makes `numpy.percentile` NaN, and torch's clip multiplies every gradient
    from then on by it.
    """

    name = "AutoClip"
    PERCENTILE = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._sorted: list[float] = []
        self._seen_nan = False

    def judge(self, norm: float, loss: float | None = None) -> float:
        if math.isnan(norm):
            self._seen_nan = True
        else:
            bisect.insort(self._sorted, norm)
        factor = clip_factor(norm, math.nan if self._seen_nan else self._percentile())
        self.flagged = factor < ANOMALOUS
        return factor

    def _percentile(self) -> float:
        place = (len(self._sorted) - 1) * self.PERCENTILE / 100
        below = int(place)
        share, low = place - below, self._sorted[below]
        return low + share * (self._sorted[below + 1] - low) if share else low


class ZClip(Rule):
    """Kumar et al. 2025, github.com/bluorion-com/ZClip 1.0: clips what is 2.5 deviations above a moving mean.

    The first 25 norms give mean and variance; until then, and on top of its own limit afterwards, norms are clipped to
    1.0. What moves the mean is its own limit where that was exceeded, not the 1.0. Flagged: z > 2.5. One NaN leaves
    mean and variance NaN for ever: what remains is the clip to 1.0.
    """

    name = "ZClip"
    ALPHA, Z, WARMUP, MAX_NORM, EPS = 0.97, 2.5, 25, 1.0, 1e-6

    def __init__(self) -> None:
        super().__init__()
        self._first: list[float] = []
        self._mean = self._var = math.nan

    def judge(self, norm: float, loss: float | None = None) -> float:
        self.flagged = False
        if len(self._first) < self.WARMUP:
            self._first.append(norm)
            self._mean = sum(self._first) / len(self._first)
            self._var = sum((n - self._mean) * (n - self._mean) for n in self._first) / len(self._first)
            return clip_factor(norm, self.MAX_NORM)
        deviation = self._var**0.5
        z = (norm - self._mean) / (deviation + self.EPS)
        self.flagged = z > self.Z
        own = self._mean + self.Z * deviation / (z / self.Z) if self.flagged else norm
        self._mean = self.ALPHA * self._mean + (1 - self.ALPHA) * own
        self._var = self.ALPHA * self._var + (1 - self.ALPHA) * (own - self._mean) * (own - self._mean)
        limit = min(own, self.MAX_NORM)
        return limit / (norm + 1e-6) if norm > limit else 1.0


class SkipStep(Rule):
    """OLMo-core `SkipStepOptimizer`: skips what is 6 deviations above the mean of the previous 128, norm or loss.

    Bessel's deviation; inactive until 64 values are known, the current one included. The factor multiplies the
    optimizer's *update*: a NaN gradient at factor 0 writes NaN into every weight. One NaN in the window makes every
    comparison false: the next 128 steps are skipped.
    """

    name = "OLMo SkipStep"
    WINDOW, SIGMAS = 128, 6.0

    def __init__(self) -> None:
        super().__init__()
        self._norms: deque[float] = deque(maxlen=self.WINDOW)
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def judge(self, norm: float, loss: float | None = None) -> float:
        within = self._within(self._norms, norm)
        if loss is not None:
            within = self._within(self._losses, loss) and within
        self.flagged = not within
        return 1.0 if within else 0.0

    def _within(self, previous: deque[float], value: float) -> bool:
        count = len(previous)
        if count + 1 < self.WINDOW // 2:
            previous.append(value)
            return True
        mean = sum(previous) / count
        apart = [other - mean for other in previous]
        deviation = math.sqrt(sum(map(operator.mul, apart, apart)) / (count - 1))
        previous.append(value)
        return value - mean <= self.SIGMAS * deviation


class LlmC(Rule):
    """karpathy/llm.c `outlier_detector.h`, train_gpt2.cu with `-sg 7 -sl 7`: skips at z > 7 within the last 128.

    The value is itself one of the 128, so that no z can exceed 11.3; sums run on, so that one NaN or Inf makes every
    later z NaN, which skips nothing. Silent until 128 values are known. A skipped step is not taken at all; any other
    is clipped to 1.0. Flagged: skipped.
    """

    name = "llm.c"
    skips_exactly = True
    Z = 7.0

    def __init__(self) -> None:
        super().__init__()
        self._norms, self._losses = _RunningSums(), _RunningSums()

    def judge(self, norm: float, loss: float | None = None) -> float:
        scores = [self._norms.score(norm)]
        if loss is not None:
            scores.append(self._losses.score(loss))
        self.flagged = any(math.isfinite(z) and z > self.Z for z in scores)
        if self.flagged:
            return 0.0
        return 1.0 / norm if norm > 1.0 else 1.0


class _RunningSums:
    """llm.c's window: a ring of the last 128 values, their sum and their sum of squares."""

    SIZE = 128

    def __init__(self) -> None:
        self._ring: deque[float] = deque()
        self._sum = self._squares = 0.0

    def score(self, value: float) -> float:
        """Take the value in; how many deviations it lies above the mean, NaN while that is unknown."""
        full = len(self._ring) == self.SIZE
        if full:
            oldest = self._ring.popleft()
            self._sum -= oldest
            self._squares -= oldest * oldest
        self._ring.append(value)
        self._sum += value
        self._squares += value * value
        if not full:
            return math.nan
        mean = self._sum / self.SIZE
        variance = self._squares / self.SIZE - mean * mean
        if variance == 0.0:
            return 0.0
        return (value - mean) / math.sqrt(variance) if variance > 0.0 else math.nan


class Megatron(Rule):
    """Megatron-core `RerunStateMachine.is_unexpectedly_large`: 10 x the largest of the first 100, never refreshed.

    It reports (and may run the step again), it never changes a gradient: the factor is 1. NaN and Inf are ignored.
    """

    name = "Megatron"
    TIMES, SAMPLES = 10.0, 100

    def __init__(self) -> None:
        super().__init__()
        self._seen, self._largest = 0, 0.0

    def judge(self, norm: float, loss: float | None = None) -> float:
        self.flagged = False
        if not math.isfinite(norm):
            return 1.0
        if self._seen < self.SAMPLES:
            self._seen += 1
            self._largest = max(self._largest, norm)
        else:
            self.flagged = norm >= self.TIMES * self._largest
        return 1.0


class AdaGC(Rule):
    """Wang et al. 2025 (arXiv 2502.11034), github.com/lishuai-97/AdaGC, on one tensor whose norm is the global one.

    For 100 steps norms are clipped to 1.0 and the smallest clipped one is gamma; then h = min(1, 1.05 gamma / n), and
    gamma <- 0.98 gamma + 0.02 h n. Its comparisons are false for NaN: a NaN step passes, and gamma is NaN for ever, so
    that nothing is clipped any more.
    """

    name = "AdaGC"
    WARMUP, MAX_NORM, RELATIVE, BETA = 100, 1.0, 1.05, 0.98

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._gamma: float | None = None

    def judge(self, norm: float, loss: float | None = None) -> float:
        self._steps += 1
        if self._steps <= self.WARMUP:
            coefficient = self.MAX_NORM / (norm + 1e-6)
            factor = coefficient if coefficient < 1.0 else 1.0
            clipped = norm * factor
            if self._gamma is None or clipped < self._gamma:
                self._gamma = clipped
            self.flagged = False
            return factor
        gamma = norm if self._gamma is None else self._gamma
        limit = self.RELATIVE * gamma
        factor = limit / norm if norm > limit else 1.0
        self._gamma = self.BETA * gamma + (1 - self.BETA) * (limit if norm > limit else norm)
        self.flagged = factor < ANOMALOUS
        return factor


#: In the order of the tables.
RULES: tuple[type[Rule], ...] = (ZClip, AutoClip, SkipStep, LlmC, Megatron, AdaGC, Clip)


def clip_factor(norm: float, max_norm: float) -> float:
    """What `torch.nn.utils.clip_grad_norm_` multiplies by; torch's clamp keeps NaN."""
    factor = max_norm / (norm + 1e-6)
    return factor if math.isnan(factor) else min(1.0, factor)
