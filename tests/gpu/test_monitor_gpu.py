"""The attached monitor on a GPU: no synchronisation, the same bits, and a NaN that is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gradmon
from gradmon.journal import read_journal

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

WARM_UP = 12


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADMON_AGENT", "off")
    monkeypatch.setenv("GRADMON_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def default_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 8)).cuda()


def train(
    attached: bool, steps: int, broken: int | None = None, strict: bool = False
) -> tuple[list[torch.Tensor], str]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    monitor = gradmon.attach(model, optimizer, config={"measure": {"updates_every": 7}}) if attached else None
    generator = torch.Generator("cuda").manual_seed(1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        inputs = torch.randn(32, 64, generator=generator, device="cuda")
        loss = model(inputs).square().mean() * (math.nan if step == broken else 1.0)
        loss.backward()
        if strict and step > WARM_UP:  # constants are on the device, kernels compiled
            torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        if monitor is not None:
            monitor.observe(loss=loss)
        torch.cuda.set_sync_debug_mode("default")
    path = ""
    if monitor is not None:
        monitor.detach()
        path = str(monitor.journal_path)
    return [p.detach().clone() for p in model.parameters()], path


def test_the_same_bits_and_no_synchronisation(directory: Path) -> None:
    plain, _ = train(False, 40)
    attached, path = train(True, 40, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, attached, strict=True))
    view = read_journal(Path(path))
    assert not [key for key, count in view.counters.items() if "errors" in key[0] and count]
    assert [made.reason for _, made in view.steps] == ["healthy"] * 40
    assert all(made.grad_abs_max is not None and made.zero_count is not None for _, made in view.steps)


def test_a_nan_is_skipped_without_synchronisation(directory: Path) -> None:
    parameters, path = train(True, 40, broken=30, strict=True)
    assert all(p.isfinite().all() for p in parameters)
    actions = {made.step: (made.action, made.parameter) for _, made in read_journal(Path(path)).steps}
    assert actions[30] == ("skip", "3.bias")
    assert all(action == "none" for step, (action, _) in actions.items() if step != 30)
