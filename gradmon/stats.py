"""Gradients -> one small tensor of statistics, exact, without waiting for the device.

Legend: P parameters, K statistics (`record.STATISTICS`), shapes as suffixes: `stats_PK` is [P, K], float64.

A norm is the square root of a sum of squares. Squares of float32 overflow above 1.8e19 and vanish below 1e-19, float16
sums lose their digits: a finite gradient must give a finite, accurate norm all the same.

- CUDA: one pass of a Triton kernel over all gradients, everything at once (`kernels`); where Triton is missing, torch's
  foreach operations in float64.
- CPU: `vector_norm` over rows of 4 k elements runs at memory speed; rows are added in float64. Minimum and maximum are
  a second read, zeros a third, so the caller says in which steps it wants them. A parameter whose sum is not finite or
  too small for float32 is read again, slowly and with everything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmon import kernels
from gradmon.record import STATISTICS

__all__ = ["STATISTICS", "dense", "flat", "measure", "total_norm"]

SUM_OF_SQUARES, NAN_COUNT, INF_COUNT, ZERO_COUNT, ABS_MAX, MINIMUM, MAXIMUM = range(len(STATISTICS))
#: The statistics that add up over shards; the others are maxima (or minima).
SUMS = 4
#: Elements in a row of `vector_norm`: a longer float32 sum loses digits, a shorter one speed.
_ROW = 1 << 12
#: Tensors of up to so many elements are measured in one call, middling ones cut into pieces of that size.
_SMALL = 1 << 15
_MIDDLING = 16 * _SMALL
#: Half-precision values are widened in pieces of this size, so that no copy of a gradient is ever made.
_PIECE = 1 << 17
_WIDE = (torch.float32, torch.float64)
#: Below this a sum of float32 squares may have lost elements to underflow.
_TINY = 1e-24


def dense(gradient: Tensor) -> Tensor:
    """The numbers a gradient really holds: a sparse one's values, a complex one's two halves, a DTensor's own shard."""
    if type(gradient) is not Tensor and hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    if gradient.layout != torch.strided:
        gradient = (gradient.coalesce() if gradient.is_sparse else gradient).values()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())  # autograd leaves conjugates for whoever reads them
    return gradient


def elements(gradient: Tensor) -> int:
    """How many numbers the statistics are over; of a DTensor all of them, wherever they lie."""
    if gradient.layout != torch.strided:
        return dense(gradient).numel()
    return gradient.numel() * (2 if gradient.is_complex() else 1)


def flat(value: Tensor) -> Tensor:
    """As one dimension; a view for every tensor without gaps, whatever the order of its dimensions in memory."""
    if not value.is_contiguous():
        strides = value.stride()
        value = value.permute(sorted(range(value.dim()), key=lambda d: -strides[d]))
    return value.reshape(-1)


def reads_are_free(device: torch.device) -> bool:
    """True where looking at a value does not wait for the device."""
    return device.type == "cpu"


def measure(
    gradients: Sequence[Tensor], *, extremes: bool = True, zeros: bool = True, host_reads: bool | None = None
) -> Tensor:
    """Statistics of each gradient.

    Args:
        gradients: P tensors, of any real or complex dtype, layout and shape (empty ones too).
        extremes: whether minimum, maximum and abs_max are asked for; without, they may be NaN.
        zeros: the same for the number of zeros.
        host_reads: whether the code may look at values to save work. Free on CPU, a synchronisation elsewhere; None
            takes what fits the device. What is asked for is the same.

    Returns:
        `stats_PK`, float64, on the gradients' device. Nothing is read back to the host, except on CPU.
    """
    # the common case, without a call for each
    plain = all(type(g) is Tensor and g.layout is torch.strided and not g.is_complex() for g in gradients)
    values = list(gradients) if plain else [dense(g) for g in gradients]
    if not values:
        return torch.zeros(0, len(STATISTICS), dtype=torch.float64, device="cpu")
    device = values[0].device
    if any(v.device != device for v in values):
        parts = [measure([v], extremes=extremes, zeros=zeros, host_reads=host_reads) for v in values]
        return torch.cat([part.to(device) for part in parts])
    if host_reads is None:
        host_reads = reads_are_free(device)
    if host_reads:
        return _measure_on_host(values, extremes, zeros)
    if device.type == "cuda" and kernels.available(device):
        return kernels.measure(values)
    return _measure_by_foreach(values, extremes, zeros)


