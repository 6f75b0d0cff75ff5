"""What the watches tell while a real training runs, through monitor, journal and metrics."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.data.dataloader as dataloader
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from toy import FEATURES, build

import gradmon
from gradmon.diagnose.bundle import load_bundle
from gradmon.journal import JournalView, read_journal

FINDINGS = ("gradmon_data_findings_total", ())
#: Looks at every parameter in every step, and at each batch.
EAGER = {"measure": {"detail_every": 1, "updates_every": 1}, "data": {"every": 1}}


def data(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(samples, FEATURES, generator=generator), torch.arange(samples) % 4)


def train(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    loader: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 1,
    **config: Any,
) -> JournalView:
    monkeypatch.setenv("GRADMON_DIR", str(directory))
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradmon.attach(model, optimizer, config=EAGER | config) as monitor:
        for _ in range(epochs):
            for inputs, _labels in loader:
                optimizer.zero_grad()
                loss = model(inputs).square().mean()
                loss.backward()
                optimizer.step()
                monitor.observe(loss=loss)
    assert monitor.journal_path is not None
    view = read_journal(monitor.journal_path)
    assert not [key for key in view.counters if key[0] == "gradmon_errors_total"]
    return view


def kinds(view: JournalView) -> set[str]:
    return {event.kind for _, event in view.events}


def test_a_healthy_run_hears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    view = train(
        tmp_path,
        monkeypatch,
        model,
        DataLoader(data(), batch_size=8, shuffle=True),
        epochs=4,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        data={"every": 1, "imbalance_samples": 100},
    )
    assert len(view.steps) == 32
    assert kinds(view) == set()
    assert view.counters[FINDINGS] == 0
    assert view.samples["first_moment_norm"] > 0
    assert view.samples["second_moment_norm"] > 0
    assert view.samples["class_imbalance_ratio"] >= 1


def test_a_bad_sample_is_named_by_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = data()
    samples.tensors[0][37, 3] = math.nan
    view = train(tmp_path, monkeypatch, build(), DataLoader(samples, batch_size=8, shuffle=True))
    told = [event for _, event in view.events if event.kind == "data_nonfinite"]
    assert len(told) == 1
    assert "dataset index 37" in told[0].message
    assert told[0].rank == 0
    assert view.counters[FINDINGS] == 1


def test_between_two_looks_an_incident_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred batches only the first eight and every thousandth are looked at; the bad one is the 60th."""
    samples = data(800)
    samples.tensors[0][8 * 59 + 2, 0] = math.inf
    view = train(tmp_path, monkeypatch, build(), DataLoader(samples, batch_size=8), data={"every": 1000})
    broken = [record.step for _, record in view.steps if record.broken]
    assert broken == [60]
    told = [event for _, event in view.events if event.kind == "data_nonfinite"]
    assert [event.step for event in told] == [60]
    assert f"dataset index {8 * 59 + 2}" in told[0].message


def test_weights_that_stay_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    parameters = dict(model.named_parameters())
    frozen = parameters.pop(names[0])
    optimizer = torch.optim.SGD([{"params": parameters.values()}, {"params": [frozen], "lr": 0.0}], lr=1e-2)
    view = train(tmp_path, monkeypatch, model, DataLoader(data(), batch_size=8), optimizer=optimizer)
    told = [event for _, event in view.events if event.kind == "weights_unchanged"]
    assert [event.parameter for event in told] == [names[0]]
    assert told[0].step == 3
    assert view.counters["gradmon_events_total", ("weights_unchanged",)] == 1


def test_a_script_without_a_loader_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(torch.randn(8, FEATURES), None) for _ in range(20)]
    batches[15] = (batches[15][0] * 1e6, None)
    view = train(tmp_path, monkeypatch, build(), batches)
    told = [event for _, event in view.events if event.kind == "data_range"]
    assert [event.step for event in told] == [16]
    assert "input 0" in told[0].message


