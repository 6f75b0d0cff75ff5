"""The GPU code behind `kernels`. Importing it imports Triton, so only `kernels` does, and late.

Glossary, for both files:

- *base*: the address of a tensor rounded down to 16 bytes. Elements are counted from there, so that every read is a
  whole aligned vector wherever a gradient begins in its bucket; the tensor's own are those from `skip` to `end`.
- *block*: ROWS vectors of 16 bytes, what a program reads at once. Running statistics are kept per row.
- *leaf*: LEAF_BLOCKS blocks, what is added up in float32 before it is added in float64.
- *chunk*: leaves that one program reads, a power of two of them.

A leaf is first read in a hurry: whole blocks, as if all were finite and neither huge nor tiny. Where their sum says
otherwise, the leaf is read once more with care; so are the ragged blocks at a tensor's two ends.
"""
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, SIM300
# Triton ships no types, and takes the annotations of a kernel's arguments for orders.

import triton
import triton.language as tl

#: Columns of the table of tensors: address, elements, its first chunk, its row in `stats_PK`. A last row ends it.
_TABLE_COLUMNS = tl.constexpr(4)
_STATISTICS = tl.constexpr(7)

_INF = tl.constexpr(float("inf"))
#: Beyond these, squares are scaled: 2**15 squares of 2**40 and more than enough of their digits fit into float32.
_HUGE = tl.constexpr(2.0**40)
_TINY = tl.constexpr(2.0**-40)
_SHRINK = tl.constexpr(2.0**-84)
_GROW = tl.constexpr(2.0**96)
_UNDO_SHRINK = tl.constexpr(2.0**168)
_UNDO_GROW = tl.constexpr(2.0**-192)
#: Sums below this times their elements may have lost squares that float32, or hardware without denormals, rounds to 0.
_ORDINARY = tl.constexpr(2.0**-106)


