"""Every statistic of every gradient in one read, by Triton, on the device, without a word to the host.

Legend: P tensors, K statistics (`record.STATISTICS`), `stats_PK` is [P, K], float64. *base*, *block*, *leaf* and
*chunk* are explained in `_triton_kernels`.

Stage 1 has one program per chunk and one launch per dtype; stage 2 has one program per tensor, which joins its chunks'
partial results in their order. No atomics: the bits of a row depend on the tensor's values, dtype, size, its address
modulo 16 and the size of chunks, which is the same for all lists up to 512 MiB and doubles with the list above that.

The programs find tensors through a table of addresses. It is copied to the device when it is first needed and kept, so
a training loop whose gradients stay where they are copies nothing.

Memory, held and transient: 900 KiB and 200 bytes per tensor (`Plan.memory_bytes`). The largest parts are 512 KiB for
tables of other lists and 6 * 8 bytes for each of at most 8192 + P chunks. Tensors with gaps are copied first.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmon.record import STATISTICS

#: What `measure` takes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VECTOR_BYTES = 16
_PARTIAL_BYTES = 6 * 8
_ROW_BYTES = 4 * 8
#: For tables of other lists: of each DDP bucket, of all gradients, and of where those were before.
_TABLES_BYTES = 1 << 19
#: What torch's allocator gives out on a GPU is a multiple of this.
_ALLOCATION_BYTES = 512


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the work is cut; powers of two. Tests use small numbers."""

    block_rows: int = 512
    """Vectors of 16 bytes that a program reads at once: with 4 warps, 4 per thread, 8 KiB per program in flight."""
    leaf_blocks: int = 8
    """64 KiB, so that 8 float32 additions follow each other at most; also the smallest chunk."""
    max_chunks: int = 8192
    """Programs before the ragged ends of P tensors are added: enough to fill any GPU several times."""
    join_lanes: int = 256
    """Partial results that stage 2 reads at once."""

    @property
    def leaf_bytes(self) -> int:
        """Bytes of a leaf."""
        return self.block_rows * self.leaf_blocks * _VECTOR_BYTES