def total_norm(stats_PK: Tensor) -> Tensor:
    """The 2-norm over all P gradients together, as a 0-dim float64 tensor; NaN or Inf if any element is."""
    return stats_PK[:, SUM_OF_SQUARES].sum().sqrt()


def _measure_by_foreach(values: Sequence[Tensor], extremes: bool, zeros: bool) -> Tensor:
    """On devices without Triton: more passes, and for the extremes a copy of one gradient at a time."""
    stats_PK = torch.full((len(values), len(STATISTICS)), math.nan, dtype=torch.float64, device=values[0].device)
    norms = torch._foreach_norm(list(values), 2, dtype=torch.float64)
    stats_PK[:, SUM_OF_SQUARES] = torch.stack(norms).square_()
    stats_PK[:, NAN_COUNT] = torch.stack([v.isnan().sum() for v in values])
    stats_PK[:, INF_COUNT] = torch.stack([v.isinf().sum() for v in values])
    if zeros:
        stats_PK[:, ZERO_COUNT] = torch.stack([(v == 0).sum() for v in values])
    if extremes:
        lowest = torch.stack([_finite_or(v, math.inf).amin().double() for v in values])
        highest = torch.stack([_finite_or(v, -math.inf).amax().double() for v in values])
        stats_PK[:, MINIMUM], stats_PK[:, MAXIMUM] = lowest, highest
        stats_PK[:, ABS_MAX] = torch.maximum(-lowest, highest).clamp_(min=0)
    return stats_PK


def _finite_or(value: Tensor, other: float) -> Tensor:
    """With `other` for what is not finite, and behind the last element, so that an empty tensor has an extreme too."""
    return torch.nn.functional.pad(flat(torch.where(value.isfinite(), value, other)), (0, 1), value=other)


def _measure_on_host(values: Sequence[Tensor], extremes: bool, zeros: bool) -> Tensor:
    stats_PK = torch.full((len(values), len(STATISTICS)), math.nan, dtype=torch.float64, device="cpu")
    values = [v if v.is_contiguous() else flat(v) for v in values]  # some operations would copy them, each anew
    squares_P = _sums_of_squares(values)
    stats_PK[:, SUM_OF_SQUARES] = squares_P
    stats_PK[:, NAN_COUNT : INF_COUNT + 1] = 0
    lowest, highest = torch.aminmax(squares_P)
    doubtful: list[int] = []
    if not (float(lowest) > _TINY and float(highest) < math.inf):  # NaN too
        doubtful = (~((squares_P > _TINY) & squares_P.isfinite())).nonzero().flatten().tolist()
    if extremes:
        _put_extremes(stats_PK, values, frozenset(doubtful))
    if zeros:
        stats_PK[:, ZERO_COUNT] = torch.tensor(
            [v.numel() - int(v.count_nonzero()) for v in values], device="cpu"
        ).double()
    for p in doubtful:  # rare, so it may cost more passes
        stats_PK[p] = torch.tensor(_careful(flat(values[p])), dtype=torch.float64, device="cpu")
    return stats_PK


