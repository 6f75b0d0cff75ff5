"""Weights, gradients and optimizer at a cadence: what moves too fast, not at all, or has died, parameter by parameter.

`MomentSample` measures the optimizers' moments on the device, as `updates` does the weights, and reads nothing back.
`WeightWatch` judges what has landed, on the journal's thread: the rows of a step's `record.Detail` and the moments.

- update_large, update_small: update-to-weight ratio of matrices. Vectors (biases, gains of norms) begin at 0 or 1 and
  move by what their learning rate is; a matrix that was 0 before the step has no ratio;
- weights_unchanged: the ratio is exactly 0, though the gradient is not: rounded away, or not in any optimizer;
- gradients_zero: every element of a matrix's gradient is 0;
- gradients_tiny: root mean square of a matrix's gradient below Adam's epsilon: from there its steps shrink with it. The
  gradient of a bias that a normalisation takes away again is 0 but for rounding, and nothing is wrong.

Legend: P parameters, D columns of a `record.Detail`, M moments.
"""

from __future__ import annotations

import array
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmon.config import WeightsConfig
from gradmon.record import DETAIL_COLUMNS, Finding
from gradmon.stats import constants, dense, flat, numbers

RULES = (
    "update_large",
    "update_small",
    "weights_unchanged",
    "gradients_zero",
    "gradients_tiny",
    "moments_nonfinite",
)
#: What optimizers call their moments: of the gradient, and of its square.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
#: About so many elements are read in all, and at least so many (if it has them) of each parameter.
_BUDGET = 1 << 16
_LEAST = 16
#: Measurements in a row: a lone one may lie in a spike or in the first steps.
_LOOKS = 3
#: Measurements for which a matrix that was 0 is left alone: after k steps a step is still about 1/k of it.
_FRESH = 10
_NONE = -1.0
#: Root mean square of a gradient that has to move weights.
_MOVING = 1e-7
_WORST_IS_LOWEST = frozenset({"update_small", "gradients_tiny"})
_SHOWN = 4
_COLUMNS = len(DETAIL_COLUMNS)
_SUM_OF_SQUARES = DETAIL_COLUMNS.index("sum_of_squares")
_ABS_MAX = DETAIL_COLUMNS.index("abs_max")
_ZEROS = DETAIL_COLUMNS.index("zero_count")
_UPDATE = DETAIL_COLUMNS.index("update_ratio")
_DEBUGGER = "Amazon SageMaker Debugger, rule "