DEFAULT = Geometry()


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies."""

    address: int
    elements: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Launch:
    """Stage 1 for one dtype: rows of the table, and chunks."""

    dtype: torch.dtype
    first_row: int
    end_row: int
    first_chunk: int
    end_chunk: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Who reads what."""

    table: tuple[int, ...]
    """[P + 1, 4], by dtype: address, elements, first chunk, row of `stats_PK`; the last row ends it."""
    launches: tuple[Launch, ...]
    chunk_leaves: int
    chunks: int

    @property
    def table_bytes(self) -> int:
        """Bytes of the table, kept on the device; for the copy as many are pinned on the host for a moment."""
        return _allocated(len(self.table) * 8)

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory that `measure` uses at most, tables of other lists and the result included."""
        tensors = len(self.table) // 4 - 1
        results = _allocated(self.chunks * _PARTIAL_BYTES) + _allocated(tensors * len(STATISTICS) * 8)
        # a new table is made before old ones are forgotten
        return _TABLES_BYTES + 3 * self.table_bytes + results


def plan(extents: Sequence[Extent], geometry: Geometry = DEFAULT) -> Plan:
    """Cuts tensors into at most `max_chunks` chunks and one more per tensor."""
    spans = [_span_bytes(e) for e in extents]
    chunk_leaves = 1
    while sum(spans) > geometry.max_chunks * chunk_leaves * geometry.leaf_bytes:
        chunk_leaves *= 2
    chunk_bytes = chunk_leaves * geometry.leaf_bytes
    table: list[int] = []
    launches: list[Launch] = []
    chunk = 0
    for dtype in DTYPES:
        first_row, first_chunk = len(table) // 4, chunk
        for p, extent in enumerate(extents):
            if extent.dtype == dtype:
                table += (extent.address, extent.elements, chunk, p)
                chunk += -(-spans[p] // chunk_bytes)
        if chunk > first_chunk:
            launches.append(Launch(dtype, first_row, len(table) // 4, first_chunk, chunk))
    table += (0, 0, chunk, 0)
    return Plan(tuple(table), tuple(launches), chunk_leaves, chunk)


def available(device: torch.device) -> bool:
    """Whether `measure` works on a device: a GPU with a Triton that works or, for tests, Triton's interpreter on a CPU.

    Never raises. The first call for a GPU compiles and runs a kernel, since a Triton that can be imported may still
    lack a C compiler.
    """
    if device.type == "cpu":
        kernels = _kernels() if os.environ.get("TRITON_INTERPRET") == "1" else None
        return kernels is not None and bool(kernels.INTERPRETED)
    return device.type == "cuda" and _works(device)


def measure(values: Sequence[Tensor], geometry: Geometry = DEFAULT) -> Tensor:
    """Statistics of each tensor, in the order of the list.

    Args:
        values: P real, strided tensors of any of DTYPES, on one device for which `available` is true.
        geometry: for tests.

    Returns:
        `stats_PK`, on the tensors' device. Nothing waits for the device, nothing is read back.

    Raises:
        ValueError: a tensor's dtype is not in DTYPES.
    """
    if not values:
        return torch.zeros(0, len(STATISTICS), dtype=torch.float64)
    readable = [_gapless(v) for v in values]  # copies must live until the kernels are launched
    for value in readable:
        if value.dtype not in DTYPES:
            raise ValueError(f"gradients of {value.dtype} can't be measured by Triton; only {DTYPES}.")
    device = readable[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: leave it as it is
        todo, table = _tables.get(readable, geometry)
        stats_PK = torch.empty(len(values), len(STATISTICS), dtype=torch.float64, device=device)
        _launch(todo, table, stats_PK, geometry)
    return stats_PK


def _launch(todo: Plan, table: Tensor, stats_PK: Tensor, geometry: Geometry) -> None:
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("Triton is missing or broken; ask kernels.available() first.")
    partials = torch.empty(todo.chunks * (_PARTIAL_BYTES // 8), dtype=torch.float64, device=table.device)
    for part in todo.launches:
        dtype, wide = kernels.DTYPES[str(part.dtype).removeprefix("torch.")]
        kernels.measure_chunks[(part.end_chunk - part.first_chunk,)](
            table,
            partials,
            part.first_row,
            part.end_row,
            part.first_chunk,
            todo.chunks,
            todo.chunk_leaves,
            DTYPE=dtype,
            WIDE=wide,
            VECTOR=_VECTOR_BYTES // part.dtype.itemsize,
            ROWS=geometry.block_rows,
            LEAF_BLOCKS=geometry.leaf_blocks,
            num_warps=4,
            enable_fp_fusion=True,
        )
    kernels.join_chunks[(stats_PK.shape[0],)](
        table, partials, stats_PK, todo.chunks, LANES=geometry.join_lanes, num_warps=4
    )


class _Tables:
    """Plans and their tables on the device, the least recently used forgotten first."""

    def __init__(self) -> None:
        self.built = 0
        """Tables built so far."""
        self._kept: OrderedDict[Hashable, tuple[Plan, Tensor]] = OrderedDict()
        self._lock = threading.Lock()  # communication hooks run in autograd's threads

    def get(self, values: Sequence[Tensor], geometry: Geometry) -> tuple[Plan, Tensor]:
        """Of tensors on the current device; built only where address, size or dtype of any has changed."""
        device = values[0].device
        # A table is filled by its stream: kernels of another one could read it before that.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, geometry, tuple((v.data_ptr(), v.numel(), v.dtype) for v in values))
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            todo = plan([Extent(*where) for where in key[3]], geometry)
            found = todo, _to_device(todo.table, device)
            self.built += 1
            self._kept[key] = found
            self._forget()
            return found

    def bytes(self) -> int:
        """Device memory of all tables kept."""
        return sum(todo.table_bytes for todo, _ in self._kept.values())

    def _forget(self) -> None:
        # all gradients and, together, all buckets: twice the largest table is always granted
        limit = _TABLES_BYTES + 2 * max(todo.table_bytes for todo, _ in self._kept.values())
        while self.bytes() > limit:
            self._kept.popitem(last=False)


_tables = _Tables()


def _to_device(table: tuple[int, ...], device: torch.device) -> Tensor:
    """Without waiting: torch gives pinned memory to others only when the copy is done."""
    on_host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _allocated(size_bytes: int) -> int:
    return -(-size_bytes // _ALLOCATION_BYTES) * _ALLOCATION_BYTES


def _span_bytes(extent: Extent) -> int:
    """From the 16 bytes in which a tensor begins to its end."""
    if extent.elements == 0:
        return 0
    return extent.address % _VECTOR_BYTES + extent.elements * extent.dtype.itemsize


def _gapless(value: Tensor) -> Tensor:
    """The tensor itself if its elements fill their memory, in any order, else a copy that does."""
    if value.is_contiguous():
        return value
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != expected:
            return value.detach().contiguous()
        expected *= size
    return value


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or None without a Triton that can be imported."""
    try:
        return importlib.import_module("gradmon._triton_kernels")
    except Exception:  # whatever a broken installation raises
        return None


@functools.cache
def _works(device: torch.device) -> bool:
    kernels = _kernels()
    if kernels is None or kernels.INTERPRETED:  # the interpreter reads addresses on the host
        return False
    try:
        measure([torch.ones(1, device=device)])
    except Exception:  # no C compiler, a GPU that Triton doesn't know, and the like
        return False
    return True
