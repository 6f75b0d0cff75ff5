"""Mixed precision, closures, complex, sparse and compiled models, and clips under every name; against plain torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Early imports, as scripts have them: before gradmon is attached.
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from toy import equal

import gradmon
from gradmon.journal import JournalView, read_journal
from gradmon.record import StepRecord

SCALE = 2.0**12


def view_of(monitor: gradmon.Monitor) -> JournalView:
    assert monitor.journal_path is not None
    view = read_journal(monitor.journal_path)
    assert not [key for key, count in view.counters.items() if "errors" in key[0] and count]
    return view


def records_of(monitor: gradmon.Monitor) -> list[StepRecord]:
    return [made for _, made in view_of(monitor).steps]


def norm_of(gradients: Any) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


# --- GradScaler ------------------------------------------------------------------------------------------------------


def scaled(
    directory: str, optimizer_kind: str, attached: bool, clip: float | None, overflow: tuple[int, ...], unscale: bool
) -> tuple[list[torch.Tensor], list[StepRecord], list[tuple[float, float]], float]:
    """fp32 with a GradScaler, as bf16-free AMP on CPU allows; `overflow` are steps whose scaled loss is infinite."""
    os.environ["GRADMON_DIR"] = directory
    ranked = torch.distributed.is_initialized()
    inner = toy.build()
    model: nn.Module = DistributedDataParallel(inner) if ranked else inner
    optimizer = toy.optimizer_for(optimizer_kind, model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=4)
    monitor = gradmon.attach(model, optimizer) if attached else None
    generator = torch.Generator().manual_seed(toy.rank())
    norms = []
    for step in range(1, 17):
        optimizer.zero_grad()
        inputs = torch.randn(8, toy.FEATURES, generator=generator)
        targets = inputs.sum(1, keepdim=True) * 0.1
        own = toy.reference_norms(model, inputs, targets, 1.0)
        mean = own.clone()
        if ranked:
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        norms.append((float(own.norm()), float(mean.norm())))
        loss = (model(inputs) - targets).square().mean() * (math.inf if step in overflow else 1.0)
        scaler.scale(loss).backward()
        if unscale or clip is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    records = []
    if monitor is not None:
        monitor.detach()
        records = records_of(monitor)
    return [p.detach().clone() for p in inner.parameters()], records, norms, float(scaler.get_scale())


def check_scaled(plain: Any, attached: Any, clip: float | None, overflow: tuple[int, ...], rank: int) -> None:
    assert equal(plain[0], attached[0]), "bit for bit"
    assert plain[3] == attached[3], "the scaler's own course is the same"
    _, records, norms, _ = attached
    assert [r.step for r in records] == list(range(1, 17))
    assert [r.step for r in records if r.reason == "scaler_skip"] == list(overflow)
    scale = SCALE
    grown = 0
    for record, (own, mean) in zip(records, norms, strict=True):
        assert record.loss_scale == scale
        if record.step in overflow:
            assert (record.action, record.grad_norm_applied) == ("skip", 0)
            scale, grown = scale / 2, 0
            continue
        assert (record.action, record.reason) == ("none", "healthy")
        assert record.grad_norm == pytest.approx(mean, rel=1e-5), "unscaled, before the clip"
        assert record.local_grad_norm == pytest.approx(own, rel=1e-5), "unscaled"
        assert record.grad_norm_applied == pytest.approx(mean if clip is None else clip, rel=1e-3)
        grown += 1
        if grown == 4:
            scale, grown = scale * 2, 0


SCALED = [(None, False), (None, True), (0.05, True)]


@pytest.mark.parametrize("overflow", [(), (9, 12)], ids=["clean", "overflows"])
@pytest.mark.parametrize(("clip", "unscale"), SCALED)
@pytest.mark.parametrize("optimizer", ["fused_adamw", "adamw", "sgd"])
def test_a_scaler_in_one_process(
    directory: Path, optimizer: str, clip: float | None, unscale: bool, overflow: tuple[int, ...]
) -> None:
    plain, attached = (scaled(str(directory), optimizer, on, clip, overflow, unscale) for on in (False, True))
    check_scaled(plain, attached, clip, overflow, 0)


@pytest.mark.parametrize(("clip", "unscale"), SCALED)
@pytest.mark.parametrize("optimizer", ["fused_adamw", "sgd"])
def test_a_scaler_under_ddp(
    two_ranks: Ranks, tmp_path: Path, optimizer: str, clip: float | None, unscale: bool
) -> None:
    arguments = (clip, (9, 12), unscale)
    without = two_ranks.run(scaled, str(tmp_path), optimizer, False, *arguments)
    attached = two_ranks.run(scaled, str(tmp_path), optimizer, True, *arguments)
    for rank in range(2):
        check_scaled(without[rank], attached[rank], clip, (9, 12), rank)
    assert attached[0][2] != attached[1][2], "ranks must have gradients of their own"


@pytest.mark.parametrize("optimizer", ["fused_adamw", "sgd"])
def test_ten_scaler_skips_in_a_row_are_told(directory: Path, optimizer: str, caplog: pytest.LogCaptureFixture) -> None:
    """A true NaN halves the scale for ever; without a word the run would stand still until morning."""
    model = toy.build()
    made = toy.optimizer_for(optimizer, model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    never = {"stop": {"after_scaler_skips": 0}}
    with caplog.at_level("WARNING"), gradmon.attach(model, made, config=never) as monitor:
        for step in range(14):
            made.zero_grad()
            loss = model(torch.randn(4, toy.FEATURES)).square().mean() * (math.nan if step >= 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(made)
            scaler.update()
    view = view_of(monitor)
    assert [(e.step, e.kind, e.action) for _, e in view.events] == [(12, "scaler_streak", "none")]
    assert "skipped 10 steps in a row" in caplog.text
    assert view.counters["gradmon_scaler_skips_total", ()] == 12
    assert view.counters["gradmon_nonfinite_steps_total", ()] == 0
    assert view.counters["gradmon_actions_total", ("skip", "nonfinite", "yes")] == 0
    assert [made.reason for _, made in view.steps] == ["healthy"] * 2 + ["scaler_skip"] * 12


def test_overflows_never_enter_the_baseline(directory: Path) -> None:
    _, records, *_ = scaled(str(directory), "fused_adamw", True, None, (10, 11, 12), False)
    assert records[-1].grad_norm_limit is not None
    assert records[12].grad_norm_limit == records[9].grad_norm_limit, "three overflows have taught nothing"


def test_the_scaler_is_torchs_own_again_after_detach(directory: Path) -> None:
    original = torch.amp.GradScaler.step
    model = toy.build()
    with gradmon.attach(model, toy.optimizer_for("sgd", model.parameters())):
        assert torch.amp.GradScaler.step is not original
    assert torch.amp.GradScaler.step is original


def test_bf16_autocast(directory: Path) -> None:
    """Gradients are float32 there; the forward alone is bf16."""

    def run(attached: bool) -> tuple[list[torch.Tensor], list[StepRecord], list[float]]:
        model = toy.build()
        optimizer = toy.optimizer_for("fused_adamw", model.parameters())
        generator = torch.Generator().manual_seed(0)
        monitor = gradmon.attach(model, optimizer) if attached else None
        norms = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.randn(8, toy.FEATURES, generator=generator)).square().mean()
            loss.backward()
            norms.append(norm_of(p.grad for p in model.parameters()))
            optimizer.step()
        if monitor is not None:
            monitor.detach()
        return list(model.parameters()), [] if monitor is None else records_of(monitor), norms

    (plain, _, _), (attached, records, norms) = run(False), run(True)
    assert equal([p.detach() for p in plain], [p.detach() for p in attached])
    assert [r.grad_norm for r in records] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.float64])
def test_parameters_of_other_types(directory: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 30, dtype=dtype))
    holder = nn.ParameterDict({"weight": weight, "bias": nn.Parameter(torch.randn(7))})
    optimizer = torch.optim.SGD(holder.parameters(), lr=1e-3)
    with gradmon.attach(holder, optimizer) as monitor:
        norms = []
        for step in range(10):
            weight.grad = torch.randn(40, 30, dtype=dtype) * (step + 1)
            holder["bias"].grad = torch.randn(7)
            if step == 8:
                weight.grad.view(-1)[5] = math.nan
            wide = torch.view_as_real(weight.grad) if dtype.is_complex else weight.grad
            norms.append(norm_of((wide, holder["bias"].grad)))
            before = weight.detach().clone()
            optimizer.step()
            assert torch.equal(before, weight) == (step == 8)
    records = records_of(monitor)
    assert [r.grad_norm for r in records] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert (records[8].action, records[8].parameter) == ("skip", "weight")
    assert records[0].element_count == sum(view_of(monitor).elements) == 40 * 30 * (2 if dtype.is_complex else 1) + 7


# --- closures --------------------------------------------------------------------------------------------------------


def with_closure(
    directory: str, kind: str, attached: bool, broken: tuple[int, ...] = (), spike: tuple[int, ...] = ()
) -> tuple[list[list[torch.Tensor]], list[StepRecord], list[float]]:
    """Lightning's way: zero_grad, forward and backward inside `step`. Parameters after each step; norms by torch."""
    os.environ["GRADMON_DIR"] = directory
    inner = toy.build()
    model = DistributedDataParallel(inner) if torch.distributed.is_initialized() else inner
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4),
    }
    optimizer = makers.get(kind, lambda: toy.optimizer_for(kind, model.parameters()))()
    monitor = gradmon.attach(model, optimizer) if attached else None
    generator = torch.Generator().manual_seed(toy.rank())
    after, norms = [], []
    for step in range(1, 21):
        inputs = torch.randn(8, toy.FEATURES, generator=generator)
        weight = math.nan if step in broken and toy.rank() == 0 else 1e3 if step in spike else 1.0
        first: list[float] = []

        def closure(inputs: torch.Tensor = inputs, weight: float = weight, first: list[float] = first) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True) * 0.1).square().mean() * weight
            loss.backward()
            if not first:
                first.append(norm_of(p.grad for p in model.parameters()))
            return loss

        optimizer.step(closure)
        norms.append(first[0])
        after.append([p.detach().clone() for p in inner.parameters()])
    if monitor is not None:
        monitor.detach()
    return after, [] if monitor is None else records_of(monitor), norms


