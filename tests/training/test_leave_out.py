"""A rank with NaN or Inf is left out of the average, bucket by bucket, against plain torch's own gradients."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from ranks import Ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from gradmon import local, stats
from gradmon.local import LocalHook, RegistrationWatch, local_hook
from gradmon.rows import ROW_ERRORS, ROW_INF, ROW_NAN, ROW_PARAMETER, ROW_SUM_OF_SQUARES

#: So small that every weight has a bucket of its own, but for the first bias.
SMALL = {"bucket_cap_mb": 0.0001}
NAN, INF = math.nan, math.inf


@pytest.fixture(params=[2, 3, 4])
def some_ranks(request: pytest.FixtureRequest) -> Ranks:
    ranks: Ranks = request.getfixturevalue({2: "two_ranks", 3: "three_ranks", 4: "four_ranks"}[request.param])
    return ranks


@dataclass(frozen=True)
class Case:
    """Two steps: a healthy one, after which DDP rebuilds its buckets, and the one in question."""

    broken: tuple[tuple[int, str, float], ...] = ()
    """(rank, parameter, value): what one element of its gradient becomes in the second step's first micro-step."""
    leave_out: bool = True
    looks: bool = True
    """False: by the code for devices on which a look at a value would be a wait."""
    options: dict[str, Any] = field(default_factory=lambda: SMALL)
    dtype: torch.dtype = torch.float64
    micro_steps: int = 1
    all_sync: bool = False
    """Average after each micro-step, not only after the last."""
    unmeasured: tuple[int, ...] = ()
    """Ranks where measuring raises in the second step."""
    blind: bool = False
    """They can't even look whether all is finite."""
    unwatched: tuple[str, ...] = ()


@dataclass
class Seen:
    """By one rank, in the second step."""

    own: dict[str, torch.Tensor]
    """Its own gradients, by plain torch."""
    averaged: dict[str, torch.Tensor]
    buckets: list[list[str]]
    rows: torch.Tensor | None
    errors: int
    collectives: int


@contextlib.contextmanager
def changed(owner: Any, **members: Any) -> Iterator[None]:
    kept = {name: getattr(owner, name) for name in members}
    try:
        for name, member in members.items():
            setattr(owner, name, member)
        yield
    finally:
        for name, member in kept.items():
            setattr(owner, name, member)


