"""What gradmon does to optimizers, against plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmon.actions import OptimizerActions, Verdict, judge, name_verdict, takes_device_verdict, unjudged
from gradmon.detector import Limits

MAKERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_plain": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam_amsgrad_fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


def verdict(norm: float, limits: Limits | None = None, left: float | None = None) -> Verdict:
    tensor = torch.tensor(norm, dtype=torch.float64)
    rest = tensor if left is None else torch.tensor(left, dtype=torch.float64)
    return judge(tensor, rest, limits or Limits())


def model_and_gradients(seed: int = 0) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    return model, [torch.randn_like(p) for p in model.parameters()]


def set_gradients(model: nn.Module, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*model.parameters(), *states]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def expected_verdict(norm: float, left: float, limits: Limits) -> tuple[str, str, float, float]:
    """The ladder's first rungs on plain floats: action, reason, divisor, applied norm."""
    if not math.isfinite(norm):
        return "skip", "nonfinite", 1.0, 0.0
    spike = norm > limits.spike_above
    target = min(limits.rescale_to, limits.max_norm) if spike else limits.max_norm
    reason = "spike" if spike else "max_norm" if left > limits.max_norm else "healthy"
    if left > target:
        return "rescale", reason, left / target, target
    return "none", reason, 1.0, left