CLOSURES = ["lbfgs", "fused_adamw", "adamw", "sgd"]


@pytest.mark.parametrize("kind", CLOSURES)
def test_closures_are_left_alone_while_all_is_well(directory: Path, kind: str) -> None:
    (plain, _, _), (attached, records, norms) = (with_closure(str(directory), kind, on) for on in (False, True))
    assert equal(plain, attached)
    assert [(r.action, r.reason, r.applied) for r in records] == [("none", "healthy", True)] * 20
    assert [r.grad_norm for r in records] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_nan_inside_a_closure_is_skipped(directory: Path, kind: str) -> None:
    plain, *_ = with_closure(str(directory), kind, False, broken=(12,))
    assert any(p.isnan().any() for p in plain[-1]) or kind == "lbfgs"
    attached, records, _ = with_closure(str(directory), kind, True, broken=(12,))
    assert equal(attached[10], attached[11]), "the step changes nothing"
    assert not equal(attached[11], attached[12])
    assert all(p.isfinite().all() for p in attached[-1])
    assert [(r.step, r.action) for r in records if r.action != "none"] == [(12, "skip")]


def test_a_skipped_lbfgs_step_leaves_its_counters(directory: Path) -> None:
    model = toy.build()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    torch.manual_seed(0)
    with gradmon.attach(model, optimizer):
        for step in range(4):
            before = {k: v for k, v in optimizer.state[next(model.parameters())].items() if isinstance(v, int)}

            def closure(bad: bool = step == 3) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(torch.randn(8, toy.FEATURES)).square().mean() * (math.nan if bad else 1.0)
                loss.backward()
                return loss

            optimizer.step(closure)
    after = {k: v for k, v in optimizer.state[next(model.parameters())].items() if isinstance(v, int)}
    assert before["func_evals"] > 3, "three steps must have counted"
    assert before == after


