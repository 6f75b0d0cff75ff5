"""Gradients -> one small tensor of statistics, exact, without waiting for the device.

Legend: P parameters, K statistics (`STATISTICS`), shapes as suffixes: `stats_PK` is [P, K], float64.

A norm is the square root of a sum of squares. Squares of float32 overflow above 1.8e19 and float16 sums lose their
digits, so a finite gradient must be able to give a sum that float32 cannot hold. On CPU, chunks of 128 k elements go
through `dot` (memory speed) and are added in float64; only where that is not finite are the chunks read again, in
float64. On other devices everything is accumulated in float64 at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: The columns of `stats_PK`. Counts are of elements.
STATISTICS = ("sum_of_squares", "nan_count", "inf_count")
SUM_OF_SQUARES, NAN_COUNT, INF_COUNT = range(len(STATISTICS))
#: An unchunked `dot` over 38 M elements is 1.2e-4 off; sums of chunks of this size, added in float64, 3e-8.
_CHUNK = 1 << 17


def dense(gradient: Tensor) -> Tensor:
    """The numbers a gradient really holds: a sparse one's values, a complex one's two halves, a DTensor's own shard."""
    if type(gradient) is not Tensor and hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    if gradient.layout != torch.strided:
        gradient = gradient.coalesce().values()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return gradient


def measure(gradients: Sequence[Tensor], *, host_reads: bool | None = None) -> Tensor:
    """Statistics of each gradient.

    Args:
        gradients: P tensors on one device, of any real or complex dtype, layout and shape (empty ones too).
        host_reads: whether the code may look at values to save work. Free on CPU, a synchronisation elsewhere; None
            takes what fits the device. The result is the same.

    Returns:
        `stats_PK`, float64, on the gradients' device. Nothing is read back to the host, except on CPU.
    """
    values = [dense(g) for g in gradients]
    if not values:
        return torch.zeros(0, len(STATISTICS), dtype=torch.float64)
    device = values[0].device
    if any(v.device != device for v in values):
        return torch.cat([measure([v], host_reads=host_reads).to(device) for v in values])
    if host_reads is None:
        host_reads = device.type == "cpu"
    stats_PK = torch.zeros(len(values), len(STATISTICS), dtype=torch.float64, device=device)
    if not host_reads:
        norms = torch._foreach_norm(values, 2, dtype=torch.float64)
        stats_PK[:, SUM_OF_SQUARES] = torch.stack(norms).square_()
        stats_PK[:, NAN_COUNT] = torch.stack([v.isnan().sum() for v in values])
        stats_PK[:, INF_COUNT] = torch.stack([v.isinf().sum() for v in values])
        return stats_PK
    squares_P = _sums_of_squares_on_cpu(values)
    broken = [] if math.isfinite(float(squares_P.sum())) else (~squares_P.isfinite()).nonzero().flatten().tolist()
    for p in broken:  # or just huge: rare, so it may cost more passes
        squares_P[p] = sum(
            (_squared_in_float64(c) for c in _chunks(values[p])), start=torch.zeros((), dtype=torch.float64)
        )
        stats_PK[p, NAN_COUNT] = values[p].isnan().sum()
        stats_PK[p, INF_COUNT] = values[p].isinf().sum()
    stats_PK[:, SUM_OF_SQUARES] = squares_P
    return stats_PK


def total_norm(stats_PK: Tensor) -> Tensor:
    """The 2-norm over all P gradients together, as a 0-dim float64 tensor; NaN or Inf if any element is."""
    return stats_PK[:, SUM_OF_SQUARES].sum().sqrt()


def _sums_of_squares_on_cpu(values: Sequence[Tensor]) -> Tensor:
    """squares_P in float64; not finite where a gradient is not, or is too large for float32."""
    if all(v.numel() <= _CHUNK for v in values):
        return _small_squares(values)
    parts: list[Tensor] = []
    owners: list[int] = []
    small = [p for p, v in enumerate(values) if v.numel() <= _CHUNK]
    for p, value in enumerate(values):
        if value.numel() > _CHUNK:
            chunks = _chunks(value)
            parts.extend(map(_squared, chunks))
            owners.extend([p] * len(chunks))
    squares_P = torch.zeros(len(values), dtype=torch.float64)
    squares_P.index_add_(0, _indices(tuple(owners)), torch.stack(parts))
    if small:
        squares_P.index_add_(0, _indices(tuple(small)), _small_squares([values[p] for p in small]))
    return squares_P


def _small_squares(values: Sequence[Tensor]) -> Tensor:
    """All in one call: for small tensors calls are what costs."""
    wide = any(v.dtype == torch.float64 for v in values)
    norms = torch._foreach_norm(list(values), 2, dtype=torch.float64 if wide else torch.float32)
    return torch.stack(list(norms)).double().square_()


def _squared(chunk: Tensor) -> Tensor:
    """Sum of squares of a chunk, at memory speed."""
    if chunk.dtype in (torch.float32, torch.float64):
        return torch.dot(chunk, chunk).double()
    norm: Tensor = torch.linalg.vector_norm(chunk, dtype=torch.float32)
    return norm.double().square_()


def _chunks(value: Tensor) -> Sequence[Tensor]:
    flat = value.reshape(-1)
    return (flat,) if flat.numel() <= _CHUNK else torch.split(flat, _CHUNK)


@functools.lru_cache(maxsize=64)
def _indices(numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers)


def _squared_in_float64(chunk: Tensor) -> Tensor:
    wide = chunk.double()
    return torch.dot(wide, wide)
