"""How far a step moves the weights, relative to the weights: measured at a cadence, on a sample of the elements.

A copy of all weights would cost as much memory as the model; every so-many-th element of each parameter tells as much.

Legend: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmon.stats import dense, flat

#: About so many elements are kept in all, and about so many (if it has them) of each parameter at the least.
_BUDGET = 1 << 16
_LEAST = 16


class UpdateSample:
    """Taken before a step; `ratios` after it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = [dense(p.detach()) for p in parameters]
        if len({p.device for p in self._parameters}) != 1:
            raise ValueError("updates are measured of parameters on one device")
        each = max(_LEAST, _BUDGET // max(1, len(parameters)))
        self._strides = [_stride(p, each) for p in self._parameters]
        self._before = [_sample(p, s).clone() for p, s in zip(self._parameters, self._strides, strict=True)]

    def ratios(self) -> tuple[Tensor, Tensor]:
        """(norm of the update / norm of the weights) of each parameter, [P], and of all, 0-dim; NaN where those are 0.

        Float64, on the parameters' device; of this rank's shards. Nothing is read back.
        """
        now = [_sample(p, s) for p, s in zip(self._parameters, self._strides, strict=True)]
        # A copy in any case: what `double` gives for float64 is the weights themselves.
        moved = [a.to(torch.float64, copy=True).sub_(b) for a, b in zip(now, self._before, strict=True)]
        updates_P = torch.stack(torch._foreach_norm(moved)).square_()
        weights_P = torch.stack(torch._foreach_norm(self._before, 2, dtype=torch.float64)).square_()
        # Each sampled element stands for as many as its parameter's stride.
        shares_P = torch.cat([torch.full((1,), s, dtype=torch.float64, device=updates_P.device) for s in self._strides])
        weights_P.masked_fill_(weights_P == 0, math.nan)
        whole = (updates_P * shares_P).sum() / (weights_P * shares_P).nansum()
        return (updates_P / weights_P).sqrt_(), whole.sqrt_()


def _stride(value: Tensor, wanted: int) -> int:
    """For about `wanted` elements; it shares no factor with a row's length, else few columns would ever be met."""
    stride = max(1, -(-value.numel() // wanted))
    while value.dim() > 1 and math.gcd(stride, value.shape[-1]) > 1 and stride > 1:
        stride += 1
    return stride


def _sample(value: Tensor, stride: int) -> Tensor:
    return flat(value)[::stride]
