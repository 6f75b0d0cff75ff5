"""The Triton kernels, in Triton's interpreter, against plain torch in float64; and what the compiler makes of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradmon import kernels
from gradmon.record import STATISTICS


def need_triton() -> None:
    """Leave this module out, or fail, where Triton's interpreter can't be used."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    # older ones don't work with today's NumPy; a torch with CUDA insists on its own
    if tuple(map(int, version.split(".")[:2])) >= (3, 9):
        return
    if os.environ.get("GRADMON_TEST_ALL") == "1":
        pytest.fail("triton 3.9 is missing, and GRADMON_TEST_ALL=1 allows no test to be left out", pytrace=False)
    pytest.skip("triton 3.9 is not installed: left out", allow_module_level=True)


need_triton()
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TRITON_INTERPRET", "1")  # not left there, for tests beside these
    #: Both must be: Triton's own functions (its `zeros` is one) are as Triton was when it was imported.
    INTERPRETED = bool(kernels._kernels().INTERPRETED) and not isinstance(
        importlib.import_module("triton.language").zeros, importlib.import_module("triton").JITFunction
    )

CPU = torch.device("cpu")
#: Float32 has 32 elements in a block and 96 in a leaf, so that small tensors have many: a program takes 20 ms here.
SMALL = kernels.Geometry(block_rows=8, leaf_blocks=3, max_chunks=1000, join_lanes=2)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SQUARES, NANS, INFS, ZEROS, ABS_MAX, MINIMUM, MAXIMUM = range(len(STATISTICS))

# the interpreter multiplies with NumPy, which tells of every overflow: the hasty pass lives from them
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    assert INTERPRETED, "something imported Triton before this module; it must come first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> kernels._Tables:
    fresh = kernels._Tables()
    monkeypatch.setattr(kernels, "_tables", fresh)
    return fresh


def expected(value: Tensor) -> list[float]:
    wide = value.detach().double().flatten()
    finite = wide[wide.isfinite()]
    extremes = [float(finite.abs().max()), float(finite.min()), float(finite.max())] if len(finite) else None
    counts = [float(wide.isnan().sum()), float(wide.isinf().sum()), float((wide == 0).sum())]
    return [float(wide.square().sum()), *counts, *(extremes or [0.0, math.inf, -math.inf])]


def check(values: list[Tensor], geometry: kernels.Geometry = SMALL) -> None:
    stats_PK = kernels.measure(values, geometry)
    assert stats_PK.shape == (len(values), len(STATISTICS))
    assert stats_PK.dtype == torch.float64
    for row, value in zip(stats_PK.tolist(), values, strict=True):
        right = expected(value)
        assert row[SQUARES] == pytest.approx(right[SQUARES], rel=1e-6, abs=0, nan_ok=True)
        assert row[1:] == right[1:]


def laid_out(flat: Tensor, layout: str) -> Tensor:
    """The numbers of `flat`, or some of them, in memory as they may come."""
    if layout == "unaligned":
        room = torch.full((len(flat) + 8,), 1000.0, dtype=flat.dtype)  # what is around must not be counted
        room[3 : 3 + len(flat)] = flat
        return room[3 : 3 + len(flat)]
    if layout == "transposed":
        return flat[: len(flat) // 6 * 6].view(2, 3, -1).permute(2, 0, 1)
    if layout == "strided":
        return flat.view(-1, 1)[::2]
    if layout == "expanded":
        return flat[:40].view(-1, 1).expand(-1, 3)
    if layout == "scalar":
        return (flat if len(flat) else torch.ones(1, dtype=flat.dtype))[0]
    return flat


LAYOUTS = ["plain", "unaligned", "transposed", "strided", "expanded", "scalar"]
SIZES = st.one_of(st.integers(0, 40), st.integers(0, 400))


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = draw(SIZES)
    values = torch.randn(size, dtype=torch.float64, generator=generator)
    values *= draw(st.sampled_from([1.0, 1e-3, 1e-8, 1e-19, 1e-30, 1e-42, 1e4, 1e19, 1e38, 0.0]))
    if size:  # a few elements of another kind, up to all
        kinds = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, 1e-20, -1e-20, 1e20, -3e38]
        for value in draw(st.lists(st.sampled_from(kinds), max_size=4)):
            places = torch.rand(size, generator=generator) < draw(st.sampled_from([0.01, 0.2, 1.0]))
            places[draw(st.integers(0, size - 1))] = True
            values[places] = value
    values = values.to(draw(st.sampled_from(DTYPES)))
    if values.dtype == torch.bfloat16:  # the interpreter (not the compiler) widens its denormals wrongly
        values[values.abs() < torch.finfo(torch.bfloat16).tiny] = 0
    return laid_out(values, draw(st.sampled_from(LAYOUTS)))


