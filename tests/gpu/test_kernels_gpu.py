"""The Triton kernels as compiled, on a GPU, against plain torch in float64. Not collected without being asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gradmon import kernels
from gradmon.record import STATISTICS

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def works() -> None:
    assert kernels.available(DEVICE)


def expected(value: Tensor) -> list[float]:
    wide = value.double().flatten()
    finite = wide[wide.isfinite()]
    extremes = [float(finite.abs().max()), float(finite.min()), float(finite.max())] if len(finite) else None
    counts = [float(wide.isnan().sum()), float(wide.isinf().sum()), float((wide == 0).sum())]
    return [float(wide.square().sum()), *counts, *(extremes or [0.0, math.inf, -math.inf])]


def check(values: list[Tensor]) -> None:
    stats_PK = kernels.measure(values)
    assert stats_PK.shape == (len(values), len(STATISTICS))
    assert stats_PK.device == values[0].device
    for row, value in zip(stats_PK.tolist(), values, strict=True):
        right = expected(value)
        assert row[0] == pytest.approx(right[0], rel=1e-6, abs=0, nan_ok=True)
        assert row[1:] == right[1:]


def gradients(seed: int) -> Iterator[Tensor]:
    """Of every dtype, magnitude and kind of trouble; whole leaves, ragged and small ones."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for dtype in DTYPES:
        for size in (0, 1, 77, 32768, 100_003, 3_000_000):
            for scale in (1.0, 1e-8, 1e-19, 1e-30, 1e-40, 1e4, 1e19, 1e38):
                value = torch.randn(size, generator=generator, device=DEVICE, dtype=torch.float64)
                yield (value * scale).to(dtype)
            value = torch.randn(size, generator=generator, device=DEVICE, dtype=torch.float64).to(dtype)
            for trouble in (0.0, math.nan, math.inf, -math.inf):
                value = value.clone()
                value[torch.rand(size, generator=generator, device=DEVICE) < 1e-3] = trouble
                yield value


@pytest.mark.parametrize("seed", range(3))
def test_many_gradients_at_once(seed: int) -> None:
    values = list(gradients(seed))
    check([values[i] for i in torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    room = torch.randn(400_000, device=DEVICE).to(dtype)
    views = [room[3:200_000], room[:120_000].view(300, 400).t(), room.view(400, 1000)[::3, 1::7], room[5]]
    check([*views, room[:40].view(-1, 1).expand(-1, 3), room[17:17]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_denormal_counts(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    value = torch.arange(1, 65, device=DEVICE, dtype=torch.float64).mul(smallest).to(dtype)
    assert int((value != 0).sum()) > 0, "denormals came through"
    if dtype == torch.float64:  # whose squares vanish in float64 too, in torch as well
        assert kernels.measure([value])[0].tolist()[1:] == expected(value)[1:]
    else:
        check([value, value.repeat(2000)])


def test_no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(100_000, device=DEVICE).to(d) for d in DTYPES]
    values.append(torch.randn(300, 400, device=DEVICE)[::2, ::3])
    kernels.measure(values)
    monkeypatch.setattr(kernels, "_tables", kernels._Tables())  # building a table must not wait either
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            values[0].sum().item()  # the mode works
        first = kernels.measure(values)
        second = kernels.measure(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def test_equal_bits_twice_in_any_company_and_on_any_stream() -> None:
    torch.manual_seed(0)
    values = [torch.randn(n, device=DEVICE).to(d) for d in DTYPES for n in (5, 70_001, 4_000_000)]
    rows = kernels.measure(values)
    for _ in range(20):
        assert torch.equal(kernels.measure(values), rows)
    assert torch.equal(kernels.measure(values[::-1]).flip(0), rows)
    for p, value in enumerate(values):
        assert torch.equal(kernels.measure([value])[0], rows[p])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = kernels.measure(values)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(elsewhere, rows)


def test_a_large_tensor() -> None:
    """600 MB, so chunks of two leaves; and offsets beyond what 32 bits of bytes hold, where there is room."""
    value = torch.empty(300_000_000, device=DEVICE, dtype=torch.bfloat16).normal_()
    value[-1] = math.inf
    value[123_456_789] = 0
    stats = kernels.measure([value])[0].tolist()
    pieces = [expected(piece) for piece in value[:-1].split(1 << 24)]
    assert stats[0] == math.inf
    assert stats[1:4] == [0, 1, sum(p[3] for p in pieces)]
    assert stats[4:] == [max(p[4] for p in pieces), min(p[5] for p in pieces), max(p[6] for p in pieces)]
    value[-1] = 1
    right = sum(p[0] for p in pieces) + 1
    assert kernels.measure([value])[0, 0].item() == pytest.approx(right, rel=1e-6)
    del value
    if torch.cuda.mem_get_info(DEVICE)[0] > 12 << 30:
        value = torch.ones((1 << 32) + 5, device=DEVICE, dtype=torch.float16)
        value[-1] = -2
        assert kernels.measure([value])[0].tolist() == [(1 << 32) + 8, 0, 0, 0, 2, -2, 1]


def test_memory_stays_within_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(1_000_000, device=DEVICE) for _ in range(200)]
    kernels.measure(values)
    monkeypatch.setattr(kernels, "_tables", kernels._Tables())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    kernels.measure(values)
    used = torch.cuda.max_memory_allocated(DEVICE) - before
    extents = [kernels.Extent(v.data_ptr(), v.numel(), v.dtype) for v in values]
    assert 0 < used <= kernels.plan(extents).memory_bytes - kernels._TABLES_BYTES