@pytest.mark.parametrize("kind", ["fused_adamw", "sgd"])
def test_a_spike_inside_a_closure_is_rescaled(directory: Path, kind: str) -> None:
    _, records, norms = with_closure(str(directory), kind, True, spike=(18,))
    step = records[17]
    assert (step.action, step.reason) == ("rescale", "spike")
    before = sorted(norms[:17])
    assert step.grad_norm_applied == pytest.approx(before[8], rel=1e-5)


def test_lbfgs_is_never_rescaled(directory: Path) -> None:
    """It compares the gradients of one step with each other."""
    plain, *_ = with_closure(str(directory), "lbfgs", False, spike=(18,))
    attached, records, _ = with_closure(str(directory), "lbfgs", True, spike=(18,))
    assert equal(plain, attached)
    assert records[17].action == "none"
    assert records[17].reason == "spike", "it is seen all the same"


def test_a_fixed_clip_has_no_effect_on_lbfgs_and_says_so(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = toy.build()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, toy.FEATURES)).square().mean()
        loss.backward()
        return loss

    with caplog.at_level("WARNING"), gradmon.attach(model, optimizer, config={"clip": {"max_norm": 1e-3}}) as monitor:
        optimizer.step(closure)
    assert [r.action for r in records_of(monitor)] == ["none"]
    assert "clip.max_norm has no effect on LBFGS" in caplog.text


