"""Statistics of gradients against plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradmon.local import rank_row
from gradmon.stats import INF_COUNT, NAN_COUNT, SUM_OF_SQUARES, measure, total_norm

HOST_READS = [True, False]
"""Both ways through the code; the second is what other devices than the CPU take."""


def expected(gradient: Tensor) -> tuple[float, int, int]:
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    wide = gradient.double()
    return float(wide.square().sum()), int(wide.isnan().sum()), int(wide.isinf().sum())


def check(gradients: list[Tensor], host_reads: bool) -> None:
    stats_PK = measure(gradients, host_reads=host_reads)
    assert stats_PK.shape == (len(gradients), 3)
    assert stats_PK.dtype == torch.float64
    for row, gradient in zip(stats_PK.tolist(), gradients, strict=True):
        squares, nans, infs = expected(gradient)
        assert row[SUM_OF_SQUARES] == pytest.approx(squares, rel=1e-5, nan_ok=True)
        assert (row[NAN_COUNT], row[INF_COUNT]) == (nans, infs)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 1000),
    broken=st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=3),
    host_reads=st.sampled_from(HOST_READS),
)
def test_random_gradients(
    shapes: list[list[int]], dtype: torch.dtype, scale: float, seed: int, broken: list[float], host_reads: bool
) -> None:
    torch.manual_seed(seed)
    gradients = [torch.randn(shape, dtype=dtype) * scale for shape in shapes]
    for i, value in enumerate(broken):
        target = gradients[i % len(gradients)]
        if target.numel():
            target.view(-1)[seed % target.numel()] = value
    check(gradients, host_reads)


@pytest.mark.parametrize("host_reads", HOST_READS)
@pytest.mark.parametrize("value", [1e-30, 1e18, 1e19, 1e25, 3e38])
def test_a_finite_gradient_has_a_finite_norm(value: float, host_reads: bool) -> None:
    """Squares of float32 overflow above 1.8e19; below 1e-23 they vanish."""
    gradient = torch.full((1000,), value)
    norm = float(total_norm(measure([gradient], host_reads=host_reads)))
    if value > 1e-20:
        assert norm == pytest.approx(value * math.sqrt(1000), rel=1e-5)
    assert math.isfinite(norm)


@pytest.mark.parametrize("host_reads", HOST_READS)
def test_half_precision_neither_overflows_nor_rounds(host_reads: bool) -> None:
    gradient = torch.full((4000,), 60000.0, dtype=torch.float16)
    assert torch._foreach_norm([gradient])[0].isinf(), "the trap: the result has the gradients' own type"
    assert float(total_norm(measure([gradient], host_reads=host_reads))) == pytest.approx(
        60000 * math.sqrt(4000), rel=1e-3
    )


def test_large_tensors_keep_their_digits() -> None:
    """More than one chunk, with a remainder; an unchunked float32 sum would be 1e-4 off."""
    torch.manual_seed(0)
    gradients = [torch.randn(3_000_017) + 1, torch.randn(5), torch.randn(1 << 17)]
    for row, gradient in zip(measure(gradients).tolist(), gradients, strict=True):
        assert row[SUM_OF_SQUARES] == pytest.approx(expected(gradient)[0], rel=1e-6)


@pytest.mark.parametrize("host_reads", HOST_READS)
def test_layouts(host_reads: bool) -> None:
    torch.manual_seed(0)
    indices = torch.tensor([[0, 2, 0]])  # row 0 twice: its values must be added before they are squared
    sparse = torch.sparse_coo_tensor(indices, torch.randn(3, 4), (5, 4), check_invariants=True)
    check([torch.randn(6, 4).t(), torch.randn(8, 8)[::2, 1::3], torch.randn(()), torch.zeros(0), sparse], host_reads)


def test_no_gradients() -> None:
    assert measure([]).shape == (0, 3)


def test_row_names_first_broken_and_largest() -> None:
    gradients = [torch.ones(3), torch.full((2,), 5.0), torch.tensor([math.nan, 1.0]), torch.tensor([math.inf])]
    order = torch.tensor([40, 30, 20, 10])
    assert rank_row(measure(gradients[:2]), order[:2]).tolist() == pytest.approx([53.0, 0, 0, 30, 0])
    row = rank_row(measure(gradients), order, errors=2).tolist()
    assert math.isnan(row[0])
    assert row[1:] == [1, 1, 20, 2]
