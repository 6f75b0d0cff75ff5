"""What the losses of training and validation tell: findings, each once while it lasts. Pure Python, no torch, no clock.

Fed with values that are equal on all ranks, it finds the same on all of them at the same step. With x the newest
loss, s the last 128 finite ones before it in order, m their median and f = log where all of them are above 0, else
f(x) = x:

- sigma = (f(upper quartile of s) - f(lower quartile)) / 1.349, the noise, and what the loss has moved meanwhile;
- spike: f(x) - f(m) > max(log `spike_ratio`, `spike_sigmas` sigma), and x above `spike_ratio` times the third largest
  of s: what has come three times is no longer unheard of;
- low: three in a row below m / `low_ratio`, by as many sigmas, and below the third smallest of s; or 32 in a row from
  0 to `low_floor`;
- flat: of 16 blocks that make `flat_steps` losses together, the mean of the newest 8 > the mean of the oldest 8, less
  `flat_fall` of it. What enters a block is clipped to the third smallest and third largest of s. Told again only 2 %
  below where it was told;
- rising: two blocks in a row above the best block + max(`rise` r, 6 standard errors), r = max(best, 2/3 (first -
  best)) as in the detector: a loss that has fallen to a thousandth of its start bounces by multiples of itself. Told
  again only of a best that is 2 % better;
- outlier: in 8 looks more than not, a rank's loss is above `outlier_ratio` times the median of the ranks, or as far
  below it, and 4 sigmas of the ranks away. Of two ranks the higher one is to blame.

All finite losses enter the windows, those told of too: medians and quartiles bear it, and a lasting level shift is the
new normal after 64. NaN and Inf never do. Nothing is said of a level of which there are not 32 losses. A loss from 0
down has no scale: what is relative is not asked of it.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradmon.config import LossConfig
from gradmon.record import Finding

RULES = (
    "loss_nonfinite",
    "loss_spike",
    "loss_low",
    "loss_constant",
    "loss_flat",
    "loss_rising",
    "loss_outlier",
    "overfit",
    "overtraining",
)
WINDOW = 128
#: Fewer losses than this say nothing.
ACTIVE_FROM = 32
#: Observations without a thing after which it has ended, and may be told again.
_QUIET = 256
_BLOCKS = 16
#: Share by which a level must be lower for its trend to be told anew: noise must not begin it again.
_ANEW = 0.02
_ERRORS = 6
"""Standard errors of a block's mean that separate levels: the best of many blocks is by chance some below them all."""
_LOW_IN_A_ROW = 3
_IQR_TO_SIGMA = 1 / 1.349
_LEARNT_SHARE = 2 / 3
_USUAL = 3
"""So many losses in the window make it usual."""
_RANK_SIGMAS = 4.0
_RANK_LOOKS = 8
_RANKS_PER_STEP = 16
"""More ranks are looked at less often, so that a step costs the same."""
_DEBUGGER = "Amazon SageMaker Debugger, rule "


class Stretches:
    """Tells each thing once while it lasts; over once it has not been seen for `quiet` looks."""

    def __init__(self, quiet: int, left: Mapping[str, int] | None = None) -> None:
        self._quiet = quiet
        self._left = dict(left or {})

    def begins(self, key: str, on: bool) -> bool:
        """True if `key` is on and its stretch begins with this look."""
        left = self._left.get(key)
        if on:
            self._left[key] = self._quiet
            return left is None
        if left is not None:
            if left > 1:
                self._left[key] = left - 1
            else:
                del self._left[key]
        return False

    def ends(self, key: str) -> None:
        """The stretch is over now."""
        self._left.pop(key, None)

    def state(self) -> dict[str, int]:
        """What goes on, for `left`."""
        return dict(self._left)