@pytest.mark.parametrize("kind", ["lbfgs", "fused_adamw"])
def test_closures_under_ddp(two_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    results = two_ranks.run(with_closure, str(tmp_path), kind, True, (12,))
    for after, records, _ in results:
        assert equal(results[0][0], after)
        assert all(p.isfinite().all() for p in after[-1])
        assert [(r.step, r.action, r.culprit_rank) for r in records if r.action != "none"] == [(12, "skip", 0)]


# --- the script's own clip, under every name -------------------------------------------------------------------------


def _titan(parameters: list[nn.Parameter]) -> None:
    """As torchtitan does it."""
    total = get_total_norm([p.grad for p in parameters if p.grad is not None])
    clip_grads_with_norm_(parameters, 0.05, total)


CLIPS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.05),
    "norm by attribute": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05),
    "norm, one by one": lambda parameters: clip_grad_norm_(parameters, 0.05, foreach=False),
    "largest element": lambda parameters: clip_grad_norm_(parameters, 0.01, norm_type=math.inf),
    "titan": _titan,
    "value": lambda parameters: clip_grad_value_(parameters, 0.01),
    "value, one by one": lambda parameters: clip_grad_value_(parameters, 0.01, foreach=False),
    "twice": lambda parameters: (clip_grad_norm_(parameters, 0.5), clip_grad_value_(parameters, 0.01)),
}


def clipped(directory: str, name: str, attached: bool) -> Any:
    os.environ["GRADMON_DIR"] = directory
    inner = toy.build()
    model = DistributedDataParallel(inner) if torch.distributed.is_initialized() else inner
    optimizer = toy.optimizer_for("sgd", model.parameters())
    monitor = gradmon.attach(model, optimizer) if attached else None
    generator = torch.Generator().manual_seed(toy.rank())
    norms = []
    for step in range(1, 13):
        optimizer.zero_grad()
        inputs = torch.randn(8, toy.FEATURES, generator=generator)
        (model(inputs) - inputs.sum(1, keepdim=True) * 0.1).square().mean().backward()
        if step == 10 and toy.rank() == 0 and attached:
            inner[3].weight.grad[0, 0] = math.nan
        before = norm_of(p.grad for p in model.parameters())
        CLIPS[name](list(model.parameters()))
        norms.append((before, norm_of(p.grad for p in model.parameters())))
        optimizer.step()
    if monitor is not None:
        monitor.detach()
    return [p.detach().clone() for p in inner.parameters()], [] if monitor is None else records_of(monitor), norms


@pytest.mark.parametrize("name", CLIPS)
def test_norms_and_culprits_are_those_before_the_clip(directory: Path, name: str) -> None:
    _, records, norms = clipped(str(directory), name, True)
    for record, (before, after) in zip(records, norms, strict=True):
        if record.step == 10:
            assert (record.action, record.parameter, record.nan_count) == ("skip", "3.weight", 1), "before it spread"
            continue
        assert after < 0.9 * before, "the clip must have had something to do"
        assert record.grad_norm == pytest.approx(before, rel=1e-5)
        assert record.grad_norm_applied == pytest.approx(after, rel=1e-4)


def test_another_backward_after_the_clip_is_measured(directory: Path) -> None:
    """What was measured at the clip is not what the optimizer gets then."""
    model = toy.build()
    optimizer = toy.optimizer_for("sgd", model.parameters())
    with gradmon.attach(model, optimizer) as monitor:
        optimizer.zero_grad()
        model(torch.randn(8, toy.FEATURES)).square().mean().backward()
        clip_grad_norm_(model.parameters(), 0.01)
        model(torch.randn(8, toy.FEATURES)).square().mean().backward()
        expected = norm_of(p.grad for p in model.parameters())
        optimizer.step()
    (record,) = records_of(monitor)
    assert expected > 0.05
    assert record.grad_norm == pytest.approx(expected, rel=1e-5)