@given(
    norm=st.one_of(st.floats(0, 1e30), st.sampled_from([math.nan, math.inf])),
    clipped=st.floats(0.01, 1.0),
    above=st.one_of(st.just(math.inf), st.floats(1e-3, 1e6)),
    max_norm=st.one_of(st.just(math.inf), st.floats(1e-3, 1e3)),
)
def test_judge(norm: float, clipped: float, above: float, max_norm: float) -> None:
    limits = Limits(above, above / 4, max_norm)
    left = norm * clipped
    judged = verdict(norm, limits, left)
    action, reason, divisor, applied = expected_verdict(norm, left, limits)
    assert float(judged.skip) == (action == "skip")
    if action != "skip":
        assert float(judged.divisor) == pytest.approx(divisor)
    named = name_verdict(float(judged.norm), float(judged.left), float(judged.divisor), limits)
    assert named == (action, reason, pytest.approx(applied))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_skipped_step_changes_nothing(kind: str, first: bool, bad: float) -> None:
    """Parameters, moments and step counts, with non-finite gradients pending; and the next step is plain torch's."""
    model, gradients = model_and_gradients()
    twin, _ = model_and_gradients()
    optimizer, reference = MAKERS[kind](model.parameters()), MAKERS[kind](twin.parameters())
    actions = OptimizerActions(optimizer)
    if not first:
        for m, o in ((model, optimizer), (twin, reference)):
            set_gradients(m, gradients)
            o.step()
    before = snapshot(model, optimizer)
    poisoned = [g.clone() for g in gradients]
    poisoned[1].view(-1)[0] = bad
    set_gradients(model, poisoned)
    actions.before(verdict(bad), 1.0)
    optimizer.step()
    actions.after()
    after = snapshot(model, optimizer)
    parameters = len(list(model.parameters()))
    if first:  # Adam may have made its state in the kernel's call; it must be as new
        assert same(before[:parameters], after[:parameters])
    else:
        assert same(before, after)
    assert all(p.grad is not None for p in model.parameters()), "gradients are put back"
    for m, o in ((model, optimizer), (twin, reference)):
        set_gradients(m, gradients)
        o.step()
    assert same(snapshot(model, optimizer), snapshot(twin, reference))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_rescaled_step_is_plain_torchs_with_smaller_gradients(kind: str) -> None:
    model, gradients = model_and_gradients()
    twin, _ = model_and_gradients()
    optimizer, reference = MAKERS[kind](model.parameters()), MAKERS[kind](twin.parameters())
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    actions = OptimizerActions(optimizer)
    for _ in range(3):
        set_gradients(model, gradients)
        actions.before(verdict(norm, Limits(norm / 2, norm / 8)), 1.0)
        optimizer.step()
        actions.after()
        set_gradients(twin, [g / 8 for g in gradients])
        reference.step()
    for left, right in zip(snapshot(model, optimizer), snapshot(twin, reference), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw_fused", "adamw", "sgd"])
def test_a_healthy_verdict_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model, gradients = model_and_gradients()
    twin, _ = model_and_gradients()
    model, twin, gradients = model.to(dtype), twin.to(dtype), [g.to(dtype) for g in gradients]
    optimizer, reference = MAKERS[kind](model.parameters()), MAKERS[kind](twin.parameters())
    actions = OptimizerActions(optimizer)
    for _ in range(5):
        set_gradients(model, gradients)
        actions.before(verdict(3.0, Limits(10.0, 2.0, 5.0)), 1.0)
        optimizer.step()
        actions.after()
        set_gradients(twin, gradients)
        reference.step()
    assert same(snapshot(model, optimizer), snapshot(twin, reference))


def test_skip_with_static_gradient_memory_is_no_one_way_door() -> None:
    """Gradients left at None would never be written again by a graph replay that holds their memory."""
    model, gradients = model_and_gradients()
    optimizer = MAKERS["sgd"](model.parameters())
    set_gradients(model, gradients)
    memory = [p.grad.data_ptr() for p in model.parameters()]
    actions = OptimizerActions(optimizer)
    actions.before(verdict(math.nan), 1.0)
    optimizer.step()
    actions.after()
    assert [p.grad.data_ptr() for p in model.parameters()] == memory


def test_group_entries_are_restored_by_a_skip() -> None:
    """Schedule-free optimizers count their steps in the groups."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    model, gradients = model_and_gradients()
    optimizer = Counting(model.parameters(), lr=0.1)
    actions = OptimizerActions(optimizer)
    counts = []
    for norm in (1.0, math.nan, 1.0):
        set_gradients(model, gradients)
        actions.before(verdict(norm), 1.0)
        optimizer.step()
        actions.after()
        counts.append(optimizer.param_groups[0].get("k"))
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("tensor_rate", [False, True])
@pytest.mark.parametrize("kind", ["adamw_fused", "adamw_plain", "sgd"])
@pytest.mark.parametrize("scheduler", ["lambda", "cosine"])
def test_no_scheduler_ever_sees_the_scaled_rate(kind: str, scheduler: str, tensor_rate: bool) -> None:
    model, gradients = model_and_gradients()
    twin, _ = model_and_gradients()
    optimizer, reference = MAKERS[kind](model.parameters()), MAKERS[kind](twin.parameters())
    if tensor_rate:
        for o in (optimizer, reference):
            o.param_groups[0]["lr"] = torch.tensor(1e-2)
    make = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    }[scheduler]
    schedule, reference_schedule = make(optimizer), make(reference)
    actions = OptimizerActions(optimizer)
    for step in range(6):
        scale = 0.5 if step in (2, 3) else 1.0
        set_gradients(model, gradients)
        actions.before(verdict(1.0), scale)
        during = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        actions.after()
        set_gradients(twin, gradients)
        reference.step()
        assert during == pytest.approx(scale * float(reference.param_groups[0]["lr"]))
        schedule.step()
        reference_schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) == float(reference.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["adamw_fused", "sgd"])
def test_a_step_that_raised_is_undone_at_the_next(kind: str) -> None:
    model, gradients = model_and_gradients()
    optimizer = MAKERS[kind](model.parameters())
    actions = OptimizerActions(optimizer)
    set_gradients(model, gradients)
    actions.before(verdict(math.nan), 0.5)  # and then optimizer.step() raises: `after` is never reached
    actions.restore()  # as before a state_dict
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert all(p.grad is not None for p in model.parameters())
    assert not {"found_inf", "grad_scale"} & set(vars(optimizer))
    actions.before(verdict(math.nan), 0.5)
    actions.before(verdict(1.0), 1.0)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    actions.after()


def test_fused_is_asked_at_each_step() -> None:
    """A checkpoint of a non-fused optimizer turns the groups' flag off, while the optimizer still says it can."""
    model, _ = model_and_gradients()
    optimizer = MAKERS["adamw_fused"](model.parameters())
    assert takes_device_verdict(optimizer)
    assert not takes_device_verdict(MAKERS["sgd_fused"](model.parameters())), "fused SGD's first skip is no skip"
    plain = MAKERS["adamw"](model.parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer._step_supports_amp_scaling
    assert not takes_device_verdict(optimizer)


@pytest.mark.parametrize(("theirs", "ours"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)])
def test_found_inf_of_a_scaler_is_joined_by_maximum(theirs: float, ours: float) -> None:
    """found_inf must be exactly 1: a sum of 2 would step with the NaN."""
    model, gradients = model_and_gradients()
    optimizer = MAKERS["adamw_fused"](model.parameters())
    set_gradients(model, gradients)
    optimizer.found_inf = torch.tensor(theirs)
    optimizer.grad_scale = torch.tensor(1024.0)
    actions = OptimizerActions(optimizer)
    actions.before(verdict(math.nan if ours else 1.0), 1.0)
    assert float(optimizer.found_inf) == max(theirs, ours)
    assert float(optimizer.grad_scale) == 1024.0
    before = snapshot(model, optimizer)[:4]
    optimizer.step()
    actions.after()
    assert same(before, snapshot(model, optimizer)[:4]) == bool(max(theirs, ours))
    assert float(optimizer.found_inf) == theirs, "what was there is put back"


def test_unjudged_gradients_are_left_alone() -> None:
    left = unjudged(torch.tensor(math.nan, dtype=torch.float64))
    assert (float(left.skip), float(left.divisor)) == (0.0, 1.0)
