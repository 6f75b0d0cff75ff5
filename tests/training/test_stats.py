"""Statistics of gradients, and the row a rank makes of them, against plain torch in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gradmon import stats
from gradmon.record import STATISTICS
from gradmon.rows import ROW, Observed, first_broken, rank_row
from gradmon.stats import dense, flat, measure, total_norm

SQUARES, NANS, INFS, ZEROS, ABS_MAX, MINIMUM, MAXIMUM = range(len(STATISTICS))
#: Both ways through the code; the second is what devices take that have no Triton and are not the CPU.
HOST_READS = [True, False]
REAL = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*REAL, torch.complex64]
#: Elements of tensors that are cut: into a few rows of 32 k, into many, into pieces of 128 k, each with a remainder.
LARGE = [(1 << 15) + 1, (1 << 17) + 5, (1 << 19) + 7, 6 * (1 << 17) + (1 << 15) + 9]


def held(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, flat, in float64; of a sparse one those at the indices it holds."""
    if gradient.is_sparse and gradient.is_complex():
        gradient = gradient.coalesce().values()  # to_dense multiplies by 1, which spreads a NaN to the other half
    elif gradient.is_sparse:
        gradient = gradient.to_dense()[gradient._indices()[0].unique()]
    if gradient.is_complex():
        return torch.cat((gradient.real.double().flatten(), gradient.imag.double().flatten()))
    return gradient.detach().double().flatten()


def expected(gradient: Tensor) -> list[float]:
    wide = held(gradient)
    finite = wide[wide.isfinite()]
    extremes = [float(finite.abs().max()), float(finite.min()), float(finite.max())] if len(finite) else None
    counts = [float(wide.isnan().sum()), float(wide.isinf().sum()), float((wide == 0).sum())]
    return [float(wide.square().sum()), *counts, *(extremes or [0.0, math.inf, -math.inf])]


def bits(gradient: Tensor) -> list[Tensor]:
    """A copy of what is in memory, to be compared bit by bit: NaN too."""
    parts = [gradient._indices(), gradient._values()] if gradient.is_sparse else [gradient]
    return [torch.empty(part.numel(), dtype=part.dtype).copy_(part.detach().reshape(-1)) for part in parts]


def check(
    gradients: list[Tensor], host_reads: bool, *, extremes: bool = True, zeros: bool = True, rel: float = 1e-5
) -> None:
    """Every column that was asked for is right; one that was not is right or NaN. The gradients are left alone."""
    before = [bits(g) for g in gradients]
    stats_PK = measure(gradients, extremes=extremes, zeros=zeros, host_reads=host_reads)
    assert stats_PK.shape == (len(gradients), len(STATISTICS))
    assert stats_PK.dtype == torch.float64
    for row, gradient in zip(stats_PK.tolist(), gradients, strict=True):
        right = expected(gradient)
        assert row[SQUARES] == pytest.approx(right[SQUARES], rel=rel, abs=0, nan_ok=True)
        assert row[NANS : INFS + 1] == right[NANS : INFS + 1]
        assert row[ZEROS] == right[ZEROS] or (not zeros and math.isnan(row[ZEROS]))
        for column in (ABS_MAX, MINIMUM, MAXIMUM):
            assert row[column] == right[column] or (not extremes and math.isnan(row[column]))
    for gradient, copy in zip(gradients, before, strict=True):
        for now, then in zip(bits(gradient), copy, strict=True):
            assert torch.equal(now.view(torch.uint8), then.view(torch.uint8)), "measuring must not write"