@settings(max_examples=25, deadline=None)
@given(values=st.lists(gradients(), min_size=1, max_size=3), max_chunks=st.sampled_from([1, 3, 1000]))
def test_any_gradients(values: list[Tensor], max_chunks: int) -> None:
    check(values, replace(SMALL, max_chunks=max_chunks))


def test_no_gradients() -> None:
    assert kernels.measure([]).shape == (0, len(STATISTICS))


def test_only_empty_gradients() -> None:
    rows = kernels.measure([torch.zeros(0), torch.zeros(3, 0).half()]).tolist()
    assert rows == [[0, 0, 0, 0, 0, math.inf, -math.inf]] * 2


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        kernels.measure([torch.ones(2), torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "unaligned"])
def test_geometry_of_production(dtype: torch.dtype, layout: str) -> None:
    """Whole blocks, leaves and chunks of the size that GPUs get, with ragged ends."""
    torch.manual_seed(0)
    elements = kernels.DEFAULT.leaf_bytes // dtype.itemsize
    values = [laid_out(torch.randn(n, dtype=dtype), layout) for n in (2 * elements, elements + 777, 5)]
    assert kernels.plan([extent(v) for v in values]).chunks >= 5
    check(values, kernels.DEFAULT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_gradients_of_any_magnitude(dtype: torch.dtype) -> None:
    sizes = [1.2e-38, 1e-30, 1e-23, 1e-19, 1e-16, 1e-12, 1e12, 1e19, 3e38]
    sizes += [1.5e-45, 1e-40] if dtype == torch.float32 else []  # of bfloat16 see `gradients`
    values = [torch.full((75,), size).to(dtype) for size in sizes]
    squares = torch.stack([v.float().square().sum() for v in values])
    assert squares.isinf().any() and (squares == 0).any(), "the trap: float32 can't hold the sums"
    check(values)


def test_magnitudes_mixed_in_one_leaf() -> None:
    """Each of Blue's three sums alone would be wrong."""
    values = torch.tensor([1e-25, 1.0, 1e15] * 20)
    check([values, values[:2].repeat(30), values[1:3].repeat(30), values / 1e14, values * 1e10])


def test_half_precision_neither_overflows_nor_rounds() -> None:
    gradient = torch.full((4000,), 60000.0, dtype=torch.float16)
    assert torch._foreach_norm([gradient])[0].isinf(), "the trap: the result has the gradients' own type"
    check([gradient, torch.full((4000,), 6e-8, dtype=torch.float16)])


def test_long_sums_keep_their_digits() -> None:
    """Equal elements, so that errors of rounding all point the same way: 5e-5 off in one float32 sum of this length."""
    gradient = torch.full((300_000,), 1.1)
    in_order = float(np.cumsum(gradient.square().numpy(), dtype=np.float32)[-1])
    right = gradient.double().square().sum().item()
    geometry = kernels.Geometry(max_chunks=1, join_lanes=4)
    assert abs(in_order - right) > 1e-5 * right
    assert kernels.measure([gradient], geometry)[0, SQUARES].item() == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = [laid_out(torch.randn(96).to(dtype), layout) for layout in LAYOUTS]
    assert sum(v.is_contiguous() for v in values) == 3
    check(values)


def test_nan_outweighs_inf() -> None:
    values = torch.ones(5, 200)
    values[1, 3] = values[2, 199] = values[3, 150] = math.inf
    values[1, 7] = values[4, 2] = -math.inf
    values[3, 3] = math.nan
    check(list(values))
    squares = kernels.measure(list(values), SMALL)[:, SQUARES].tolist()
    assert squares == pytest.approx([200, math.inf, math.inf, math.nan, math.inf], nan_ok=True)


def test_one_nan_costs_no_digit_of_the_rest() -> None:
    torch.manual_seed(0)
    clean = torch.randn(1000)
    broken = clean.clone()
    broken[500] = math.nan
    rows = kernels.measure([clean, broken], SMALL).tolist()
    assert rows[0][NANS] == 0
    assert rows[1][NANS] == 1
    assert rows[1][2:] == expected(broken)[2:]
    assert rows[1][MINIMUM:] == rows[0][MINIMUM:], "the element replaced was neither"


def test_equal_bits_twice_and_in_any_company() -> None:
    torch.manual_seed(0)
    values = [torch.randn(n).to(d) for n, d in ((700, DTYPES[0]), (5, DTYPES[3]), (333, DTYPES[1]), (900, DTYPES[2]))]
    rows = kernels.measure(values, SMALL)
    assert torch.equal(kernels.measure(values, SMALL), rows)
    assert torch.equal(kernels.measure(values[::-1], SMALL).flip(0), rows)
    for p, value in enumerate(values):
        assert torch.equal(kernels.measure([value], SMALL)[0], rows[p])
    reordered = kernels.measure([values[0].flip(0).contiguous()], SMALL)[0]
    assert reordered[SQUARES] != rows[0, SQUARES], "the order of additions shows in the bits, so the test can fail"


def test_tables_are_reused_until_a_gradient_moves(tables: kernels._Tables) -> None:
    one, two, other = torch.ones(50), torch.ones(70), torch.ones(20)
    for _ in range(3):  # as all gradients, and as buckets
        check([one, two])
        check([one])
        check([two, other])
    assert tables.built == 3
    one.fill_(5.0)
    check([one])
    assert tables.built == 3
    moved = two.clone()
    check([one, moved])
    assert tables.built == 4
    check([one, moved[:60]])
    assert tables.built == 5
    check([one, moved[:60].view(torch.int32).view(torch.float32)])  # the same memory
    assert tables.built == 5
    check([one, moved[:60].view(torch.float16)[:60]])
    assert tables.built == 6


def test_tables_of_gradients_that_move_are_forgotten(tables: kernels._Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TABLES_BYTES", 2048)
    room = torch.randn(100)
    one_table = kernels.plan([extent(room)]).table_bytes
    for i in range(6):
        tables.get([room[i:]], SMALL)
    assert tables.bytes() == 6 * one_table == 2048 + 2 * one_table, "as many as may be kept"
    tables.get([room], SMALL)
    assert tables.built == 6
    tables.get([room[6:]], SMALL)
    assert tables.bytes() == 6 * one_table
    tables.get([room], SMALL)
    assert tables.built == 7, "used a moment ago, so kept"
    tables.get([room[1:]], SMALL)
    assert tables.built == 8, "the oldest was forgotten"
    for i in range(20):
        tables.get([room[i:]] * 300, SMALL)
        assert tables.bytes() <= 2048 + 2 * kernels.plan([extent(room)] * 300).table_bytes
    assert tables.built == 28


def extent(value: Tensor) -> kernels.Extent:
    return kernels.Extent(value.data_ptr(), value.numel(), value.dtype)


def llama_7b() -> list[int]:
    hidden, inner = 4096, 11008
    layer = [hidden * hidden] * 4 + [hidden * inner] * 3 + [hidden] * 2
    return [32000 * hidden, *layer * 32, hidden, 32000 * hidden]


@pytest.mark.parametrize(
    "sizes",
    [llama_7b(), [10**12] * 7, [3] * 100_000, [1 << 28], [(1 << 25) + 1] * 5000, [7], []],
    ids=["7B", "7T", "tiny", "one", "ragged", "7", "none"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_bounded(sizes: list[int], dtype: torch.dtype) -> None:
    """At most 1 MiB and 64 bytes per tensor and statistic, whatever the model."""
    address, extents = 1 << 40, []
    for size in sizes:
        extents.append(kernels.Extent(address, size, dtype))
        address += size * dtype.itemsize
    plan = kernels.plan(extents)
    assert plan.memory_bytes <= (1 << 20) + 64 * len(sizes) * len(STATISTICS)
    assert plan.chunks <= 8192 + len(sizes)
    rows = [plan.table[i : i + 4] for i in range(0, len(plan.table), 4)]
    assert rows[-1][2] == plan.chunks
    chunk_bytes = plan.chunk_leaves * kernels.DEFAULT.leaf_bytes
    for row, following in itertools.pairwise(rows):
        chunks = following[2] - row[2]
        span = row[0] % 16 + row[1] * dtype.itemsize
        assert (chunks - 1) * chunk_bytes < span <= chunks * chunk_bytes, "every element in a chunk, none empty"
    if sum(sizes) > 6e9:
        assert plan.chunks > 4096, "and still enough for every multiprocessor"


class Watch(TorchDispatchMode):
    """Notes what is called, and all memory that was not there before."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.called: set[str] = set()
        self._there = {v.untyped_storage().data_ptr() for v in there}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.called.add(func.overloadpacket.__name__)
        for value in (*args, result):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._there:
                self._storages[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return result

    def allocated_bytes(self) -> int:
        return sum(s.nbytes() for s in self._storages.values())


def test_no_value_is_read_and_no_more_allocated_than_planned(tables: kernels._Tables) -> None:
    values = [torch.randn(n) for n in (500, 3, 100)]
    plan = kernels.plan([extent(v) for v in values], SMALL)
    with Watch(values) as watch:
        kernels.measure(values, SMALL)
    assert "empty" in watch.called, "the watch works"
    assert "_local_scalar_dense" not in watch.called
    table_bytes = len(plan.table) * 8
    assert watch.allocated_bytes() == table_bytes + plan.chunks * 48 + 3 * len(STATISTICS) * 8
    assert watch.allocated_bytes() <= plan.memory_bytes - kernels._TABLES_BYTES
    (_, table) = tables.get(values, SMALL)
    with Watch([*values, table]) as again:
        kernels.measure(values, SMALL)
    assert again.allocated_bytes() == watch.allocated_bytes() - table_bytes, "the table was there"


def test_available_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.available(CPU)
    assert not kernels.available(torch.device("cuda")), "the interpreter can't read a GPU's memory"
    assert not kernels.available(torch.device("meta"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not kernels.available(CPU)


def run(code: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_imported_late_and_may_be_missing_or_broken() -> None:
    code = """
import sys, torch
from importlib.abc import MetaPathFinder
from gradmon import kernels
print('triton' in sys.modules)
class Broken(MetaPathFinder):
    tried = False
    def find_spec(self, name, path, target=None):
        if name == 'triton':
            Broken.tried = True
            raise RuntimeError('libtriton.so: no such symbol')
sys.meta_path.insert(0, Broken())
print(kernels.available(torch.device('cpu')), kernels.available(torch.device('cuda')), Broken.tried)
sys.meta_path.pop(0)
sys.modules['triton'] = None
kernels._kernels.cache_clear(); kernels._works.cache_clear()
print(kernels.available(torch.device('cpu')), kernels.available(torch.device('cuda')))
del sys.modules['triton']
kernels._kernels.cache_clear()
print(kernels.available(torch.device('cpu')))
"""
    assert run(code, TRITON_INTERPRET="1").split() == ["False", *["False", "False", "True"], "False", "False", "True"]


def test_a_triton_without_a_gpu_is_not_available() -> None:
    code = """
import torch
from gradmon import kernels
print(kernels.available(torch.device('cpu')), kernels._kernels().INTERPRETED)
if not torch.cuda.is_available():
    print(kernels.available(torch.device('cuda')))
"""
    assert set(run(code).split()) == {"False"}


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from gradmon import _triton_kernels as code, kernels

def compiled(kernel, types, **constants):
    types |= dict.fromkeys(constants, "constexpr")
    names = list(types)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = triton.compiler.ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

UNWANTED = r"\\b(?:atom|red)\\.|\\.ftz"
ints = dict.fromkeys(["first_row", "end_row", "first_chunk", "chunks", "chunk_leaves"], "i32")
for name, (dtype, wide) in code.DTYPES.items():
    vector = 128 // dtype.primitive_bitwidth
    ptx = compiled(code.measure_chunks, {"table": "*i64", "partials": "*fp64"} | ints, DTYPE=dtype, WIDE=wide,
        VECTOR=vector, ROWS=kernels.DEFAULT.block_rows, LEAF_BLOCKS=kernels.DEFAULT.leaf_blocks)
    print(name, len(re.findall(r"ld\\.global\\.(?:v4\\.b32|v2\\.b64)", ptx)), len(re.findall(UNWANTED, ptx)))
pointers = {"table": "*i64", "partials": "*fp64", "stats_PK": "*fp64"}
ptx = compiled(code.join_chunks, pointers | {"chunks": "i32"}, LANES=kernels.DEFAULT.join_lanes)
print("join", len(re.findall(UNWANTED, ptx)))
"""


def test_the_compiler_reads_whole_vectors_and_uses_no_atomics(tmp_path) -> None:
    """For a H100, without one: four loads of 16 bytes in flight per thread, and float32 keeps its denormals."""
    lines = run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert lines == ["float16 4 0", "bfloat16 4 0", "float32 4 0", "float64 4 0", "join 0"]