def test_a_logged_norm_is_no_clip(directory: Path) -> None:
    """`get_total_norm` in the first of two micro-steps changes nothing, so the whole gradient is measured later."""
    model = toy.build()
    optimizer = toy.optimizer_for("sgd", model.parameters())
    with gradmon.attach(model, optimizer) as monitor:
        for _ in range(2):
            model(torch.randn(8, toy.FEATURES)).square().mean().backward()
            get_total_norm([p.grad for p in model.parameters()])
        expected = norm_of(p.grad for p in model.parameters())
        optimizer.step()
    (record,) = records_of(monitor)
    assert record.grad_norm == pytest.approx(expected, rel=1e-5)
    assert record.grad_norm_applied == record.grad_norm


# --- other gradients -------------------------------------------------------------------------------------------------


def test_tied_weights_are_counted_once(directory: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradmon.attach(model, optimizer) as monitor:
        model(torch.randn(4, 8)).square().mean().backward()
        expected = float(model[0].weight.grad.double().norm())
        optimizer.step()
    (record,) = records_of(monitor)
    assert record.grad_norm == pytest.approx(expected, rel=1e-6)
    assert record.element_count == 64


def sparse(directory: str) -> list[tuple[float | None, float, float, float]]:
    os.environ["GRADMON_DIR"] = directory
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(24, 1))
    model = DistributedDataParallel(inner) if torch.distributed.is_initialized() else inner
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(toy.rank())
    expected = []
    with gradmon.attach(model, optimizer) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            tokens = torch.randint(5, (6, 3), generator=generator)  # few words, so rows come more than once
            own = torch.autograd.grad(inner(tokens).square().mean(), list(inner.parameters()))
            model(tokens).square().mean().backward()
            dense = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
            expected.append((norm_of(g.to_dense() if g.is_sparse else g for g in own), norm_of(dense)))
            optimizer.step()
    return [(r.local_grad_norm, r.grad_norm, *e) for r, e in zip(records_of(monitor), expected, strict=True)]


def test_sparse_gradients(two_ranks: Ranks, directory: Path) -> None:
    for results in ([sparse(str(directory))], two_ranks.run(sparse, str(directory))):
        for local, whole, own, mean in (row for rows in results for row in rows):
            assert whole == pytest.approx(mean, rel=1e-5)
            assert local == pytest.approx(own, rel=1e-5)


def compiled(directory: str, attached: bool) -> Any:
    os.environ["GRADMON_DIR"] = directory
    inner = toy.build()
    model = torch.compile(
        DistributedDataParallel(inner) if torch.distributed.is_initialized() else inner, backend="aot_eager"
    )
    optimizer = toy.optimizer_for("fused_adamw", model.parameters())
    monitor = gradmon.attach(model, optimizer) if attached else None
    generator = torch.Generator().manual_seed(toy.rank())
    for step in range(1, 13):
        optimizer.zero_grad()
        inputs = torch.randn(8, toy.FEATURES, generator=generator)
        if step == 11 and toy.rank() == 0 and attached:
            inputs[0, 0] = math.nan
        (model(inputs) - inputs.sum(1, keepdim=True) * 0.1).square().mean().backward()
        if step == 11 and not attached:
            continue
        optimizer.step()
    if monitor is not None:
        monitor.detach()
    return [p.detach().clone() for p in inner.parameters()], [] if monitor is None else records_of(monitor)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model(two_ranks: Ranks, directory: Path) -> None:
    """With a NaN in step 11: the same weights as a run that leaves this step out."""
    for without, attached in (
        (compiled(str(directory), False), compiled(str(directory), True)),
        *zip(
            two_ranks.run(compiled, str(directory), False), two_ranks.run(compiled, str(directory), True), strict=True
        ),
    ):
        assert equal(without[0], attached[0])
        assert [r.step for r in attached[1] if r.action == "skip"] == [11]
        assert attached[1][10].parameter in ("5.weight", "5.bias"), "without the prefix that torch.compile adds"
