"""The ladder's actions on whole optimizers, several at once and compiled ones, through `attach`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn
from torch.optim import Optimizer
from toy import equal

import gradmon
from gradmon.journal import read_journal

BROKEN = 20


def state_of(optimizers: list[Optimizer]) -> list[Any]:
    return copy.deepcopy([list(o.state.values()) for o in optimizers])


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Matrices(nn.Module):
    """Two-dimensional weights for Muon, and biases and a norm for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(toy.FEATURES, 16)
        self.norm = nn.LayerNorm(16)
        self.outer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.outer(self.norm(torch.tanh(self.inner(inputs))))))


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, fused=True)]


def train(directory: Path, break_with: float, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """(weights, states and gradients before the broken step, weights and states after it, records)."""
    torch.manual_seed(0)
    model = Matrices()
    optimizers = muon_and_adamw(model)
    monitor = gradmon.attach(model, optimizers, config={"dir": str(directory), "agent": {"start": "off"}})
    before: list[Any] = []
    after: list[Any] = []
    for step in range(1, BROKEN + 2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        inputs = torch.randn(16, toy.FEATURES, generator=torch.Generator().manual_seed(step))
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        if step == BROKEN:
            before = [weights_of(model), state_of(optimizers)]
            gradient = model.get_parameter(where).grad
            assert gradient is not None
            gradient.mul_(break_with)
            before.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for optimizer in optimizers:
            optimizer.step()
        if step == BROKEN:
            after = [weights_of(model), state_of(optimizers)]
    monitor.detach()
    assert monitor.journal_path is not None
    return before, after, [r for _, r in read_journal(monitor.journal_path).steps]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("where", ["inner.weight", "head.bias"])
def test_muon_and_adamw_are_skipped_together(tmp_path: Path, where: str) -> None:
    """Half a step would be taken if each optimizer judged its own gradients."""
    before, after, records = train(tmp_path, float("nan"), where)
    assert equal(before[:2], after)
    assert len(records) == BROKEN + 1, "one step for both"
    assert (records[BROKEN - 1].action, records[BROKEN].action) == ("skip", "none")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_are_rescaled_by_one_factor(tmp_path: Path) -> None:
    """By their momentum's own formula: 0.05 and 0.1 of a gradient, times the factor, are what the step has added."""
    before, after, records = train(tmp_path, 1e4, "inner.weight")
    record = records[BROKEN - 1]
    assert record.action == "rescale"
    factor = record.grad_norm_applied / record.grad_norm
    assert factor < 1e-2
    gradients, (muon, adam), (muon_after, adam_after) = before[2], before[1], after[1]
    matrices = [g for g in gradients if g.dim() == 2]
    rest = [g for g in gradients if g.dim() != 2]
    for old, new, gradient in zip(muon, muon_after, matrices, strict=True):
        expected = old["momentum_buffer"] + 0.05 * (gradient * factor - old["momentum_buffer"])
        assert torch.allclose(new["momentum_buffer"], expected, rtol=1e-4, atol=1e-9)
    for old, new, gradient in zip(adam, adam_after, rest, strict=True):
        expected = old["exp_avg"] + 0.1 * (gradient * factor - old["exp_avg"])
        assert torch.allclose(new["exp_avg"], expected, rtol=1e-4, atol=1e-9)


class ScheduleFree(Optimizer):
    """Counts its steps in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    z.sub_(p.grad, alpha=group["lr"])
                    p.lerp_(z, group["lr"] ** 2 / group["weight_sum"])


def test_what_an_optimizer_counts_in_its_groups_is_not_counted_by_a_skip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = toy.build()
    optimizer = ScheduleFree(model.parameters())
    with gradmon.attach(model, optimizer, config={"dir": str(tmp_path), "agent": {"start": "off"}}):
        for step in range(1, 6):
            optimizer.zero_grad()
            (model(torch.randn(4, toy.FEATURES)).square().mean() * (float("nan") if step == 4 else 1)).backward()
            before = [weights_of(model), state_of([optimizer]), optimizer.param_groups[0]["k"]]
            optimizer.step()
            after = [weights_of(model), state_of([optimizer]), optimizer.param_groups[0]["k"]]
            assert equal(before, after) == (step == 4)
    assert optimizer.param_groups[0]["k"] == 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_skipped_in_its_first_step(tmp_path: Path, momentum: float) -> None:
    """The kernel's own skip leaves its momentum uninitialised: the next step would move weights by 1e36."""
    torch.manual_seed(0)
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum, fused=True)
    with gradmon.attach(model, optimizer, config={"dir": str(tmp_path), "agent": {"start": "off"}}):
        for step in range(1, 4):
            optimizer.zero_grad()
            (model(torch.ones(4, toy.FEATURES)).square().mean() * (float("nan") if step == 1 else 1)).backward()
            optimizer.step()
    expected = toy.build()
    plain = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=momentum, fused=True)
    for _ in range(2):
        plain.zero_grad()
        expected(torch.ones(4, toy.FEATURES)).square().mean().backward()
        plain.step()
    assert equal(weights_of(model), weights_of(expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_a_compiled_step_is_skipped_rescaled_and_slowed(tmp_path: Path, kind: str) -> None:
    """A hook that dynamo traced into the step would be silently ignored."""
    torch.manual_seed(0)
    model = toy.build()
    rate: Any = torch.tensor(1e-3) if kind == "fused" else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **{kind: True})
    monitor = gradmon.attach(model, optimizer, config={"dir": str(tmp_path), "agent": {"start": "off"}})
    compiled = torch.compile(optimizer.step, backend="eager")
    factors = {30: float("nan"), 40: 1e4, 41: 1e4, 42: 1e4, 43: 1e4}
    for step in range(1, 51):
        optimizer.zero_grad()
        inputs = torch.randn(16, toy.FEATURES, generator=torch.Generator().manual_seed(step))
        ((model(inputs) - inputs.sum(1, keepdim=True)).square().mean() * factors.get(step, 1.0)).backward()
        before = [weights_of(model), state_of([optimizer])]
        compiled()
        unchanged = equal(before, [weights_of(model), state_of([optimizer])])
        assert unchanged == (step in (30, 41, 42, 43)), step
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3, rel=1e-6)
    monitor.detach()
    assert monitor.journal_path is not None
    records = {r.step: r for _, r in read_journal(monitor.journal_path).steps}
    assert {s: r.action for s, r in records.items() if r.action != "none"} == {
        30: "skip", 40: "rescale", 41: "skip", 42: "skip", 43: "skip",
    }  # fmt: skip
    assert records[44].learning_rate_scale == 0.3
    torch._dynamo.reset()