@contextlib.contextmanager
def as_on_a_device(looks: bool) -> Iterator[None]:
    with contextlib.nullcontext() if looks else changed(stats, reads_are_free=lambda _device: False):
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Elements of every collective that is started."""
    original, started = dist.all_reduce, []

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        started.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with changed(dist, all_reduce=all_reduce):
        yield started


def fails(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("made up")


@contextlib.contextmanager
def failing(case: Case) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if toy.rank() in case.unmeasured:
            stack.enter_context(changed(stats, measure=fails))
            if case.blind:
                stack.enter_context(changed(torch.Tensor, isfinite=fails))
        yield


class Breaker:
    """Breaks gradients before DDP sees them, as a bad batch or a bad GPU would."""

    def __init__(self, inner: nn.Module, broken: tuple[tuple[int, str, float], ...]) -> None:
        self.on = False
        self._broken = [(name, value) for rank, name, value in broken if rank == toy.rank()]
        for name, parameter in inner.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self(name, gradient) if self.on else gradient)

    def __call__(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        values = [value for broken, value in self._broken if broken == name]
        gradient = gradient.clone()
        for place, value in enumerate(values):
            gradient.view(-1)[place] = value
        return gradient


def started(model: DistributedDataParallel, case: Case) -> tuple[LocalHook, list[list[str]]]:
    """Our hook at work, and what it is called with."""
    named = list(model.module.named_parameters())
    hook, buckets, forward = local_hook(model), [], LocalHook.forward
    names = {id(p): n for n, p in named}

    def spy(bucket: Any) -> Any:
        buckets.append([names[id(p)] for p in bucket.parameters()])
        return forward(hook, bucket)

    hook.forward = spy  # type: ignore[method-assign]
    watched = [p for n, p in named if n not in case.unwatched]
    hook.start(watched, lambda _error: None, leave_out=case.leave_out)
    return hook, buckets


def second_step(case: Case) -> Seen:
    inner = toy.build().to(case.dtype)
    breaker = Breaker(inner, case.broken)
    model = DistributedDataParallel(inner, **case.options)
    hook, buckets = started(model, case)
    generator = torch.Generator().manual_seed(toy.rank())
    own: dict[str, torch.Tensor] = {}
    with as_on_a_device(case.looks), counted() as collectives:
        for step in range(2):
            model.zero_grad()
            for micro in range(case.micro_steps):
                inputs = torch.randn(8, toy.FEATURES, generator=generator).to(case.dtype)
                gradients = torch.autograd.grad(inner(inputs).square().mean(), list(inner.parameters()))
                breaker.on = step == 1 and micro == 0
                for (name, _), g in zip(inner.named_parameters(), gradients, strict=True):
                    made = breaker(name, g) if breaker.on else g
                    own[name] = own[name] + made if micro else made
                syncs = case.all_sync or micro == case.micro_steps - 1
                buckets.clear()
                collectives.clear()
                with (
                    failing(case) if step else contextlib.nullcontext(),
                    contextlib.nullcontext() if syncs else model.no_sync(),
                ):
                    model(inputs).square().mean().backward()
                breaker.on = False
            rows = hook.take_rows()
            hook.forget()
    averaged = {name: p.grad.clone() for name, p in inner.named_parameters()}
    return Seen(own, averaged, buckets, rows, hook.errors, len(collectives))


def expected(seen: list[Seen], unwatched: tuple[str, ...] = ()) -> dict[str, torch.Tensor | None]:
    """The mean over the healthy ranks, bucket by bucket; None where no rank is."""
    means: dict[str, torch.Tensor | None] = {}
    for bucket in seen[0].buckets:
        judged = [name for name in bucket if name not in unwatched]
        healthy = [one for one in seen if all(one.own[name].isfinite().all() for name in judged)]
        for name in bucket:
            wide = [one.own[name].double() for one in healthy]
            means[name] = torch.stack(wide).mean(0) if wide else None
    return means


def check(seen: list[Seen], unwatched: tuple[str, ...] = (), **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-15}
    for name, mean in expected(seen, unwatched).items():
        got = [one.averaged[name] for one in seen]
        if mean is None:
            assert not any(g.isfinite().any() for g in got), f"nobody's {name} is whole"
            continue
        torch.testing.assert_close(got[0].double(), mean, equal_nan=True, **tolerance)
        assert all(digest([got[0]]) == digest([other]) for other in got), "replicas"


def digest(values: Iterable[torch.Tensor]) -> str:
    """Unlike ==, tells 0.0 from -0.0."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("value", [NAN, -INF])
