"""The update-to-weight ratio against plain torch in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gradmon.updates import UpdateSample

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def expected(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[list[float], float]:
    wide = torch.complex128 if before[0].is_complex() else torch.float64
    moved = [(a.detach().to(wide) - b.detach().to(wide)).flatten() for a, b in zip(after, before, strict=True)]
    weights = [b.detach().to(wide).flatten() for b in before]
    ratios = [float(m.norm().double() / w.norm().double()) for m, w in zip(moved, weights, strict=True)]
    return ratios, float(torch.cat(moved).norm() / torch.cat(weights).norm())


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def check(parameters: Sequence[Tensor], steps: Sequence[float], rel: float) -> None:
    """Move each parameter at random, by about `steps` of its size."""
    before, sample = copies(parameters), UpdateSample(parameters)
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(1 - step / 2).add_(step * torch.randn_like(parameter))
    after = copies(parameters)
    ratios_P, ratio = sample.ratios()
    right_P, right = expected(before, after)
    assert ratios_P.dtype == ratio.dtype == torch.float64
    assert ratios_P.tolist() == pytest.approx(right_P, rel=rel, nan_ok=True)
    assert float(ratio) == pytest.approx(right, rel=rel)
    assert all(map(torch.equal, after, parameters)), "looking at the weights must not change them"
    assert torch.equal(sample.ratios()[1], ratio)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_parameters_are_exact(dtype: torch.dtype) -> None:
    """Fewer elements than the sample has room for: nothing is left out."""
    torch.manual_seed(0)
    shapes = [(30, 40), (40,), (), (1, 7, 1), (6000,)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    check(parameters, [0.1, 0.5, 0.2, 1.0, 0.3], rel=1e-12)


def test_parameters_of_mixed_dtypes_are_exact() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(50, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    check(parameters, [0.1, 0.5, 0.2], rel=1e-12)


def test_any_layout_is_exact() -> None:
    torch.manual_seed(0)
    layouts = [
        torch.randn(6, 4).t(),
        torch.randn(8, 9)[::2, 1::3],
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 4).permute(2, 0, 1),
    ]
    assert not any(p.is_contiguous() for p in layouts)
    check([nn.Parameter(p) for p in layouts], [0.1, 0.5, 0.2, 1.0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_parameters_are_close(dtype: torch.dtype) -> None:
    """A sample of 13 k elements and more stands for the whole."""
    torch.manual_seed(0)
    shapes = [(1000, 777), (1 << 20,), (3, 500, 600), (77,), (99_991,)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    assert sum(p.numel() for p in parameters) > 20 * 65_536
    check(parameters, [0.1, 0.5, 0.2, 0.01, 2.0], rel=0.1)
    transposed = [nn.Parameter(torch.randn(700, 900, dtype=dtype).t()), nn.Parameter(torch.randn(1 << 18, dtype=dtype))]
    check(transposed, [0.3, 0.1], rel=0.1)


def test_each_sampled_element_stands_for_its_share() -> None:
    """A small parameter is sampled whole and moves, a large one thinly and rests: together they hardly move."""
    torch.manual_seed(0)
    small, large = nn.Parameter(torch.randn(30_000)), nn.Parameter(torch.randn(3_000_000))
    before, sample = copies([small, large]), UpdateSample([small, large])
    with torch.no_grad():
        small.mul_(2)
    ratios_P, ratio = sample.ratios()
    right_P, right = expected(before, [small, large])
    assert right == pytest.approx(0.1, rel=0.05), "equal weights for all samples would make it 0.7"
    assert ratios_P.tolist() == pytest.approx(right_P)
    assert right_P == [1, 0]
    assert float(ratio) == pytest.approx(right, rel=0.1)


def test_nothing_over_nothing() -> None:
    at_zero, moving, still, empty = torch.zeros(5), torch.zeros(5), torch.ones(5), torch.ones(0)
    sample = UpdateSample([at_zero, moving, still, empty])
    moving += 1
    ratios_P, ratio = sample.ratios()
    assert ratios_P.tolist() == pytest.approx([math.nan, math.nan, 0, math.nan], nan_ok=True)
    assert float(ratio) == pytest.approx(1.0)
    ratios_P, ratio = UpdateSample([at_zero, empty]).ratios()
    assert all(map(math.isnan, [*ratios_P.tolist(), float(ratio)]))


def test_an_update_that_bfloat16_rounds_away() -> None:
    weight = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    sample = UpdateSample([weight])
    with torch.no_grad():
        weight += 1e-4
    assert float(sample.ratios()[1]) == 0
    with torch.no_grad():
        weight += 2**-7
    assert float(sample.ratios()[1]) == 2**-7, "the smallest step from 1: neither 0 nor rounded again"


def test_a_weight_that_is_not_finite_spoils_its_own_ratio_alone() -> None:
    whole, broken = torch.ones(4), torch.ones(4)
    sample = UpdateSample([whole, broken])
    whole *= 1.5
    broken[1] = math.nan
    ratios_P, ratio = sample.ratios()
    assert ratios_P.tolist() == pytest.approx([0.5, math.nan], nan_ok=True)
    assert math.isnan(ratio)


def test_of_an_optimizer_step() -> None:
    """What SGD does is known: learning rate times gradient."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(9, 30)).square().mean().backward()
    sample, before = UpdateSample(list(model.parameters())), copies(list(model.parameters()))
    optimizer.step()
    right = [0.1 * p.grad.norm() / b.norm() for p, b in zip(model.parameters(), before, strict=True)]
    assert sample.ratios()[0].tolist() == pytest.approx(torch.stack(right).tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("count", "elements"), [(1, 3_000_000), (5, 1_000_001), (300, 10_000), (3000, 500), (6000, 200), (6000, 3)]
)
def test_what_a_sample_keeps(count: int, elements: int) -> None:
    """At most 65,536 elements and 16 per parameter; if they fit, most of that, so that it says something."""
    parameters = [torch.ones(elements) for _ in range(count)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        sample = UpdateSample(parameters)
    assert watched.profiler is not None
    events = watched.profiler.kineto_results.events()
    kept = sum(e.nbytes() for e in events if e.name() == "[memory]") / 4
    assert kept <= 65_536 + 16 * count
    assert kept >= min(count * elements, 65_536) / 2
    assert sample.ratios()[1] == 0


def test_columns_are_sampled_alike() -> None:
    """Where a layer's inputs differ in size, so do the updates of its columns."""
    torch.manual_seed(0)
    parameters = [torch.randn(1024, 8) for _ in range(64)]
    before, sample = copies(parameters), UpdateSample(parameters)
    for parameter in parameters:
        parameter[:, 1:] *= 1.1  # the first input is always 0
    _, right = expected(before, parameters)
    assert float(sample.ratios()[1]) == pytest.approx(right, rel=0.1)