# --- any gradient --------------------------------------------------------------------------------------------------


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The numbers of `value` in memory as gradients may have them; what lies around them must not be counted."""
    if layout == "transposed":
        return value.permute(tuple(reversed(range(value.dim()))))
    if layout == "strided":
        return torch.stack((value, torch.full_like(value, math.nan)), -1)[..., 0]
    if layout == "unaligned":
        room = torch.full((value.numel() + 3,), math.nan, dtype=value.dtype)
        room[1 : 1 + value.numel()] = value.reshape(-1)
        return room[1 : 1 + value.numel()].view(value.shape)
    if layout == "channels_last":
        return value.reshape(1, -1, 1, 1).expand(2, -1, 3, 2).contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return value.unsqueeze(-1).expand(*value.shape, 3)
    if layout == "turned":  # torch turns the signs (of the imaginary half) only when somebody reads them
        return value.conj() if value.is_complex() else torch._neg_view(value)
    if layout == "sparse":
        rows = value.reshape(-1, 1).expand(-1, 2)
        # each index twice: their values must be added before they are squared
        indices = torch.arange(2 * len(rows)).unsqueeze(0) % max(1, len(rows)) * 2
        size = (2 * len(rows) + 1, 2)
        return torch.sparse_coo_tensor(indices, torch.cat((rows, rows.flip(0))), size, check_invariants=True)
    return value


LAYOUTS = ["plain", "transposed", "strided", "unaligned", "channels_last", "expanded", "turned", "sparse"]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 1e-25, -1e-25, 3e38, -3e38]


@st.composite
def any_gradient(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    value = torch.randn(shape, dtype=wide, generator=generator)
    value *= draw(st.sampled_from([0.0, 1.0, 1e-30, 1e-23, 1e-12, 1e-3, 1e4, 1e18, 1e30]))
    numbers = (torch.view_as_real(value) if dtype.is_complex else value).view(-1)
    if len(numbers):
        for special in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
            places = torch.rand(len(numbers), generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
            places[draw(st.integers(0, len(numbers) - 1))] = True
            numbers[places] = special
    return laid_out(value.to(dtype), draw(st.sampled_from(LAYOUTS)))


@settings(max_examples=300, deadline=None)
@given(
    gradients=st.lists(any_gradient(), min_size=1, max_size=6),
    host_reads=st.sampled_from(HOST_READS),
    extremes=st.booleans(),
    zeros=st.booleans(),
)
def test_any_gradients_of_mixed_dtypes(gradients: list[Tensor], host_reads: bool, extremes: bool, zeros: bool) -> None:
    check(gradients, host_reads, extremes=extremes, zeros=zeros)


@pytest.mark.parametrize("host_reads", HOST_READS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_of_every_dtype(dtype: torch.dtype, layout: str, host_reads: bool) -> None:
    torch.manual_seed(0)
    for shape in ((3, 4, 5), (7,), (), (0,), (2, 0, 3)):
        check([laid_out(torch.randn(shape, dtype=dtype), layout)], host_reads)


@pytest.mark.parametrize("host_reads", HOST_READS)
def test_duplicate_indices_are_added_first(host_reads: bool) -> None:
    values = torch.tensor([[1.0, -5.0], [0.5, 2.0], [2.0, 5.0]])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), values, (5, 2), check_invariants=True)
    assert not sparse.is_coalesced()
    check([sparse], host_reads)
    assert measure([sparse], host_reads=host_reads)[0].tolist() == pytest.approx([9 + 0.25 + 4, 0, 0, 1, 3, 0, 3])
    assert not sparse.is_coalesced(), "left as it was"


@pytest.mark.parametrize("host_reads", HOST_READS)
def test_what_was_not_asked_for(host_reads: bool) -> None:
    """Not measured for a healthy gradient, which would cost a read; right or NaN beside broken ones."""
    healthy = torch.tensor([1.0, 0.0, -3.0])
    (row,) = measure([healthy], extremes=False, zeros=False, host_reads=host_reads).tolist()
    assert row[:ZEROS] == pytest.approx([10, 0, 0])
    assert all(map(math.isnan, row[ZEROS:]))
    unusual = [torch.tensor([math.nan, 0.0]), torch.zeros(4), torch.zeros(0), torch.full((2,), 3e38)]
    for some in itertools.permutations([healthy, *unusual], 3):
        for extremes, zeros in itertools.product([True, False], repeat=2):
            check(list(some), host_reads, extremes=extremes, zeros=zeros)


@pytest.mark.parametrize("host_reads", HOST_READS)
def test_no_finite_element(host_reads: bool) -> None:
    broken = [torch.tensor([math.nan]), torch.tensor([-math.inf, math.nan, math.inf]), torch.zeros(0)]
    stats_PK = measure(broken, host_reads=host_reads).tolist()
    assert [row[ABS_MAX:] for row in stats_PK] == [[0, math.inf, -math.inf]] * 3
    assert [row[NANS : INFS + 1] for row in stats_PK] == [[1, 0], [1, 2], [0, 0]]
    assert math.isnan(stats_PK[0][SQUARES]) and math.isnan(stats_PK[1][SQUARES]) and stats_PK[2][SQUARES] == 0


def test_no_gradients() -> None:
    assert measure([]).shape == (0, len(STATISTICS))
    assert float(total_norm(measure([]))) == 0


def test_the_cpu_is_read_by_the_host() -> None:
    gradients = [torch.randn(100), torch.full((5,), 3e38)]
    assert torch.equal(measure(gradients), measure(gradients, host_reads=True))


# --- size of the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_reads", HOST_READS)
@pytest.mark.parametrize("count", [1, 1000, 3 * (1 << 17) + 9, 5 * (1 << 17) + 9])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 60000.0),
        (torch.float16, 2.0**-24),
        *itertools.product([torch.float32, torch.bfloat16], [3e38, 1e25, 1.9e19, 1e18, 1e-17, 1e-25, 1e-30, 1e-38]),
        *itertools.product([torch.float64], [1e140, 1e-25, 1e-140]),
    ],
)
def test_a_finite_gradient_has_its_finite_norm(dtype: torch.dtype, value: float, count: int, host_reads: bool) -> None:
    """Squares of float32 overflow above 1.8e19 and vanish below 1e-23; float16 can't even hold 256 squared."""
    gradient = torch.full((count,), value, dtype=dtype)
    norm = float(total_norm(measure([gradient], extremes=False, zeros=False, host_reads=host_reads)))
    assert 0 < norm < math.inf
    # equal numbers are a float32 sum's worst case: all its roundings go the same way
    assert norm == pytest.approx(float(gradient[0].double()) * math.sqrt(count), rel=5e-5)


