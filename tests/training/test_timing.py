"""Where a rank's time goes: waiting for data, busy on its own, paused. And the validation loss."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.data.dataloader as dataloader
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from toy import FEATURES, build

import gradmon
from gradmon.journal import JournalView, read_journal
from gradmon.timing import Stamp, StepClock

BUSY, WAIT = ("gradmon_busy_seconds_total", ()), ("gradmon_data_wait_seconds_total", ())


class Slow(Dataset):
    """Every sample takes 10 ms to load."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.01)
        return torch.full((FEATURES,), float(index))


def attached(directory: Path) -> tuple[nn.Module, torch.optim.Optimizer, gradmon.Monitor]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return model, optimizer, gradmon.attach(model, optimizer)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor | None = None) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.ones(2, FEATURES) if inputs is None else inputs).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def look(monitor: gradmon.Monitor) -> JournalView:
    assert monitor.journal_path is not None
    return read_journal(monitor.journal_path)


def until(condition: Any, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def slow_rank(directory: str) -> tuple[float, float, float]:
    import os

    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer) as monitor:
        for _ in range(11):
            if dist.get_rank() == 1:
                time.sleep(0.05)
            step(model, optimizer)
    view = look(monitor)
    durations = [record.step_seconds for _, record in view.steps[1:]]
    first = view.steps[0][1]
    assert first.busy_seconds is None, "there is no end of a step before the first"
    return view.counters[BUSY], sum(durations), max(record.busy_seconds for _, record in view.steps[1:])


def test_the_rank_that_holds_the_others_up_is_the_busy_one(two_ranks: Ranks, tmp_path: Path) -> None:
    (quick, quick_steps, _), (slow, slow_steps, longest) = two_ranks.run(slow_rank, str(tmp_path))
    assert slow >= 10 * 0.05
    assert quick < slow / 2, "it waits for the other, which is not its own work"
    assert quick_steps >= 10 * 0.05, "its steps take as long as the other's"
    assert longest <= slow_steps


def test_without_ddp_nobody_is_busy_for_others(directory: Path) -> None:
    model, optimizer, monitor = attached(directory)
    with monitor:
        step(model, optimizer)
    assert BUSY not in look(monitor).counters
    assert WAIT not in look(monitor).counters, "no DataLoader was used"


def test_waiting_for_a_data_loader_counts(directory: Path) -> None:
    own = dataloader._BaseDataLoaderIter.__next__
    model, optimizer, monitor = attached(directory)
    with monitor:
        assert dataloader._BaseDataLoaderIter.__next__ is not own
        for batch in DataLoader(Slow(), batch_size=2):
            step(model, optimizer, batch)
        with monitor.paused():
            list(DataLoader(Slow(), batch_size=2))
        prefetching = threading.Thread(target=lambda: list(DataLoader(Slow(), batch_size=2)))
        prefetching.start()
        prefetching.join()
        step(model, optimizer)
    assert dataloader._BaseDataLoaderIter.__next__ is own
    view = look(monitor)
    waits = [record.data_wait_seconds for _, record in view.steps]
    assert len(waits) == 7
    assert all(wait >= 0.02 for wait in waits[:6])
    assert waits[6] < 0.01, "neither what was loaded in the pause nor what another thread waited for"
    assert view.counters[WAIT] == pytest.approx(sum(waits))


def test_the_data_loader_gives_what_it_gives_without_gradmon(directory: Path) -> None:
    expected = list(DataLoader(Slow(), batch_size=5))
    _, _, monitor = attached(directory)
    with monitor:
        iterator = iter(DataLoader(Slow(), batch_size=5))
        given = list(iterator)
        with pytest.raises(StopIteration):
            next(iterator)
    assert len(given) == 3
    assert all(map(torch.equal, given, expected))


def test_a_pause_is_no_time_of_a_step(directory: Path) -> None:
    model, optimizer, monitor = attached(directory)
    with monitor:
        step(model, optimizer)
        with monitor.paused("checkpoint"):
            until(lambda: look(monitor).samples.get("paused") == 1.0)
            assert look(monitor).paused_for == "checkpoint"
            with monitor.paused("something in it"):
                time.sleep(1.0)
        until(lambda: look(monitor).samples["paused"] == 0.0)
        assert look(monitor).paused_for == ""
        step(model, optimizer)
        with pytest.raises(RuntimeError), monitor.paused():
            raise RuntimeError
        until(lambda: look(monitor).samples["paused"] == 0.0)
    second = look(monitor).steps[1][1]
    assert second.step_seconds is not None
    assert 0 <= second.step_seconds < 0.9
    with monitor.paused():
        pass  # after detach it does nothing