def test_detach_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataloader._BaseDataLoaderIter
    before = kind.__next__, kind._next_index
    model = build()
    view = train(tmp_path, monkeypatch, model, DataLoader(data(), batch_size=8))
    assert view.steps
    assert (kind.__next__, kind._next_index) == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_everything_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = data()
    samples.tensors[0][37, 3] = math.nan
    view = train(
        tmp_path,
        monkeypatch,
        build(),
        DataLoader(samples, batch_size=8),
        data={"every": 0},
        loss={"nonfinite": False},
        incident={"bundles": 0},
        weights={"moments": False},
    )
    assert [r.step for _, r in view.steps if r.broken] == [5]
    assert kinds(view) == {"nonfinite"}
    assert not list(tmp_path.rglob("*.bundle"))
    assert "first_moment_norm" not in view.samples


def test_a_scaler_that_skips_for_ever_leaves_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMON_DIR", str(tmp_path))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    monitor = gradmon.attach(model, optimizer)

    def run() -> None:
        for step in range(1, 30):
            inputs = torch.full((4, FEATURES), math.nan if step > 5 else 1.0)
            optimizer.zero_grad()
            scaler.scale(model(inputs).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

    with pytest.raises(gradmon.TrainingStopped):
        run()
    monitor.detach()
    (bundle,) = tmp_path.rglob("*.bundle")
    assert load_bundle(bundle).step == 15, "ten skips in a row"
    assert load_bundle(bundle).forwards[0].args[0].isnan().all()


def _validates_on_rank_0(directory: str) -> list[bool]:
    os.environ |= {"GRADMON_DIR": directory, "GRADMON_RUN": "validated", "GRADMON_AGENT": "off"}
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    with gradmon.attach(model, optimizer, config={"loss": {"overtraining_patience": 3}}) as monitor:
        for step in range(1, 31):
            loss: Tensor = model(torch.randn(2, FEATURES)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 3 == 0 and dist.get_rank() == 0:
                monitor.observe(validation_loss=1.0 + 0.1 * step)
            seen.append(monitor.should_stop)
    return seen


def test_all_ranks_are_told_to_stop_at_the_same_step(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(_validates_on_rank_0, str(tmp_path))
    assert first == second
    assert first.index(True) == 13, "the best is of step 3; the third without a better one of step 12"
    (view,) = [read_journal(path) for path in tmp_path.rglob("rank-00000.db")]
    assert view.samples["early_stop"] == 1
    assert [event.kind for _, event in view.events if event.kind == "overtraining"] == ["overtraining"]


def _observes(directory: str, when: str) -> int:
    """Step of the event about the one loss that is NaN, of step 5."""
    os.environ |= {"GRADMON_DIR": directory, "GRADMON_RUN": when.replace(" ", "-"), "GRADMON_AGENT": "off"}
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 11):
            loss: Tensor = model(torch.ones(2, FEATURES)).square().mean()
            told = loss * math.nan if step == 5 and dist.get_rank() == 1 else loss
            optimizer.zero_grad()
            if when == "before backward":
                monitor.observe(loss=told)
            loss.backward()
            if when == "after backward":
                monitor.observe(loss=told)
            optimizer.step()
            if when == "after step":
                monitor.observe(loss=told)
    (event,) = [e for _, e in look(monitor).events if e.kind == "loss_nonfinite"]
    assert event.rank == 1
    return event.step


def look(monitor: gradmon.Monitor) -> JournalView:
    assert monitor.journal_path is not None
    return read_journal(monitor.journal_path)


@pytest.mark.parametrize("when", ["before backward", "after backward", "after step"])
def test_a_loss_is_told_at_its_own_step(two_ranks: Ranks, tmp_path: Path, when: str) -> None:
    assert two_ranks.run(_observes, str(tmp_path), when) == [5, 5]


def test_two_forwards_of_one_backward_are_one_micro_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a siamese or contrastive training calls its model: the bundle holds both, of the backward that broke."""
    monkeypatch.setenv("GRADMON_DIR", str(tmp_path))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer):
        for step in range(1, 5):
            optimizer.zero_grad()
            for micro in (1, 2, 3):
                left, right = torch.full((2, FEATURES), float(micro)), torch.full((2, FEATURES), 10.0 + micro)
                if (step, micro) == (3, 2):
                    right[0, 0] = math.nan
                (model(left) - model(right)).square().mean().backward()
            optimizer.step()
    (bundle,) = tmp_path.rglob("*.bundle")
    read = load_bundle(bundle)
    assert (read.record.step, read.record.micro_step) == (3, 2)
    assert [float(f.args[0][1, 0]) for f in read.forwards] == [2.0, 12.0]