def test_the_traps_are_there() -> None:
    """What plain float32 sums make of such gradients."""
    for value, wrong in ((3e38, math.inf), (1e-25, 0.0)):
        assert float(torch.full((1000,), value).square().sum().sqrt()) == wrong
    assert torch._foreach_norm([torch.full((4000,), 60000.0, dtype=torch.float16)])[0].isinf()


@pytest.mark.parametrize("host_reads", HOST_READS)
def test_small_and_huge_ones_in_one_gradient(host_reads: bool) -> None:
    gradient = torch.full((100_000,), 1e-25)
    gradient[70_000] = 2e19
    gradient[5] = -1e30
    check([gradient, torch.full((3,), 1e-25), torch.ones(3)], host_reads)


def test_no_model_is_too_large() -> None:
    """1e30 float32 elements, all at float32's largest: a sum in float64 has room for their squares."""
    largest = torch.finfo(torch.float32).max
    (row,) = measure([torch.full((1000,), largest)]).tolist()
    stats_PK = torch.tensor([row] * 1000, dtype=torch.float64)
    stats_PK[:, SQUARES] *= 1e24  # 1000 parameters of 1e27 elements
    norm = float(total_norm(stats_PK))
    assert norm == pytest.approx(largest * 1e15, rel=1e-6)
    ranks = rank_row(stats_PK, torch.arange(1, 1001)).expand(1000, -1)
    assert bool(ranks[:, ROW.index("sum_of_squares")].sum().isfinite())


@pytest.mark.parametrize("host_reads", HOST_READS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", LARGE)
def test_rows_and_remainders(count: int, dtype: torch.dtype, host_reads: bool) -> None:
    """Each place counts once: a far larger number there shows in the sum, in the extremes and among the zeros."""
    torch.manual_seed(count)
    check([torch.randn(count, dtype=dtype), torch.randn(5, dtype=dtype)], host_reads)
    for place in (0, (1 << 15) - 1, 1 << 15, count - 1):
        spot = torch.zeros(count, dtype=dtype)
        spot[place] = -200
        (row,) = measure([spot], host_reads=host_reads).tolist()
        halves = 2 if dtype.is_complex else 1
        assert row == [40000, 0, 0, halves * count - 1, 200, -200, 0]
    for broken in (math.nan, math.inf, -math.inf):
        spoilt = torch.randn(count, dtype=dtype)
        spoilt[count - 1] = broken
        check([spoilt], host_reads)


@pytest.mark.parametrize("host_reads", HOST_READS)
@pytest.mark.parametrize("dtype", REAL)
def test_large_tensors_keep_their_digits(dtype: torch.dtype, host_reads: bool) -> None:
    torch.manual_seed(0)
    gradients = [(torch.randn(3_000_017) + 1).to(dtype), (torch.rand(1 << 20) * 3).to(dtype)]
    naive = float(torch.linalg.vector_norm(gradients[0].float())) ** 2
    assert naive != pytest.approx(expected(gradients[0])[SQUARES], rel=1e-5), "the trap: one norm over everything"
    check(gradients, host_reads, rel=2e-6)  # so the norm within 1e-6


# --- dense, flat ---------------------------------------------------------------------------------------------------


def test_dense() -> None:
    plain = torch.randn(3, 4)
    assert dense(plain) is plain
    pairs = torch.randn(3, dtype=torch.complex64)
    assert dense(pairs).tolist() == [[float(c.real), float(c.imag)] for c in pairs]
    assert dense(pairs).data_ptr() == pairs.data_ptr()
    assert dense(pairs.conj()).tolist() == [[float(c.real), -float(c.imag)] for c in pairs]
    values = torch.tensor([1.0, 2.0, 3.0])
    sparse = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4]]), values, (6,), check_invariants=True)
    assert dense(sparse).tolist() == [2, 4]