class _Window:
    """The last values, in order of time and of size."""

    def __init__(self, values: Iterable[float]) -> None:
        self.recent: deque[float] = deque(values, maxlen=WINDOW)
        self.ordered = sorted(self.recent)

    def append(self, value: float) -> None:
        if len(self.recent) == WINDOW:
            del self.ordered[bisect.bisect_left(self.ordered, self.recent[0])]
        self.recent.append(value)
        bisect.insort(self.ordered, value)

    def median(self) -> float:
        return self.ordered[len(self.ordered) // 2]

    def sigma(self, *, logs: bool = False) -> float:
        """Of the noise; of its logarithms if `logs`, which needs values above 0."""
        n = len(self.ordered)
        low, high = self.ordered[n // 4], self.ordered[3 * n // 4]
        return (math.log(high) - math.log(low) if logs else high - low) * _IQR_TO_SIGMA


class LossWatch:
    """Watches the losses of one run.

    Args:
        config: thresholds, and which rules are on.
    """

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._block_size = max(1, (config.flat_steps or 1000) // _BLOCKS)
        self._start({})

    @property
    def should_stop(self) -> bool:
        """True while the validation loss has had no new best for `overtraining_patience` observations."""
        return bool(self.why_stop)

    @property
    def why_stop(self) -> str:
        """One sentence for a person; empty while training on is worth it."""
        patience = self._config.overtraining_patience
        if not 0 < patience <= self._since_best or self._best_validation is None:
            return ""
        return (
            f"the validation loss has had no new best in {self._since_best} observations: the best is "
            f"{self._best_validation:.4g}, of step {self._best_step}"
        )

    def update(
        self,
        step: int,
        mean_loss: float | None,
        by_rank: Sequence[float | None] | None,
        validation: float | None,
        healthy: bool,
    ) -> list[Finding]:
        """Take in a step's losses; what is to be told of them. To be called once per step.

        Args:
            step: its number.
            mean_loss: over the ranks; not finite if any rank's is not. None where none was observed.
            by_rank: of each rank, None for one that observed none. None where they are not known.
            validation: newly observed since the last call, else None.
            healthy: False if the step's gradients were not fit to be applied.
        """
        found: list[Finding | None] = []
        if mean_loss is not None:
            finite = math.isfinite(mean_loss)
            found.append(self._nonfinite(mean_loss, by_rank, finite))
            if finite:
                found += self._of_level(mean_loss, healthy)
                if healthy:
                    found += self._of_trend(mean_loss)
        if by_rank is not None and len(by_rank) > 1 and self._config.outlier_ratio > 1:
            found += self._outliers(by_rank)
        if validation is not None:
            found += self._of_validation(step, validation)
        return [finding for finding in found if finding is not None]

    def rebaseline(self) -> None:
        """Forget what was normal: after a deliberate change of the data or the loss, all is new."""
        self._start({})

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes what is told later, as plain values that JSON can hold."""
        return {
            "window": list(self._window.recent),
            "stretches": self._stretches.state(),
            "rank_stretches": self._rank_stretches.state(),
            "same": self._same,
            "low": self._low,
            "floored": self._floored,
            "block": list(self._block),
            "blocks": list(self._blocks),
            "first_block": self._first_block,
            "best_block": self._best_block,
            "risen": self._risen,
            "flat_told_at": self._flat_told_at,
            "rise_told_of": self._rise_told_of,
            "suspects": {str(rank): score for rank, score in self._suspects.items()},
            "looks_left": self._looks_left,
            "best_validation": self._best_validation,
            "best_step": self._best_step,
            "since_best": self._since_best,
            "gaps": self._gaps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. What an older version did not save starts anew."""
        self._start(state)

    def _start(self, known: Mapping[str, Any]) -> None:
        """Set what is remembered: to nothing, or to what was saved."""
        self._window = _Window(known.get("window", ()))
        self._stretches = Stretches(_QUIET, known.get("stretches"))
        self._rank_stretches = Stretches(1, known.get("rank_stretches"))
        self._same: int = known.get("same", 0)
        self._low: int = known.get("low", 0)
        self._floored: int = known.get("floored", 0)
        self._block: list[float] = list(known.get("block", ()))
        self._blocks: deque[float] = deque(known.get("blocks", ()), maxlen=_BLOCKS)
        self._first_block: float | None = known.get("first_block")
        self._best_block: float | None = known.get("best_block")
        self._risen: int = known.get("risen", 0)
        self._flat_told_at: float | None = known.get("flat_told_at")
        """Lowest level that was told to be flat."""
        self._rise_told_of: float | None = known.get("rise_told_of")
        """Best above which the loss was told to rise."""
        self._suspects: dict[int, int] = {int(rank): score for rank, score in known.get("suspects", {}).items()}
        """Rank -> looks in which it stood out, less those in which it did not."""
        self._looks_left: int = known.get("looks_left", 0)
        self._best_validation: float | None = known.get("best_validation")
        self._best_step: int = known.get("best_step", 0)
        self._since_best: int = known.get("since_best", 0)
        self._gaps: int = known.get("gaps", 0)

    # --- not finite ------------------------------------------------------------------------------------------------

    def _nonfinite(self, loss: float, by_rank: Sequence[float | None] | None, finite: bool) -> Finding | None:
        if not self._stretches.begins("loss_nonfinite", not finite) or not self._config.nonfinite:
            return None
        bad = [rank for rank, own in enumerate(by_rank or ()) if own is not None and not math.isfinite(own)]
        where = _ranks(bad) if by_rank is not None and 0 < len(bad) < len(by_rank) else ""
        return Finding(
            rule="loss_nonfinite",
            where=where,
            message=f"the loss is {loss}{' on ' + where if where else ' on all ranks' if len(bad) > 1 else ''}",
            measured=loss,
            source="arithmetic: a mean with one NaN is NaN",
            cure="look for log(0), 0/0, sqrt at 0 and exp of large values; `gradmon replay` finds the operation",
            severity="error",
        )

    # --- against its own level -------------------------------------------------------------------------------------

    def _of_level(self, loss: float, healthy: bool) -> list[Finding | None]:
        """Spike, low and constant; then the loss enters the window."""
        window = self._window
        found: list[Finding | None] = []
        constant = self._is_constant(loss) if healthy else False
        enough = len(window.ordered) >= ACTIVE_FROM
        if self._config.spike_ratio:
            limit = self._spike_limit(loss) if enough else math.inf
            # Of a step whose gradients spiked too the guard has told.
            if self._stretches.begins("loss_spike", healthy and loss > limit):
                found.append(self._spike(loss, limit))
        fell = enough and self._has_fallen(loss)
        self._floored = self._floored + 1 if 0 <= loss <= self._config.low_floor else 0
        floored = self._config.low_floor > 0 and self._floored >= ACTIVE_FROM
        if self._stretches.begins("loss_low", fell or floored):
            found.append(self._too_low(loss, fell))
        if self._stretches.begins("loss_constant", constant):
            found.append(self._constant(loss))
        window.append(loss)
        return found

    def _constant(self, loss: float) -> Finding:
        return Finding(
            rule="loss_constant",
            where="",
            message=f"the loss was exactly {loss:.6g} in {self._same} observations in a row",
            measured=float(self._same),
            threshold=float(self._config.constant_steps),
            source="no two batches give the same loss to the last bit",
            cure="look whether the output still depends on the input (a dead layer, weights all 0), whether the loss "
            "does on the output (labels masked, `detach()`), and whether the batch ever changes",
        )

    def _is_constant(self, loss: float) -> bool:
        recent = self._window.recent
        self._same = self._same + 1 if recent and recent[-1] == loss else 1
        return 0 < self._config.constant_steps <= self._same

    def _spike_limit(self, loss: float) -> float:
        """Above this the loss is a spike."""
        window = self._window
        ordered, middle = window.ordered, window.median()
        usual = ordered[-_USUAL]
        if loss <= usual or loss <= middle:  # nearly always
            return math.inf
        ratio = self._config.spike_ratio
        if ordered[0] > 0:
            margin = max(math.log(ratio), self._config.spike_sigmas * window.sigma(logs=True))
            return max(usual * ratio, middle * math.exp(min(margin, 700.0)))
        margin = max((ratio - 1) * abs(middle), self._config.spike_sigmas * window.sigma())
        return max(usual + (ratio - 1) * abs(usual), middle + margin) if margin > 0 else math.inf

    def _spike(self, loss: float, limit: float) -> Finding:
        middle = self._window.median()
        return Finding(
            rule="loss_spike",
            where="",
            message=f"the loss {loss:.4g} stands far above its running median {middle:.4g}, though its gradients "
            "were not out of the ordinary",
            measured=loss,
            threshold=limit,
            source="running median and quartiles of the last 128 losses",
            cure="if it comes back by itself, look at that step's batch; if not, lower the learning rate or clip",
        )

    def _has_fallen(self, loss: float) -> bool:
        ordered, middle = self._window.ordered, self._window.median()
        if not self._config.low_ratio or not 0 <= loss < middle / self._config.low_ratio:
            self._low = 0
            return False
        lower_quartile = ordered[len(ordered) // 4]
        unusual = loss < ordered[_USUAL - 1] and lower_quartile > 0
        if unusual and loss > 0:
            margin = self._config.spike_sigmas * self._window.sigma(logs=True)
            unusual = math.log(middle) - math.log(loss) > margin
        self._low = self._low + 1 if unusual else 0
        return self._low >= _LOW_IN_A_ROW

    def _too_low(self, loss: float, fell: bool) -> Finding:
        middle = self._window.median() if self._window.ordered else loss
        seen = f"has fallen from {middle:.3g} to {loss:.3g} at once" if fell else f"is no more than {loss:.3g}"
        return Finding(
            rule="loss_low",
            where="",
            message=f"the loss {seen}: too good to be true",
            measured=loss,
            threshold=middle / self._config.low_ratio if fell else self._config.low_floor,
            source="running median of the last 128 losses",
            cure="look whether the labels leak into the input, are masked (all ignore_index) or all the same, whether "
            "the loss is multiplied by 0, and whether the validation loss agrees (if not: overfit)",
        )

    # --- where it is going -----------------------------------------------------------------------------------------

    def _of_trend(self, loss: float) -> list[Finding | None]:
        """Flat and rising; judged once per block."""
        ordered = self._window.ordered
        if len(ordered) >= ACTIVE_FROM:
            loss = min(max(loss, ordered[_USUAL - 1]), ordered[-_USUAL])
        self._block.append(loss)
        if len(self._block) < self._block_size:
            return []
        level, size = statistics.fmean(self._block), len(self._block)
        error = statistics.pstdev(self._block) / math.sqrt(size)
        self._block.clear()
        self._blocks.append(level)
        best, first = self._best_block, self._first_block
        if best is None or first is None:
            self._best_block = self._first_block = level
            return []
        self._best_block = min(best, level)
        rising = self._rising(level, best, first, error)
        return [rising, None if self._risen else self._flat(error)]

    def _rising(self, level: float, best: float, first: float, error: float) -> Finding | None:
        if not self._config.rise or best <= 0:
            return None
        limit = best + max(self._config.rise * max(best, _LEARNT_SHARE * (first - best)), _ERRORS * error)
        self._risen = self._risen + 1 if level > limit else 0
        told = self._rise_told_of
        if self._risen < 2 or (told is not None and best > told * (1 - _ANEW)):
            return None
        self._rise_told_of = best
        return Finding(
            rule="loss_rising",
            where="",
            message=f"the running loss {level:.4g} has risen above its best, {best:.4g}",
            measured=level,
            threshold=limit,
            source=_DEBUGGER + "LossNotDecreasing (5 %)",
            cure="lower the learning rate; look at what changed in the data since the best",
        )

    def _flat(self, error: float) -> Finding | None:
        if not self._config.flat_steps or len(self._blocks) < _BLOCKS or min(self._blocks) <= 0:
            return None
        half = _BLOCKS // 2
        levels = list(self._blocks)
        older, newer = statistics.fmean(levels[:half]), statistics.fmean(levels[half:])
        limit = older * (1 - self._config.flat_fall)
        told = self._flat_told_at
        if newer < limit or (told is not None and newer > told - max(_ANEW * told, _ERRORS * error)):
            return None
        self._flat_told_at = newer
        first = self._first_block or older
        never = older > first * 0.95
        return Finding(
            rule="loss_flat",
            where="",
            message=f"the loss {'has not fallen' if never else 'no longer falls'}: {newer:.4g} now, "
            f"{older:.4g} in the {half * self._block_size} observations before",
            measured=newer,
            threshold=limit,
            source=_DEBUGGER + "LossNotDecreasing",
            cure="look at the learning rate (too high or too low; `gradmon doctor` tests it), at whether labels belong "
            "to their inputs and whether all parameters are trained"
            if never
            else "if it is good enough, stop; else lower the learning rate, or take a larger model or more data",
            severity="warning" if never else "info",
        )

    # --- of the ranks ----------------------------------------------------------------------------------------------

    def _outliers(self, by_rank: Sequence[float | None]) -> list[Finding | None]:
        """At a cadence that grows with the number of ranks."""
        self._looks_left -= 1
        if self._looks_left > 0:
            return []
        self._looks_left = -(-len(by_rank) // _RANKS_PER_STEP)
        known = sorted(loss for loss in by_rank if loss is not None and math.isfinite(loss))
        if len(known) < 2:
            return []
        low, high, middle = self._usual_of_ranks(known)
        out = {rank: loss for rank, loss in enumerate(by_rank) if loss is not None and (loss > high or loss < low)}
        found: list[Finding | None] = []
        for rank in {*out, *self._suspects}:
            score = self._suspects.get(rank, 0) + (1 if rank in out else -1)
            if score <= 0:
                self._suspects.pop(rank, None)
                self._rank_stretches.ends(str(rank))
                continue
            self._suspects[rank] = min(score, 2 * _RANK_LOOKS)
            if score >= _RANK_LOOKS and rank in out and self._rank_stretches.begins(str(rank), True):
                found.append(self._outlier(rank, out[rank], middle, high if out[rank] > high else low))
        return found

    def _usual_of_ranks(self, known: list[float]) -> tuple[float, float, float]:
        """(low, high, middle): what lies outside stands out. `known` is in order."""
        n, ratio = len(known), self._config.outlier_ratio
        middle = known[(n - 1) // 2]  # of two, the lower
        spread = (known[3 * n // 4] - known[n // 4]) * _IQR_TO_SIGMA * _RANK_SIGMAS if n > 4 else 0.0
        if known[0] > 0:
            high = max(middle * ratio, middle + spread)
            return (min(middle / ratio, middle - spread) if n > 2 else -math.inf), high, middle
        margin = max(spread, (ratio - 1) * max(abs(known[0]), abs(known[-1]))) if n > 4 else math.inf
        return middle - margin, middle + margin, middle

    def _outlier(self, rank: int, loss: float, middle: float, limit: float) -> Finding:
        return Finding(
            rule="loss_outlier",
            where=f"rank {rank}",
            message=f"the loss of rank {rank}, {loss:.4g}, stands out from the other ranks' "
            f"{middle:.4g} again and again",
            measured=loss,
            threshold=limit,
            source=f"median and quartiles of the ranks in {_RANK_LOOKS} looks",
            cure="look at the data of that rank's shard and at its machine: a broken GPU computes wrong numbers",
        )

    # --- validation ------------------------------------------------------------------------------------------------

    def _of_validation(self, step: int, loss: float) -> list[Finding | None]:
        if not math.isfinite(loss):
            begins = self._stretches.begins("validation", True) and self._config.nonfinite
            told = Finding("loss_nonfinite", "validation", f"the validation loss is {loss}", loss)
            return [told] if begins else []
        self._stretches.ends("validation")
        best = self._best_validation
        newest_is_best = best is None or loss < best
        if best is None or loss < best - self._config.overtraining_delta * abs(best):
            self._best_validation, self._best_step, self._since_best = loss, step, 0
            self._stretches.ends("overtraining")
        else:
            self._since_best += 1
        return [self._overfit(loss, newest_is_best), self._overtraining(loss)]

    def _overfit(self, validation: float, newest_is_best: bool) -> Finding | None:
        if not self._config.overfit_gap or len(self._window.ordered) < ACTIVE_FROM:
            return None
        training = self._window.median()
        if training <= 0:
            return None
        gap = validation / training - 1
        self._gaps = self._gaps + 1 if gap > self._config.overfit_gap and not newest_is_best else 0
        if self._gaps == 0:
            self._stretches.ends("overfit")
        if not self._stretches.begins("overfit", self._gaps >= self._config.overfit_patience):
            return None
        return Finding(
            rule="overfit",
            where="",
            message=f"the validation loss {validation:.4g} is {gap:.0%} above the training loss "
            f"{training:.4g} and no longer gets better",
            measured=gap,
            threshold=self._config.overfit_gap,
            source=_DEBUGGER + "Overfit (0.1)",
            cure="more data or augmentation, dropout, weight decay, a smaller model; or stop at the best validation",
        )

    def _overtraining(self, validation: float) -> Finding | None:
        if not self._stretches.begins("overtraining", self.should_stop):
            return None
        return Finding(
            rule="overtraining",
            where="",
            message=self.why_stop,
            measured=validation,
            threshold=self._best_validation,
            source=_DEBUGGER + "Overtraining (patience 5, delta 0.01)",
            cure="stop here (`if monitor.should_stop: break`) and keep the checkpoint of the best step",
        )


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