def test_each_bucket_is_the_mean_over_its_healthy_ranks(some_ranks: Ranks, value: float, looks: bool) -> None:
    last = some_ranks.world_size - 1
    case = Case(broken=((last, "3.weight", value),), looks=looks)
    seen = some_ranks.run(second_step, case)
    buckets = seen[0].buckets
    assert len(buckets) > 3, "several, so that it can differ"
    assert all(one.buckets == buckets for one in seen)
    check(seen)
    whole = [name for bucket in buckets if "3.weight" not in bucket for name in bucket]
    everybody = {n: torch.stack([one.own[n] for one in seen]).mean(0) for n in whole}
    for name in whole:
        torch.testing.assert_close(seen[0].averaged[name], everybody[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("looks", [True, False])
def test_two_bad_ranks_of_four_in_different_buckets(four_ranks: Ranks, looks: bool) -> None:
    broken = ((0, "0.weight", NAN), (0, "3.weight", INF), (2, "3.weight", NAN), (3, "5.weight", INF))
    check(four_ranks.run(second_step, Case(broken=broken, looks=looks)))


@pytest.mark.parametrize("looks", [True, False])
def test_where_no_rank_is_healthy_the_average_is_not_finite(some_ranks: Ranks, looks: bool) -> None:
    broken = tuple((rank, "3.weight", NAN if rank else INF) for rank in range(some_ranks.world_size))
    seen = some_ranks.run(second_step, Case(broken=broken, looks=looks))
    check(seen)
    assert not seen[0].averaged["3.weight"].isfinite().any()
    assert seen[0].averaged["0.weight"].isfinite().all(), "the other buckets are whole"


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {**SMALL, "gradient_as_bucket_view": True},
        {**SMALL, "static_graph": True},
        {**SMALL, "find_unused_parameters": True},
    ],
    ids=["one bucket", "views", "static graph", "unused"],
)
def test_in_every_mode_of_ddp(three_ranks: Ranks, options: dict[str, Any], looks: bool) -> None:
    check(three_ranks.run(second_step, Case(broken=((1, "3.weight", NAN),), options=options, looks=looks)))


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(three_ranks: Ranks, dtype: torch.dtype, looks: bool) -> None:
    """3/2 is exact in both types, 4/3 would not be; the factor is never rounded to them."""
    case = Case(broken=((0, "3.weight", NAN),), dtype=dtype, looks=looks)
    seen = three_ranks.run(second_step, case)
    assert seen[0].averaged["3.weight"].dtype == dtype
    check(seen, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("looks", [True, False])
def test_the_factor_is_exact(dtype: torch.dtype, looks: bool) -> None:
    """What has been reduced is multiplied by 4/3 in at least float32 and rounded once."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    half = 0.51 if exact != dtype else 1.01  # there the factor itself is rounded, too
    reduced, count = (torch.futures.Future() for _ in range(2))
    values = torch.linspace(-3, 3, 1001).to(dtype)
    reduced.set_result([values.clone()])
    count.set_result([torch.tensor([4, 3], dtype=exact)])
    with as_on_a_device(looks):
        got = local._weighing(count)(reduced)
    torch.testing.assert_close(got.double(), values.double() * (4 / 3), rtol=torch.finfo(dtype).eps * half, atol=0)


@pytest.mark.parametrize("looks", [True, False])
def test_a_micro_step_that_did_not_average_breaks_the_whole_step_of_its_rank(two_ranks: Ranks, looks: bool) -> None:
    case = Case(broken=((1, "3.weight", NAN),), micro_steps=3, looks=looks)
    seen = two_ranks.run(second_step, case)
    check(seen)
    assert torch.allclose(seen[1].averaged["3.weight"], seen[0].own["3.weight"], rtol=1e-12, atol=1e-15)


def test_the_rows_name_the_rank_that_was_left_out(three_ranks: Ranks) -> None:
    names = list(dict(toy.build().named_parameters()))
    broken = ((1, "3.weight", NAN), (1, "3.weight", NAN), (1, "3.weight", INF))
    for one in three_ranks.run(second_step, Case(broken=broken)):
        assert one.rows[:, ROW_NAN].tolist() == [0, 2, 0]
        assert one.rows[:, ROW_INF].tolist() == [0, 0 + 1, 0]
        assert one.rows[:, ROW_SUM_OF_SQUARES].isfinite().tolist() == [True, False, True]
        assert names[int(one.rows[1, ROW_PARAMETER]) - 1] == "3.weight"
        assert all(g.isfinite().all() for g in one.averaged.values())


@pytest.mark.parametrize("leave_out", [True, False])
def test_of_several_averages_of_a_step_each_rank_answers_for_its_own(two_ranks: Ranks, leave_out: bool) -> None:
    """The first average is whole without rank 1, so the second finds everybody whole; it is named all the same."""
    case = Case(broken=((1, "3.weight", NAN),), micro_steps=2, all_sync=True, leave_out=leave_out)
    for one in two_ranks.run(second_step, case):
        assert one.rows[:, ROW_NAN].tolist() == [0, 1]
        assert bool(one.averaged["3.weight"].isfinite().all()) is leave_out


def test_switched_off_a_nan_reaches_all(two_ranks: Ranks) -> None:
    case = Case(broken=((1, "3.weight", NAN),))
    off, on = (two_ranks.run(second_step, replace(case, leave_out=leave_out)) for leave_out in (False, True))
    for without, left_out in zip(off, on, strict=True):
        assert without.averaged["3.weight"].isnan().sum() == 1
        assert left_out.averaged["3.weight"].isfinite().all()
        buckets = len(without.buckets)
        assert without.collectives == buckets + 1, "and the rows"
        assert left_out.collectives == 2 * buckets + 1


@pytest.mark.parametrize("looks", [True, False])
def test_a_parameter_of_nobodys_leaves_no_rank_out(two_ranks: Ranks, looks: bool) -> None:
    """DDP averages it, no optimizer steps it: its NaN stays its own."""
    case = Case(broken=((1, "3.weight", NAN),), unwatched=("3.weight", "5.weight"), looks=looks)
    seen = two_ranks.run(second_step, case)
    check(seen, case.unwatched)
    assert seen[0].averaged["3.weight"].isnan().sum() == 1
    for one in seen:
        assert one.rows[:, ROW_NAN].tolist() == [0, 0]


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize(
    "broken", [(), ((1, "3.weight", NAN),), ((0, "3.weight", NAN),)], ids=["whole", "same", "other"]
)
def test_a_rank_that_can_not_measure_goes_on(two_ranks: Ranks, broken: Any, looks: bool) -> None:
    """Nobody waits for anybody, and it still knows whether its own gradients are whole."""
    seen = two_ranks.run(second_step, Case(broken=broken, unmeasured=(1,), looks=looks))
    check(seen)
    assert seen[0].errors == 0
    assert seen[1].errors >= len(seen[1].buckets), "it must have failed"
    for one in seen:
        assert one.collectives == 2 * len(one.buckets) + 1
        assert one.rows[1, ROW_ERRORS] > 0 == one.rows[0, ROW_ERRORS]


def test_a_rank_that_is_blind_contributes_what_it_has(two_ranks: Ranks) -> None:
    """Then the average tells."""
    case = Case(broken=((1, "3.weight", NAN),), unmeasured=(1,), blind=True)
    for one in two_ranks.run(second_step, case):
        assert one.averaged["3.weight"].isnan().any()
        assert one.averaged["0.weight"].isfinite().all()


class WithTable(nn.Module):
    """A table, whose gradient may be sparse, and a parameter whose gradient is -0.0 everywhere."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, toy.FEATURES, sparse=sparse)
        self.inner = toy.build()
        self.zero = nn.Parameter(torch.zeros(5))
        self.zero.register_hook(lambda gradient: torch.full_like(gradient, -0.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(inputs)) % 3 + toy.rank()
        result: torch.Tensor = self.inner(inputs + self.table(rows)) + self.zero.sum()
        return result


def trained(options: dict[str, Any], mode: str, keeps: bool, dtype: torch.dtype) -> list[str]:
    """Digests of the gradients and weights of 20 steps; `keeps` its gradients' memory from step to step."""
    options = dict(options)
    inner = WithTable(sparse=options.pop("sparse", False)).to(dtype)
    model = DistributedDataParallel(inner, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    if mode != "plain":
        hook = local_hook(model)
        hook.start(list(inner.parameters()), lambda _error: None, leave_out=True)
    generator = torch.Generator().manual_seed(toy.rank())
    history = []
    with as_on_a_device(mode != "device"):
        for _ in range(20):
            optimizer.zero_grad(set_to_none=not keeps)
            inputs = torch.randn(8, toy.FEATURES, generator=generator).to(dtype)
            (model(inputs) - 1).square().mean().backward()
            history.append(digest(p.grad.to_dense() for p in inner.parameters()))
            optimizer.step()
            history.append(digest(inner.parameters()))
            if mode != "plain":
                assert hook.take_rows() is not None
                hook.forget()
    assert keeps or bool(torch.signbit(inner.zero.grad).all())
    return history


def check_bits(ranks: Ranks, options: dict[str, Any], mode: str, keeps: bool = False) -> None:
    for dtype in (torch.float32, torch.bfloat16) if mode == "device" else (torch.float32,):
        plain = ranks.run(trained, options, "plain", keeps, dtype)
        ours = ranks.run(trained, options, mode, keeps, dtype)
        assert plain == ours


@pytest.mark.parametrize("mode", ["host", "device"])
def test_with_all_healthy_every_bit_is_plain_ddps(some_ranks: Ranks, mode: str) -> None:
    check_bits(some_ranks, {}, mode)


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({**SMALL, "gradient_as_bucket_view": True}, False),
        ({**SMALL, "gradient_as_bucket_view": True}, True),
        ({**SMALL, "static_graph": True}, False),
        ({**SMALL, "sparse": True}, False),
        ({**SMALL, "sparse": True, "gradient_as_bucket_view": True}, False),
    ],
    ids=["views", "kept views", "static graph", "sparse", "sparse views"],
)
def test_every_bit_in_every_mode_of_ddp(three_ranks: Ranks, options: dict[str, Any], keeps: bool, mode: str) -> None:
    """1/3 is no binary fraction, so multiplying where DDP divides would show."""
    check_bits(three_ranks, options, mode, keeps)


def sparse(broken: tuple[int, ...], looks: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Own and averaged gradient of a table whose gradient is sparse, and the rows."""
    inner = WithTable(sparse=True).double()
    model = DistributedDataParallel(inner, **SMALL, gradient_as_bucket_view=True)
    hook, _ = started(model, Case())
    generator = torch.Generator().manual_seed(toy.rank())
    with as_on_a_device(looks):
        for step in range(2):
            model.zero_grad()
            inputs = torch.randn(8, toy.FEATURES, generator=generator).double()
            if step and toy.rank() in broken:
                inputs[0, 0] = math.nan
            (own,) = torch.autograd.grad(inner(inputs).square().mean(), [inner.table.weight])
            model(inputs).square().mean().backward()
            rows = hook.take_rows()
            hook.forget()
    assert own.is_sparse
    assert inner.table.weight.grad.is_sparse
    return own.to_dense(), inner.table.weight.grad.to_dense(), rows


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("broken", [(), (1,), (0, 1, 2)])
def test_sparse_gradients(three_ranks: Ranks, broken: tuple[int, ...], looks: bool) -> None:
    seen = three_ranks.run(sparse, broken, looks)
    healthy = [own for own, _, _ in seen if own.isfinite().all()]
    assert len(healthy) == 3 - len(broken)
    for _, averaged, rows in seen:
        assert averaged.equal(seen[0][1]) or not healthy
        if healthy:
            torch.testing.assert_close(averaged, torch.stack(healthy).mean(0), rtol=1e-12, atol=1e-15)
        else:
            assert not averaged.isfinite().all()
        assert rows[:, ROW_SUM_OF_SQUARES].isfinite().tolist() == [rank not in broken for rank in range(3)]


def uneven(broken: tuple[tuple[int, int], ...], looks: bool, options: dict[str, Any]) -> list[Any]:
    """Rank r has 2 + 2 r batches. For each step (own, averaged, rows), flat; (rank, step) are broken."""
    inner = toy.build().double()
    breaker = Breaker(inner, tuple((rank, "3.weight", NAN) for rank, _ in broken))
    model = DistributedDataParallel(inner, **options)
    hook, _ = started(model, Case())
    generator = torch.Generator().manual_seed(toy.rank())
    history = []
    with as_on_a_device(looks), model.join():
        for step in range(2 + 2 * toy.rank()):
            model.zero_grad()
            inputs = torch.randn(8, toy.FEATURES, generator=generator).double()
            (own,) = torch.autograd.grad(inner(inputs).square().mean(), [inner[3].weight])
            breaker.on = (toy.rank(), step) in broken
            own = breaker("3.weight", own) if breaker.on else own
            model(inputs).square().mean().backward()
            breaker.on = False
            rows = hook.take_rows()
            hook.forget()
            history.append((own, inner[3].weight.grad.clone(), rows))
    dist.barrier()
    return history


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "static_graph": True}], ids=["buckets", "static graph"])
@pytest.mark.parametrize("looks", [True, False])
def test_ranks_that_ran_out_of_data(three_ranks: Ranks, looks: bool, options: dict[str, Any]) -> None:
    """Their zeros make the update smaller, as DDP wants it, but they stand in for nobody who is left out."""
    broken = ((1, 0), (1, 2), (2, 3), (2, 5))  # alone bad of three; one of two, twice; the only one left
    seen = three_ranks.run(uneven, broken, looks, options)
    for step in range(6):
        active = [(rank, seen[rank][step]) for rank in range(3) if step < len(seen[rank])]
        healthy = [made[0] for rank, made in active if (rank, step) not in broken]
        for _, (_, averaged, rows) in active:
            if healthy:
                mean = torch.stack(healthy).mean(0) * len(active) / 3
                torch.testing.assert_close(averaged, mean, rtol=1e-12, atol=1e-15)
            else:
                assert not averaged.isfinite().any()
            bad = rows[:, ROW_SUM_OF_SQUARES].isfinite().logical_not().nonzero().flatten().tolist()
            assert bad == [rank for rank, at in broken if at == step]
    assert not seen[2][5][0].isfinite().all(), "the last one must have been broken"


def many_steps(models: int) -> tuple[str, int]:
    """Every rank is broken now and then, in several models at once; never all of them."""
    world, rank = dist.get_world_size(), toy.rank()
    made = []
    for seed in range(models):
        inner = toy.build(seed)
        model = DistributedDataParallel(inner, **SMALL)
        hook = local_hook(model)
        hook.start(list(inner.parameters()), lambda _error: None, leave_out=True)
        made.append((inner, model, hook, torch.optim.AdamW(model.parameters(), lr=1e-3)))
    generator, left_out = torch.Generator().manual_seed(rank), 0
    for step in range(60):
        for place, (_, model, hook, optimizer) in enumerate(made):
            optimizer.zero_grad()
            inputs = torch.randn(8, toy.FEATURES, generator=generator)
            if (step + place) % (world + 1) == rank:
                inputs[0, 0] = math.nan
                left_out += 1
            model(inputs).square().mean().backward()
            optimizer.step()
            rows = hook.take_rows()
            hook.forget()
            broken = (step + place) % (world + 1)
            assert rows[:, ROW_SUM_OF_SQUARES].isfinite().tolist() == [r != broken for r in range(world)]
    for inner, *_ in made:
        assert all(p.isfinite().all() for p in inner.parameters())
    return digest(p for inner, *_ in made for p in inner.parameters()), left_out


def test_replicas_stay_equal_whoever_is_left_out(some_ranks: Ranks) -> None:
    results = some_ranks.run(many_steps, 2)
    assert all(left_out > 20 for _, left_out in results) or some_ranks.world_size > 3
    assert all(weights == results[0][0] for weights, _ in results)


def beside_a_hook() -> tuple[bool, bool, bool, int]:
    """The script registers a hook of its own later."""
    model = DistributedDataParallel(toy.build())
    hook, buckets = started(model, Case())
    alone = hook.leaves_out
    watch = RegistrationWatch()
    watch.start(lambda: None)
    try:
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    finally:
        watch.stop()
    with counted() as collectives:
        model(torch.randn(8, toy.FEATURES)).square().mean().backward()
    beside = hook.leaves_out
    hook.stop()
    return alone, beside, hook.leave_out, len(collectives) - len(buckets)


def test_beside_a_hook_of_the_scripts_nobody_is_left_out(two_ranks: Ranks) -> None:
    assert two_ranks.run(beside_a_hook) == [(True, False, False, 0)] * 2