def test_the_clock_leaves_pauses_out_of_what_a_rank_was_busy() -> None:
    clock = StepClock(torch.device("cpu"))
    assert clock.end_step(None) == (None, None)
    told: list[dict[str, Any]] = []
    with clock.pausing("x", lambda **state: told.append(state)):
        assert clock.paused
        time.sleep(0.2)
    time.sleep(0.05)
    duration, busy = clock.end_step(Stamp(torch.device("cpu")))
    assert busy is not None
    assert duration is not None
    assert 0.05 <= busy.seconds() < 0.2
    assert 0.05 <= duration < 0.2
    assert told == [{"paused": 1.0, "paused_for": "x"}, {"paused": 0.0, "paused_for": ""}]


class FakeEvent:
    """A CUDA event that knows when it was recorded; there is no GPU here."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        assert stream == "stream"
        self.at = FakeEvent.now

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1000 * (later.at - self.at)


def test_on_a_gpu_the_device_is_asked_because_the_host_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    clock = StepClock(torch.device("cuda"))
    clock.end_step(None)
    FakeEvent.now = 2.5
    _, busy = clock.end_step(Stamp(torch.device("cuda")))
    assert busy is not None
    assert busy.seconds() == 2.5


def test_the_validation_loss_is_kept_at_its_last_finite_value(directory: Path) -> None:
    model, optimizer, monitor = attached(directory)
    with monitor:
        monitor.observe(loss=step(model, optimizer))
        assert "validation_loss" not in look(monitor).samples
        monitor.observe(validation_loss=torch.tensor(1.5))
        until(lambda: look(monitor).samples.get("validation_loss") == 1.5)
        monitor.observe(loss=step(model, optimizer), validation_loss=float("nan"))
        monitor.observe(loss=step(model, optimizer), validation_loss=0.75)
        with pytest.raises(ValueError, match=r"one element \(got shape \(2,\)\)"):
            monitor.observe(validation_loss=torch.ones(2))
    view = look(monitor)
    assert view.samples["validation_loss"] == 0.75
    assert [record.loss is not None for _, record in view.steps] == [True] * 3


def test_a_validation_loss_that_is_not_finite_leaves_a_trace(directory: Path) -> None:
    model, optimizer, monitor = attached(directory)
    with monitor:
        monitor.observe(loss=step(model, optimizer), validation_loss=1.5)
        monitor.observe(validation_loss=torch.tensor(float("inf")))
    view = look(monitor)
    assert view.samples["validation_loss"] == 1.5
    assert view.counters["gradmon_nonfinite_losses_total", ()] == 1


class NeverLanding:
    def landed(self) -> bool:
        return False

    def values(self) -> torch.Tensor:
        raise AssertionError("nobody may wait for it")


def test_a_device_that_hangs_stops_no_heartbeat(directory: Path) -> None:
    model, optimizer, monitor = attached(directory)
    with monitor:
        assert monitor._journal is not None
        monitor._journal.keep_copy("validation_loss", NeverLanding())
        step(model, optimizer)
        with monitor.paused("waiting"):
            until(lambda: look(monitor).paused_for == "waiting")
    assert "validation_loss" not in look(monitor).samples


def test_a_copy_that_fails_is_no_failure_of_training(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, monitor = attached(directory)

    def fail(_: object) -> None:
        raise MemoryError("no pinned memory")

    with monitor:
        monitor.observe(loss=step(model, optimizer))
        monkeypatch.setattr("gradmon.monitor.HostCopy", fail)
        monitor.observe(validation_loss=1.0)
        monkeypatch.undo()
    assert look(monitor).counters["gradmon_errors_total", ("loss",)] == 1


def test_a_loader_inside_a_loader_is_waited_for_once(directory: Path) -> None:
    class Outer(Slow):
        def __getitem__(self, index: int) -> torch.Tensor:
            return next(iter(DataLoader(Slow(), batch_size=2)))[0]

    model, optimizer, monitor = attached(directory)
    with monitor:
        began = time.perf_counter()
        list(DataLoader(Outer(), batch_size=4))
        took = time.perf_counter() - began
        step(model, optimizer)
    waited = look(monitor).counters[WAIT]
    assert 12 * 0.02 <= waited <= took


def test_stamps_of_two_devices_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    clock = StepClock(torch.device("cuda", 0))
    clock.end_step(None)
    assert clock.end_step(Stamp(torch.device("cuda", 1)))[1] is None
    assert clock.end_step(Stamp(torch.device("cuda", 0)))[1] is not None