def test_a_conjugated_gradient_is_what_autograd_makes() -> None:
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
    (weight.conj() * torch.randn(5, dtype=torch.complex64)).real.sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_conj(), "torch has not computed the signs yet"
    check([weight.grad], True)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 3), (1, 1, 3, 1)])
def test_flat_copies_nothing_without_gaps(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    value = torch.randn(shape).permute(order)
    line = flat(value)
    assert line.shape == (value.numel(),)
    assert line.data_ptr() == value.data_ptr()
    assert line.is_contiguous()
    assert sorted(line.tolist()) == sorted(value.flatten().tolist())


def test_flat_of_all_kinds() -> None:
    base = torch.arange(24.0).view(4, 6)
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert flat(last).data_ptr() == last.data_ptr()
    for value in (base[:, ::2], base[::2], base[1:, 1:], base[:1].expand(4, 6), base[0, 0], torch.zeros(0, 3)):
        assert sorted(flat(value).tolist()) == sorted(value.flatten().tolist())
        assert flat(value).dim() == 1
    assert flat(base[1:]).data_ptr() == base[1:].data_ptr()


# --- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that `work` held at once, beyond what was there before.

    The allocator itself reports each allocation and release to the profiler, so what kernels take inside an operation
    is in it too; a TorchDispatchMode sees results only, and the resident size of the process knows pages, not tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees this thread; and thousands of small pieces would wait for busy cores
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            work()
    finally:
        torch.set_num_threads(threads)
    assert watched.profiler is not None
    changes = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in changes), initial=0))


def budget_bytes(gradients: list[Tensor]) -> int:
    return (1 << 20) + 64 * len(gradients) * len(STATISTICS)


#: Each float32 copy of it is 80 MB.
MANY = 20_000_000


@pytest.fixture(scope="module")
def many() -> Tensor:
    return torch.randn(MANY, generator=torch.Generator().manual_seed(0))