def _sums_of_squares(values: Sequence[Tensor]) -> Tensor:
    """squares_P in float64; not finite where a gradient is not, or is too large for float32.

    Rows of small and middling tensors go into one call: there calls are what costs.
    """
    pieces: list[Tensor] = []
    counts: list[int] = []
    large: list[tuple[int, Tensor]] = []
    for p, value in enumerate(values):
        size = value.numel()
        if size <= _SMALL:
            pieces.append(value)
            counts.append(1)
        elif size <= _MIDDLING and value.dtype in _WIDE:
            rows = torch.split(flat(value), _SMALL)
            pieces.extend(rows)
            counts.append(len(rows))
        else:
            large.append((p, flat(value)))
            counts.append(0)
    squares_P = torch.zeros(len(values), dtype=torch.float64, device="cpu")
    if pieces:
        wide = any(piece.dtype == torch.float64 for piece in pieces)
        norms = torch._foreach_norm(pieces, 2, dtype=torch.float64 if wide else torch.float32)
        squares = torch.stack(list(norms)).double().square_()
        if len(pieces) == len(values) and not large:
            return squares
        squares_P.index_add_(0, _owners(tuple(counts)), squares)
    for p, value in large:
        squares_P[p] = _large_sum_of_squares(value)
    return squares_P


@functools.lru_cache(maxsize=64)
def _owners(counts: tuple[int, ...]) -> Tensor:
    """For each piece the number, from 0, of the parameter it is of."""
    return torch.repeat_interleave(torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu"))


def _large_sum_of_squares(value: Tensor) -> Tensor:
    if value.dtype not in _WIDE:
        return torch.stack([_large_sum_of_squares(piece.float()) for piece in torch.split(value, _PIECE)]).sum()
    whole = value.numel() // _ROW * _ROW
    # In rows, because a norm over one dimension is faster and more exact than one over everything.
    squares: Tensor = torch.linalg.vector_norm(value[:whole].view(-1, _ROW), dim=1).double().square_().sum()
    if whole < value.numel():
        squares += torch.linalg.vector_norm(value[whole:]).double().square_()
    return squares


def _put_extremes(stats_PK: Tensor, values: Sequence[Tensor], doubtful: frozenset[int]) -> None:
    found = [(p, *torch.aminmax(v)) for p, v in enumerate(values) if p not in doubtful]
    if not found:
        return
    if len({lowest.dtype for _, lowest, _ in found}) > 1:
        found = [(p, lowest.double(), highest.double()) for p, lowest, highest in found]
    lowest = torch.stack([pair[1] for pair in found]).double()
    highest = torch.stack([pair[2] for pair in found]).double()
    columns = torch.stack((torch.maximum(-lowest, highest), lowest, highest), 1)
    if len(found) == len(values):
        stats_PK[:, ABS_MAX:] = columns
    else:
        stats_PK[[pair[0] for pair in found], ABS_MAX:] = columns


def _careful(value: Tensor) -> list[float]:
    """All statistics of one gradient in float64, piece by piece."""
    if value.numel() and not int(value.count_nonzero()):  # not any(): that one copies
        return [0.0, 0.0, 0.0, float(value.numel()), 0.0, 0.0, 0.0]  # an unused parameter, in every step
    squares = nans = infs = zeros = 0.0
    lowest, highest = math.inf, -math.inf
    for piece in torch.split(value, _SMALL):
        wide = piece.double()
        squares += float(torch.dot(wide, wide))
        nans += int(wide.isnan().sum())
        infs += int(wide.isinf().sum())
        zeros += wide.numel() - int(wide.count_nonzero())
        finite = wide[wide.isfinite()]
        if finite.numel():
            low, high = map(float, torch.aminmax(finite))
            lowest, highest = min(lowest, low), max(highest, high)
        del wide, finite  # before the next ones are made
    return [squares, nans, infs, zeros, max(0.0, -lowest, highest), lowest, highest]


@functools.lru_cache(maxsize=64)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant on a device: copied there once, since each copy of host memory is a synchronisation."""
    return torch.tensor(values, device=device)


@functools.lru_cache(maxsize=64)
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The same for numbers that are not whole, in float64."""
    return torch.tensor(values, dtype=torch.float64, device=device)
