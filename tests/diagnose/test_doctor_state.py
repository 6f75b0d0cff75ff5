"""The doctor leaves no trace: weights, buffers, gradients, modes, hooks, random and optimizer state, to the bit."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from healthy import classify, pictures
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_doctor import rows

from gradmon.diagnose.doctor import ModelError, diagnose


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Everything(nn.Module):
    """Batch statistics, dropout, a frozen layer in eval mode, gradients that lie there already."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.drop = nn.Dropout(0.5)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 10))
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x.clamp_(-1, 1)  # in place, on the batch itself
        x = F.relu(self.bn(self.conv(x)), inplace=True).mean((2, 3))
        random.random()
        return self.head(self.drop(self.frozen(x)))


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> tuple[Any, ...]:
    return copy.deepcopy(
        (
            dict(model.state_dict()),
            [p.grad for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
            optimizer.state_dict(),
            batch,
            torch.get_rng_state(),
            random.getstate(),
        )
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _trained() -> tuple[Everything, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    model, batch = Everything(), pictures(20, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        classify(model, (batch[0].clone(), batch[1])).backward()
        optimizer.step()
    return model, optimizer, batch


def test_leaves_everything_as_it_was() -> None:
    model, optimizer, batch = _trained()
    before = _snapshot(model, optimizer, batch)
    gradients = [p.grad for p in model.parameters()]
    buffers = [id(b) for b in model.buffers()]
    diagnosis = diagnose(model, batch, classify, optimizer=optimizer, lr_test=True)
    assert "lr_range" in {finding.rule for finding in diagnosis}  # it has stepped, many times
    assert _same(before, _snapshot(model, optimizer, batch))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert [id(b) for b in model.buffers()] == buffers
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, hook) for module in model.modules() for hook in hooks)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_run_goes_on_as_without_it() -> None:
    def run(*, audited: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model, optimizer, batch = _trained()
        if audited:
            diagnose(model, batch, classify, optimizer=optimizer, lr_test=True)
        for _ in range(3):
            optimizer.zero_grad()
            classify(model, (batch[0].clone(), batch[1])).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    assert _same(run(audited=False), run(audited=True))


def test_leaves_everything_as_it_was_when_the_model_fails() -> None:
    model, optimizer, batch = _trained()
    before = _snapshot(model, optimizer, batch)

    def fails(model: nn.Module, batch: Any) -> Tensor:
        classify(model, batch).backward()
        raise RuntimeError("no labels today")

    with pytest.raises(ModelError, match="RuntimeError: no labels today"):
        diagnose(model, batch, fails, optimizer=optimizer)
    assert _same(before, _snapshot(model, optimizer, batch))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_in_eval_mode_is_audited_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)).eval()
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    diagnose(model, rows(), classify)
    assert seen == [True]
    assert not model.training