@triton.jit
def _hasty(base, first, end, ROWS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Sum of squares, zeros, minimum and maximum of whole blocks, right if all in them is of ordinary size."""
    offsets = tl.arange(0, ROWS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    squares_R = tl.zeros([ROWS], WIDE)
    zeros_R = tl.zeros([ROWS], tl.int32)
    minimum_R = tl.full([ROWS], _INF, WIDE)
    maximum_R = tl.full([ROWS], -_INF, WIDE)
    for start in range(first, end, ROWS * VECTOR):
        values = tl.load(base + (start + offsets)).to(WIDE)
        # a row lies within one thread, so these need no exchange
        squares_R += tl.sum(values * values, axis=1)
        zeros_R += tl.sum((values == 0).to(tl.int32), axis=1)
        minimum_R = tl.minimum(minimum_R, tl.min(values, axis=1))
        maximum_R = tl.maximum(maximum_R, tl.max(values, axis=1))
    squares = tl.sum(squares_R.to(tl.float64), axis=0)
    return squares, tl.sum(zeros_R, axis=0), tl.min(minimum_R, axis=0), tl.max(maximum_R, axis=0)


@triton.jit
def _careful(base, skip, end, whole_first, whole_end, ROWS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """All statistics of the elements from `skip` to `end` but those of the whole blocks that are done already.

    Sums of squares by Blue's three accumulators (ACM TOMS 4, 1978; LAPACK's nrm2). NaN and Inf are counted and left out
    of the rest.
    """
    offsets = tl.arange(0, ROWS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    squares_R = tl.zeros([ROWS], WIDE)
    huge_R = tl.zeros([ROWS], WIDE)
    tiny_R = tl.zeros([ROWS], WIDE)
    nans_R = tl.zeros([ROWS], tl.int32)
    infs_R = tl.zeros([ROWS], tl.int32)
    zeros_R = tl.zeros([ROWS], tl.int32)
    minimum_R = tl.full([ROWS], _INF, WIDE)
    maximum_R = tl.full([ROWS], -_INF, WIDE)
    for start in range(0, end, ROWS * VECTOR):
        if (start < whole_first) | (start >= whole_end):
            index = start + offsets
            inside = (index >= skip) & (index < end)
            values = tl.load(base + index, mask=inside, other=0.0).to(WIDE)
            sizes = tl.abs(values)
            finite = inside & (sizes < _INF)
            if WIDE == tl.float64:
                squares_R += tl.sum(tl.where(finite, values * values, 0.0), axis=1)
            else:
                huge = sizes > _HUGE
                tiny = sizes < _TINY
                scaled = tl.where(finite, values, 0.0) * tl.where(huge, _SHRINK, tl.where(tiny, _GROW, 1.0))
                squares = scaled * scaled
                squares_R += tl.sum(tl.where(huge | tiny, 0.0, squares), axis=1)
                huge_R += tl.sum(tl.where(huge, squares, 0.0), axis=1)
                tiny_R += tl.sum(tl.where(tiny, squares, 0.0), axis=1)
            nans_R += tl.sum((values != values).to(tl.int32), axis=1)
            infs_R += tl.sum((sizes == _INF).to(tl.int32), axis=1)
            zeros_R += tl.sum((inside & (values == 0)).to(tl.int32), axis=1)
            minimum_R = tl.minimum(minimum_R, tl.min(tl.where(finite, values, _INF), axis=1))
            maximum_R = tl.maximum(maximum_R, tl.max(tl.where(finite, values, -_INF), axis=1))
    squares = tl.sum(squares_R, axis=0).to(tl.float64)
    if WIDE == tl.float32:
        squares += tl.sum(huge_R, axis=0).to(tl.float64) * _UNDO_SHRINK
        squares += tl.sum(tiny_R, axis=0).to(tl.float64) * _UNDO_GROW
    nans = tl.sum(nans_R, axis=0)
    infs = tl.sum(infs_R, axis=0)
    zeros = tl.sum(zeros_R, axis=0)
    return squares, nans, infs, zeros, tl.min(minimum_R, axis=0), tl.max(maximum_R, axis=0)


@triton.jit
def _leaf(base, skip, end, ROWS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """All statistics of the elements of a leaf from `skip` to `end`; here `base` is the leaf's."""
    BLOCK: tl.constexpr = ROWS * VECTOR
    whole_first = tl.where(skip > 0, BLOCK, 0)
    whole_end = end // BLOCK * BLOCK
    squares, zeros, minimum, maximum = _hasty(base, whole_first, whole_end, ROWS, VECTOR, WIDE)
    count = tl.maximum(whole_end - whole_first, 0)
    # false for NaN
    ordinary = (squares < _INF) & ((squares >= count * _ORDINARY) | (zeros == count))
    whole_end = tl.where(ordinary, whole_end, 0)
    squares = tl.where(ordinary, squares, 0.0)
    nans = tl.zeros([], tl.int32)
    infs = tl.zeros([], tl.int32)
    zeros = tl.where(ordinary, zeros, 0)
    minimum = tl.where(ordinary, minimum, _INF)
    maximum = tl.where(ordinary, maximum, -_INF)
    if (skip > 0) | (whole_end < end):
        # in quarters of a block: all that care takes would not fit into the registers of a hasty program
        squares_, nans_, infs_, zeros_, minimum_, maximum_ = _careful(
            base, skip, end, whole_first, whole_end, ROWS // 4, VECTOR, WIDE
        )
        squares += squares_
        nans += nans_
        infs += infs_
        zeros += zeros_
        minimum = tl.minimum(minimum, minimum_)
        maximum = tl.maximum(maximum, maximum_)
    return squares, nans, infs, zeros, minimum, maximum