def test_memory_is_seen(many: Tensor) -> None:
    """The measure of memory, measured: a copy, one of each in turn, a copy inside an operation, and none."""
    copy = 4 * MANY
    assert copy <= peak_bytes(lambda: (many * 2).sum()) < 1.01 * copy
    assert copy <= peak_bytes(lambda: [float((many * k).sum()) for k in range(3)]) < 1.01 * copy
    assert copy <= peak_bytes(lambda: torch.nn.functional.cosine_similarity(many, many, dim=0))
    assert peak_bytes(lambda: many.view(-1, 1000).sum(1).sum()) < 1.01 * 4 * MANY / 1000 + 4096


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory(many: Tensor, dtype: torch.dtype, broken: bool) -> None:
    gradients = [
        many.to(dtype, copy=True).view(4000, 5000).t(),
        *(torch.randn(n, dtype=dtype) for n in (7, 3000, 0, 1 << 15)),
    ]
    if broken:
        for gradient in gradients:
            flat(gradient)[gradient.numel() // 2 :][:1] = math.nan
    for extremes, zeros in itertools.product([True, False], repeat=2):
        work = lambda: measure(gradients, extremes=extremes, zeros=zeros)  # noqa: E731, B023 - called right here
        assert peak_bytes(work) <= budget_bytes(gradients)


@pytest.mark.parametrize("value", [0.0, 1e-25, 3e38, math.inf])
def test_memory_for_numbers_that_need_care(value: float) -> None:
    gradients = [torch.full((MANY // 4,), value)]
    assert peak_bytes(lambda: measure(gradients)) <= budget_bytes(gradients)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_memory_for_many_parameters(value: float) -> None:
    gradients = [torch.full((9, 3), value, dtype=dtype) for dtype in REAL * 1000]
    assert peak_bytes(lambda: measure(gradients)) <= budget_bytes(gradients)


# --- rows ----------------------------------------------------------------------------------------------------------


def row_of(gradients: list[Tensor], order: list[int], **more: object) -> dict[str, float]:
    row = rank_row(measure(gradients), torch.tensor(order), **more)  # type: ignore[arg-type]
    assert row.shape == (len(ROW),)
    assert row.dtype == torch.float64
    return dict(zip(ROW, row.tolist(), strict=True))


def test_a_row_adds_up_and_names_the_largest() -> None:
    gradients = [torch.ones(3), torch.full((2,), 5.0), torch.full((2,), 4.0)]
    row = row_of(gradients, [40, 30, 20])
    right = dict.fromkeys(ROW, 0) | {"sum_of_squares": 3 + 50 + 32, "parameter": 30}
    assert row == pytest.approx(right)
    assert row_of(gradients[::-1], [20, 30, 40]) == pytest.approx(right)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ([math.nan, math.inf], 20),
        ([math.inf, math.nan], 20),
        ([-math.inf, -math.inf], 20),
        ([1.0, math.nan], 10),
        ([math.inf, 1.0], 20),
    ],
)
def test_a_row_names_the_first_broken_one(broken: list[float], named: int) -> None:
    """Not the worst kind, not the largest finite one: the first in the order of the rows."""
    gradients = [torch.full((9,), 1e30), *(torch.tensor([value, 1.0]) for value in broken)]
    row = row_of(gradients, [40, 20, 10])
    assert row["parameter"] == named
    assert row["nan_count"] == sum(map(math.isnan, broken))
    assert row["inf_count"] == sum(map(math.isinf, broken))
    assert not math.isfinite(row["sum_of_squares"])


@pytest.mark.parametrize(
    ("loss", "told", "count"),
    [
        (None, 0, 0),
        (2.5, 2.5, 1),
        (0.0, 0, 1),
        (torch.tensor(2.5), 2.5, 1),
        (torch.tensor(2.5, dtype=torch.bfloat16), 2.5, 1),
        (torch.tensor(0.0), 0, 1),
        (math.inf, math.inf, 1),
    ],
)
def test_a_row_carries_the_loss(loss: Tensor | float | None, told: float, count: int) -> None:
    row = row_of([torch.ones(1)], [7], observed=Observed(loss))
    assert (row["loss"], row["losses"]) == (told, count)


def test_a_row_carries_a_loss_that_is_nan() -> None:
    for loss in (math.nan, torch.tensor(math.nan)):
        row = row_of([torch.ones(1)], [7], observed=Observed(loss))
        assert math.isnan(row["loss"])
        assert row["losses"] == 1
        assert row["sum_of_squares"] == 1


def test_a_row_carries_the_newest_validation_loss_and_how_many_there_were() -> None:
    row = row_of([torch.ones(1)], [7], observed=Observed(None, torch.tensor(0.5), 3))
    assert (row["validation"], row["validations"]) == (0.5, 3)
    assert (row["loss"], row["losses"]) == (0, 0)


def test_a_row_carries_errors_and_micro_step() -> None:
    row = row_of([torch.ones(1)], [7], errors=3, micro_step=4)
    assert row == dict.fromkeys(ROW, 0) | {"sum_of_squares": 1, "parameter": 7, "errors": 3, "micro_step": 4}


@pytest.mark.parametrize(
    ("squares", "chosen", "first"),
    [
        ([1.0], 1, 1),
        ([math.nan], 1, 1),
        ([1.0, 2.0, 3.0], 3, 3),
        ([1.0, math.nan, math.nan], 2, 2),
        ([math.inf, math.nan, math.inf], 1, 1),
        ([1.0, 2.0, math.inf], 3, 3),
        ([math.nan, 1.0, 2.0], 3, 1),  # thrown away in between
        ([math.nan, 1.0, math.inf, math.nan], 3, 1),
        ([math.inf, math.nan, 1.0, math.nan], 4, 1),
    ],
)
def test_first_broken(squares: list[float], chosen: int, first: int) -> None:
    """Accumulated gradients stay broken: of the broken backwards up to the end, the first; else the last backward.

    Where each backward is reduced by itself, the first broken one of all.
    """
    rows_MR = torch.zeros(len(squares), len(ROW), dtype=torch.float64)
    rows_MR[:, ROW.index("sum_of_squares")] = torch.tensor(squares, dtype=torch.float64)
    rows_MR[:, ROW.index("micro_step")] = torch.arange(1, len(squares) + 1)
    row = first_broken(rows_MR, lasting=True)
    assert row.shape == (len(ROW),)
    assert int(row[ROW.index("micro_step")]) == chosen
    assert int(first_broken(rows_MR, lasting=False)[ROW.index("micro_step")]) == first


def test_reading_is_free_on_the_cpu_alone() -> None:
    assert stats.reads_are_free(torch.device("cpu"))
    assert not any(stats.reads_are_free(torch.device(kind)) for kind in ("cuda", "xpu", "meta"))
