"""Gradients -> one small tensor of statistics, exact, without waiting for the device.

Legend: P parameters, K statistics (`STATISTICS`), shapes as suffixes: `stats_PK` is [P, K], float64.

A norm is the square root of a sum of squares. Squares of float32 overflow above 1.8e19 and float16 sums lose their
digits, so a finite gradient must be able to give a sum that float32 cannot hold. On CPU, chunks of 128 k elements go
through `dot` (memory speed) and are added in float64; only where that is not finite are the chunks read again, in
float64. On other devices everything is accumulated in float64 at once.
"""

from __future__ import annotations

import functools
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
    if hasattr(gradient, "to_local"):
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
    for p in (~squares_P.isfinite()).nonzero().flatten().tolist():
        # A broken or a huge gradient: rare, so it may cost more passes.
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
    parts: list[Tensor] = []
    for value in values:
        for chunk in _chunks(value):
            if chunk.dtype in (torch.float32, torch.float64):
                parts.append(torch.dot(chunk, chunk))
            else:
                parts.append(torch.linalg.vector_norm(chunk, dtype=torch.float32).square())
    flat = torch.stack([p.double() for p in parts] if any(p.dtype == torch.float64 for p in parts) else parts).double()
    if len(parts) == len(values):
        return flat
    owners = _owners(tuple(v.numel() for v in values))
    return torch.zeros(len(values), dtype=torch.float64).index_add_(0, owners, flat)


def _chunks(value: Tensor) -> Sequence[Tensor]:
    flat = value.reshape(-1)
    return (flat,) if flat.numel() <= _CHUNK else torch.split(flat, _CHUNK)


@functools.lru_cache(maxsize=64)
def _owners(sizes: tuple[int, ...]) -> Tensor:
    """For each chunk, the number of the gradient it belongs to."""
    chunks = torch.tensor([max(1, -(-size // _CHUNK)) for size in sizes])
    return torch.repeat_interleave(torch.arange(len(sizes)), chunks)


def _squared_in_float64(chunk: Tensor) -> Tensor:
    wide = chunk.double()
    return torch.dot(wide, wide)
