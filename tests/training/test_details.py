"""What the journal holds of every parameter, end to end, against plain torch on the gradients of the same steps."""

from __future__ import annotations

import math
import sqlite3
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

import gradmon
from gradmon.journal import JournalView, read_journal
from gradmon.record import DETAIL_COLUMNS, StepRecord

STEPS = 22
CONFIG = {"measure": {"detail_every": 5, "zeros_every": 10, "updates_every": 5}}
DETAIL_STEPS, ZERO_STEPS, UPDATE_STEPS = {1, 5, 10, 15, 20}, {1, 10, 20}, {1, 5, 10, 15, 20}
#: One off every cadence, one on that of details and updates.
BROKEN_STEPS = {13, 15}
#: This parameter has no gradient in any step.
WITHOUT = "3.bias"


@dataclass
class Truth:
    """By plain torch, in float64: a row per parameter, as a `Detail` has them, and the whole model's."""

    rows: list[list[float]] = field(default_factory=list)
    gradient: Tensor = field(default_factory=lambda: torch.zeros(0))
    update_ratio: float = math.nan

    def finite(self) -> Tensor:
        return self.gradient[self.gradient.isfinite()]


def row_of(gradient: Tensor | None) -> list[float]:
    if gradient is None:
        return [math.nan] * 7
    wide = gradient.double().flatten()
    finite = wide[wide.isfinite()]
    numbers = [
        wide.square().sum(),
        wide.isnan().sum(),
        wide.isinf().sum(),
        (wide == 0).sum(),
        finite.abs().max(),
        finite.min(),
        finite.max(),
    ]
    return [float(n) for n in numbers]


def quotient(moved: Tensor, weights: Tensor) -> float:
    return float(moved.norm() / weights.norm())


def train_and_watch() -> tuple[list[Truth], JournalView, Path]:
    model = toy.build()
    optimizer = toy.optimizer_for("fused_adamw", model.parameters())
    generator = torch.Generator().manual_seed(1)
    job = toy.Job(directory="")
    truths = []
    with gradmon.attach(model, optimizer, config=CONFIG) as monitor:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            inputs, targets, _ = toy.batch(job, generator, step)
            inputs[:, :3] = 0  # these columns of the first weight get a gradient of exactly 0
            (model(inputs) - targets).square().mean().backward()
            spoil(model, step)
            gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            before = [p.detach().double() for p in model.parameters()]
            optimizer.step()
            moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
            rows = [[*row_of(g), quotient(m, b)] for g, m, b in zip(gradients, moved, before, strict=True)]
            whole = torch.cat([g.double().flatten() for g in gradients if g is not None])
            flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (moved, before)]
            truths.append(Truth(rows, whole, quotient(*flat)))
    assert monitor.journal_path is not None
    return truths, read_journal(monitor.journal_path), monitor.journal_path


def spoil(model: nn.Module, step: int) -> None:
    model.get_parameter(WITHOUT).grad = None
    if step in BROKEN_STEPS:
        weight, bias = model.get_parameter("3.weight").grad, model.get_parameter("0.bias").grad
        assert weight is not None and bias is not None
        weight[0, 2] = math.nan
        bias[1], bias[4] = math.inf, -math.inf


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADMON_AGENT", "off")
        patch.setenv("GRADMON_DIR", str(tmp_path_factory.mktemp("journals")))
        yield train_and_watch()


Trained = tuple[list[Truth], JournalView, Path]


def records_of(view: JournalView) -> dict[int, StepRecord]:
    return {made.step: made for _, made in view.steps}


def test_steps_are_those_that_were_meant(trained: Trained) -> None:
    truths, view, _ = trained
    records = records_of(view)
    assert list(records) == list(range(1, STEPS + 1))
    assert {step for step, made in records.items() if made.reason == "nonfinite"} == BROKEN_STEPS
    assert all(records[step].applied and records[step].action == "skip" for step in BROKEN_STEPS)
    assert all(records[step].parameter == "3.weight" for step in BROKEN_STEPS)
    for step, made in records.items():
        right = float(truths[step - 1].gradient.norm())
        assert made.grad_norm == pytest.approx(right, rel=1e-5, nan_ok=True)


def test_details_come_at_the_cadence_and_with_every_broken_step(trained: Trained) -> None:
    _, view, path = trained
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        written = connection.execute("SELECT step, place FROM details ORDER BY id").fetchall()
    finally:
        connection.close()
    assert written == [(step, "global") for step in sorted(DETAIL_STEPS | BROKEN_STEPS)]
    assert 13 not in DETAIL_STEPS
    assert [made.step for _, made in view.details] == [step for step, _ in written]


def test_details_are_right(trained: Trained) -> None:
    truths, view, _ = trained
    names = view.parameter_names
    assert sum(truths[0].rows[names.index("0.weight")][3:4]) >= 3 * 32, "there are zeros to be counted"
    for _, made in view.details:
        values = array("d", made.values)
        assert len(values) == len(names) * len(DETAIL_COLUMNS)
        for place, (name, right) in enumerate(zip(names, truths[made.step - 1].rows, strict=True)):
            row = values[place * len(DETAIL_COLUMNS) :][: len(DETAIL_COLUMNS)].tolist()
            if name == WITHOUT:
                assert all(map(math.isnan, row[:7]))
                continue
            expected = list(right)
            if made.step not in ZERO_STEPS | BROKEN_STEPS:
                expected[3] = math.nan
            if made.step not in UPDATE_STEPS or math.isinf(expected[7]):  # of weights that were 0
                expected[7] = math.nan
            assert row[0] == pytest.approx(expected[0], rel=1e-5, nan_ok=True)
            assert row[1:7] == pytest.approx(expected[1:7], rel=0, abs=0, nan_ok=True)
            assert row[7] == pytest.approx(expected[7], rel=1e-9, nan_ok=True)


def test_extremes_of_the_whole_model(trained: Trained) -> None:
    truths, view, _ = trained
    for step, made in records_of(view).items():
        found = (made.grad_abs_max, made.grad_min, made.grad_max)
        if step in DETAIL_STEPS | BROKEN_STEPS:
            finite = truths[step - 1].finite()
            assert found == (float(finite.abs().max()), float(finite.min()), float(finite.max()))
            assert found[1] < 0 < found[2]
        else:
            assert found == (None, None, None)


def test_counts_of_the_whole_model(trained: Trained) -> None:
    truths, view, _ = trained
    for step, made in records_of(view).items():
        gradient = truths[step - 1].gradient
        assert made.element_count == gradient.numel() == sum(view.elements) - 32
        assert (made.nan_count, made.inf_count) == ((1, 2) if step in BROKEN_STEPS else (0, 0))
        assert made.nan_count == int(gradient.isnan().sum())
        right = int((gradient == 0).sum()) if step in ZERO_STEPS | BROKEN_STEPS else None
        assert made.zero_count == right
        assert right is None or right >= 3 * 32


def test_update_ratio_of_the_whole_model(trained: Trained) -> None:
    truths, view, _ = trained
    for step, made in records_of(view).items():
        if step not in UPDATE_STEPS:
            assert made.update_ratio is None
        elif step in BROKEN_STEPS:
            assert made.update_ratio == truths[step - 1].update_ratio == 0, "a skipped step moves nothing"
        else:
            assert made.update_ratio == pytest.approx(truths[step - 1].update_ratio, rel=1e-9)
            assert made.update_ratio > 1e-3