@triton.jit
def _owner(table, chunk, first_row, end_row):
    """The row of the table whose tensor holds a chunk: the last one that begins at it or before."""
    low = first_row
    high = end_row
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * _TABLE_COLUMNS + 2) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["first_row", "end_row", "first_chunk", "chunks", "chunk_leaves"])
def measure_chunks(
    table,
    partials,
    first_row,
    end_row,
    first_chunk,
    chunks,
    chunk_leaves,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    LEAF_BLOCKS: tl.constexpr,
):
    """Stage 1, one program per chunk: its partial results, a column of `partials`, [6, chunks].

    They are the statistics without abs_max, which follows from the others.
    """
    LEAF: tl.constexpr = LEAF_BLOCKS * ROWS * VECTOR
    chunk = first_chunk + tl.program_id(0)
    row = table + _owner(table, chunk, first_row, end_row) * _TABLE_COLUMNS
    address = tl.load(row)
    base = tl.multiple_of((address - address % 16).to(tl.pointer_type(DTYPE)), 16)
    skip = address % 16 // (16 // VECTOR)
    end = skip + tl.load(row + 1)
    low = (chunk - tl.load(row + 2)) * chunk_leaves * LEAF
    high = tl.minimum(low + chunk_leaves.to(tl.int64) * LEAF, end)
    squares = tl.zeros([], tl.float64)
    nans = tl.zeros([], tl.float64)
    infs = tl.zeros([], tl.float64)
    zeros = tl.zeros([], tl.float64)
    minimum = tl.full([], _INF, WIDE)
    maximum = tl.full([], -_INF, WIDE)
    for leaf_low in range(low, high, LEAF):
        leaf_skip = tl.maximum(skip - leaf_low, 0).to(tl.int32)
        leaf_end = tl.minimum(high - leaf_low, LEAF).to(tl.int32)
        squares_, nans_, infs_, zeros_, minimum_, maximum_ = _leaf(
            base + leaf_low, leaf_skip, leaf_end, ROWS, VECTOR, WIDE
        )
        squares += squares_
        nans += nans_.to(tl.float64)
        infs += infs_.to(tl.float64)
        zeros += zeros_.to(tl.float64)
        minimum = tl.minimum(minimum, minimum_)
        maximum = tl.maximum(maximum, maximum_)
    partial = partials + chunk
    tl.store(partial, squares)
    tl.store(partial + chunks, nans)
    tl.store(partial + chunks * 2, infs)
    tl.store(partial + chunks * 3, zeros)
    tl.store(partial + chunks * 4, minimum.to(tl.float64))
    tl.store(partial + chunks * 5, maximum.to(tl.float64))


@triton.jit
def _join_column(column, low, high, EMPTY: tl.constexpr, LANES: tl.constexpr):
    """A tensor's result of its parts, joined always in order. EMPTY: 0 for a sum, inf for a minimum, or -inf."""
    lanes = tl.full([LANES], EMPTY, tl.float64)
    for start in range(low, high, LANES):
        index = start + tl.arange(0, LANES)
        values = tl.load(column + index, mask=index < high, other=EMPTY)
        if EMPTY == 0:
            lanes += values
        elif EMPTY > 0:
            lanes = tl.minimum(lanes, values)
        else:
            lanes = tl.maximum(lanes, values)
    if EMPTY == 0:
        joined = tl.sum(lanes, axis=0)
    elif EMPTY > 0:
        joined = tl.min(lanes, axis=0)
    else:
        joined = tl.max(lanes, axis=0)
    return joined


@triton.jit(do_not_specialize=["chunks"])
def join_chunks(table, partials, stats_PK, chunks, LANES: tl.constexpr):
    """Stage 2, one program per tensor: its row of `stats_PK`."""
    row = table + tl.program_id(0) * _TABLE_COLUMNS
    low = tl.load(row + 2)
    high = tl.load(row + _TABLE_COLUMNS + 2)
    squares = _join_column(partials, low, high, 0.0, LANES)
    nans = _join_column(partials + chunks, low, high, 0.0, LANES)
    infs = _join_column(partials + chunks * 2, low, high, 0.0, LANES)
    zeros = _join_column(partials + chunks * 3, low, high, 0.0, LANES)
    minimum = _join_column(partials + chunks * 4, low, high, _INF, LANES)
    maximum = _join_column(partials + chunks * 5, low, high, -_INF, LANES)
    squares = tl.where(nans > 0, float("nan"), tl.where(infs > 0, _INF, squares))
    abs_max = tl.where(minimum > maximum, 0.0, tl.maximum(tl.abs(minimum), tl.abs(maximum)))
    out = stats_PK + tl.load(row + 3) * _STATISTICS
    tl.store(out, squares)
    tl.store(out + 1, nans)
    tl.store(out + 2, infs)
    tl.store(out + 3, zeros)
    tl.store(out + 4, abs_max)
    tl.store(out + 5, minimum)
    tl.store(out + 6, maximum)


#: True if Triton's interpreter runs the kernels of this process, on the CPU.
INTERPRETED = not isinstance(measure_chunks, triton.JITFunction)
#: Triton's names of the dtypes that can be measured, by torch's, and what each is computed in.
DTYPES = {
    "float16": (tl.float16, tl.float32),
    "bfloat16": (tl.bfloat16, tl.float32),
    "float32": (tl.float32, tl.float32),
    "float64": (tl.float64, tl.float64),
}