class MomentSample:
    """Norms of the moments that the optimizers hold of `parameters`, in the order of those.

    Args:
        optimizers: whose state is read; it is not changed.
        parameters: P of them, all on one device.
    """

    def __init__(self, optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> None:
        self._optimizers = optimizers
        self._parameters = parameters

    def norms(self) -> Tensor:
        """[P, 2] norms of the first and of the second moment, float64, on the parameters' device; -1 where none is.

        Each is of about so many elements, scaled to all of them; of this rank's shards. Nothing is read back.
        """
        device = dense(self._parameters[0].detach()).device
        norms_PM = torch.full((len(self._parameters), 2), _NONE, dtype=torch.float64, device=device)
        each = max(_LEAST, _BUDGET // len(self._parameters))
        for column, names in enumerate((FIRST_MOMENTS, SECOND_MOMENTS)):
            held = {place: moment for place, moment in self._held(names) if moment.device == device}
            if not held:
                continue
            strides = [max(1, moment.numel() // each) | 1 for moment in held.values()]
            parts = [flat(moment)[::stride] for moment, stride in zip(held.values(), strides, strict=True)]
            norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64))
            norms.mul_(constants(tuple(math.sqrt(stride) for stride in strides), device))
            norms_PM[:, column].index_copy_(0, numbers(tuple(held), device), norms)
        return norms_PM

    def _held(self, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
        """(Place of a parameter, its moment): of the first of the names that its optimizer knows."""
        for place, parameter in enumerate(self._parameters):
            for optimizer in self._optimizers:
                state = optimizer.state.get(parameter)
                moment = next((state[n] for n in names if isinstance(state.get(n), Tensor)), None) if state else None
                if moment is not None and moment.numel() and moment.is_floating_point():
                    yield place, dense(moment.detach())
                    break


class WeightWatch:
    """Judges what was measured of each parameter.

    Args:
        config: thresholds, and which rules are on.
        names: of the P parameters. May grow at its end, and `shapes` with it.
        shapes: theirs; of sharded ones the whole.
    """

    def __init__(self, config: WeightsConfig, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        self._config = config
        self._names = names
        self._shapes = shapes
        self._step = 0
        self._runs: dict[str, dict[int, tuple[int, int]]] = {rule: {} for rule in RULES}
        """Rule -> place of a parameter -> (looks in a row in which it was so, step of the first)."""
        self._fresh: dict[int, int] = {}
        """Place of a matrix that was 0 -> looks for which its ratio says nothing."""
        self._samples: dict[str, float] = {}

    def update(
        self, step: int, detail: bytes | Sequence[float] | None, moments: Sequence[Sequence[float]] | None = None
    ) -> list[Finding]:
        """Take in what was measured in a step; what is to be told of it.

        Args:
            step: its number.
            detail: `Detail.values` of its global gradients, or the same [P, D] numbers in a row. None: not measured.
            moments: [P, 2], `MomentSample.norms` on the host. None: not measured.
        """
        self._step = step
        found: list[Finding | None] = []
        if detail is not None:
            values = array.array("d")
            values.frombytes(detail) if isinstance(detail, bytes) else values.extend(detail)
            found += self._of_gradients(values)
            if not all(map(math.isnan, values[_UPDATE::_COLUMNS])):
                found += self._of_updates(values)
        if moments is not None:
            found.append(self._of_moments(moments))
        return [finding for finding in found if finding is not None]

    def samples(self) -> dict[str, float]:
        """Of the newest measurement: `first_moment_norm` and `second_moment_norm` of all parameters, where finite."""
        return dict(self._samples)

    def _of_gradients(self, values: Sequence[float]) -> list[Finding | None]:
        squares, largest = values[_SUM_OF_SQUARES::_COLUMNS], values[_ABS_MAX::_COLUMNS]
        zero, tiny, looked = {}, {}, []
        limit = self._config.tiny_gradient
        for place, square in enumerate(squares):
            if math.isnan(square) or len(self._shape(place)) < 2:
                continue
            looked.append(place)
            elements = math.prod(self._shape(place))
            if square == 0 and not largest[place] > 0:
                zero[place] = 0.0
            elif square < limit * limit * elements:
                tiny[place] = math.sqrt(square / elements)
        return [
            self._judge(
                "gradients_zero",
                zero,
                looked,
                self._config.zero_looks,
                "every element of the gradient was 0 in {looks} looks in a row, since step {since}",
                threshold=0.0,
                source=_DEBUGGER + "AllZero",
                cure="look for dead ReLUs, weights that are all 0 on both sides, a loss that does not depend on it, "
                "`detach()`; freeze it with requires_grad_(False) if it is not to be trained",
            ),
            self._judge(
                "gradients_tiny",
                tiny,
                looked,
                _LOOKS if limit else 0,
                f"the root mean square of the gradient, {{value:.2g}}, is below {limit:.2g}",
                threshold=limit,
                source=_DEBUGGER + "VanishingGradient (mean |g| < 1e-7); Adam's epsilon, 1e-8",
                cure="residual connections, normalisation layers, ReLU or GELU for saturating activations, He or "
                "Xavier initialisation; fewer layers; a loss scale under fp16",
            ),
        ]

    def _of_updates(self, values: Sequence[float]) -> list[Finding | None]:
        large, small, still, matrices, moving = {}, {}, {}, [], []
        ratios, squares, zeros = (values[column::_COLUMNS] for column in (_UPDATE, _SUM_OF_SQUARES, _ZEROS))
        for place, ratio in enumerate(ratios):
            elements = math.prod(self._shape(place))
            if math.isnan(squares[place]) or not elements:
                continue
            if math.isnan(ratio):
                self._fresh[place] = _FRESH
                continue
            # Of a sparse gradient the sample may hold nothing.
            if squares[place] > _MOVING**2 * elements and not zeros[place] > 0.5 * elements:
                moving.append(place)
                if ratio == 0:
                    still[place] = 0.0
            if len(self._shape(place)) < 2 or self._is_fresh(place):
                continue
            matrices.append(place)
            if ratio > self._config.update_large:
                large[place] = ratio
            elif 0 < ratio < self._config.update_small:
                small[place] = ratio
        return [*self._far(large, small, matrices), self._unchanged(still, moving)]

    def _far(
        self, large: Mapping[int, float], small: Mapping[int, float], matrices: Sequence[int]
    ) -> list[Finding | None]:
        moves = "one step moves the weights by {value:.2g} of their norm"
        return [
            self._judge(
                "update_large",
                large,
                matrices,
                _LOOKS if self._config.update_large else 0,
                moves,
                threshold=self._config.update_large,
                source=_DEBUGGER + "WeightUpdateRatio (10); about 0.001 is usual",
                cure="lower the learning rate, or warm it up for longer",
            ),
            self._judge(
                "update_small",
                small,
                matrices,
                _LOOKS if self._config.update_small else 0,
                moves,
                threshold=self._config.update_small,
                source=_DEBUGGER + "WeightUpdateRatio (1e-8); float32 rounds at 6e-8",
                cure="raise the learning rate; look at the parameter group it is in and at vanishing gradients",
            ),
        ]

    def _unchanged(self, still: Mapping[int, float], moving: Sequence[int]) -> Finding | None:
        return self._judge(
            "weights_unchanged",
            still,
            moving,
            self._config.unchanged_looks,
            "the weights have not changed in {looks} measurements since step {since}, though the gradient is not 0",
            threshold=0.0,
            source=_DEBUGGER + "UnchangedTensor (3)",
            cure="give it to an optimizer; look at the learning rate of its group (0?), at whether the optimizer "
            "holds the parameters of another copy of the model, and whether bfloat16 rounds its updates away",
        )

    def _shape(self, place: int) -> Sequence[int]:
        """Of a parameter that was added meanwhile, and is not known yet: no elements, so that nothing is judged."""
        return self._shapes[place] if place < len(self._shapes) else (0,)

    def _is_fresh(self, place: int) -> bool:
        left = self._fresh.get(place, 0)
        if left:
            self._fresh[place] = left - 1
        return left > 0

    def _of_moments(self, moments: Sequence[Sequence[float]]) -> Finding | None:
        bad, known = {}, []
        for place, norms in enumerate(moments):
            if max(norms) == _NONE:
                continue
            known.append(place)
            if not all(map(math.isfinite, norms)):
                bad[place] = next(norm for norm in norms if not math.isfinite(norm))
        for column, name in enumerate(("first_moment_norm", "second_moment_norm")):
            norms = [row[column] for row in moments if row[column] != _NONE]
            if norms and all(map(math.isfinite, norms)):
                self._samples[name] = math.hypot(*norms)
        spreads = bool(self._runs["moments_nonfinite"])  # from one parameter to all, within a step
        finding = self._judge(
            "moments_nonfinite",
            bad,
            known,
            1 if self._config.moments else 0,
            "the optimizer's moments are {value}, and stay so",
            source="arithmetic: a running mean never gets rid of a NaN",
            cure="load a checkpoint from before; `mode: guard` skips such steps before they reach the moments",
            severity="error",
        )
        return None if spreads else finding

    def _judge(
        self, rule: str, so: Mapping[int, float], looked: Sequence[int], looks: int, message: str, **more: Any
    ) -> Finding | None:
        """A finding when some of the parameters have been so for `looks` in a row; 0: never.

        Args:
            rule: its name.
            so: place of a parameter that is so -> what was measured of it.
            looked: places that could be judged; a run of others goes on.
            looks: in a row.
            message: with `{value}`, `{looks}` and `{since}` to fill in.
            more: fields of the finding.
        """
        runs = self._runs[rule]
        begun = []
        for place in looked:
            if place not in so:
                runs.pop(place, None)
                continue
            count, since = runs.get(place, (0, self._step))
            runs[place] = count + 1, since
            if count + 1 == looks:
                begun.append(place)
        if not begun:
            return None
        worst = (min if rule in _WORST_IS_LOWEST else max)(begun, key=so.__getitem__)
        begun.remove(worst)
        where = ", ".join(self._names[place] for place in [worst, *begun][:_SHOWN])
        where += f" and {len(begun) + 1 - _SHOWN} more" if len(begun) >= _SHOWN else ""
        text = f"{where}: {message.format(value=so[worst], looks=looks, since=runs[worst][1])}"
        measured = so[worst] if so[worst] else None
        return Finding(rule=rule, where=where, message=text, measured=measured, **more)
