"""Promise 6: on the fused path the host reads nothing of the step in progress."""

from __future__ import annotations

import collections
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import Ranks
from torch.utils._python_dispatch import TorchDispatchMode

import gradmon
from gradmon import stats


class CountReads(TorchDispatchMode):
    """`.item()`, `bool()`, `float()` and `int()` of a tensor all end in this operation; on CUDA each is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def reads_in_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Reads by gradmon while one step is judged and taken, on the way other devices than the CPU take."""
    monkeypatch.setattr(stats, "reads_are_free", lambda device: False)
    lists: list[int] = []
    to_list = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        if threading.current_thread() is threading.main_thread():  # the journal's thread may wait
            lists.append(1)
        return to_list(tensor)

    model = toy.build()
    optimizer = toy.optimizer_for(kind, model.parameters())
    with gradmon.attach(model, optimizer) as monitor, CountReads() as counting:
        for step in range(12):
            optimizer.zero_grad()
            loss = model(torch.randn(4, toy.FEATURES)).square().mean()
            loss.backward()
            monitor._take_previous()  # the one wait, for the step before: not counted here
            if step == 11:
                counting.reads.clear()
                monkeypatch.setattr(torch.Tensor, "tolist", counted)
            optimizer.step()
            monitor.observe(loss=loss)
            if step == 11:
                monkeypatch.setattr(torch.Tensor, "tolist", to_list)
                total = counting.reads["_local_scalar_dense"] + len(lists)
        monitor._journal.flush()  # type: ignore[union-attr]
    return total


def test_the_counter_counts() -> None:
    with CountReads() as counting:
        float(torch.ones(()))
        bool(torch.ones(()))
    assert counting.reads["_local_scalar_dense"] == 2


def reads_by_torch_alone(kind: str) -> int:
    model = toy.build()
    optimizer = toy.optimizer_for(kind, model.parameters())
    model(torch.randn(4, toy.FEATURES)).square().mean().backward()
    optimizer.step()
    with CountReads() as counting:
        optimizer.step()
    return counting.reads["_local_scalar_dense"]


@pytest.mark.parametrize("kind", ["fused_adamw", "fused_adam"])
def test_fused_optimizers_need_no_read(kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads_in_a_step(kind, monkeypatch) - reads_by_torch_alone(kind) == 0


def test_others_need_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads_in_a_step("sgd", monkeypatch) - reads_by_torch_alone("sgd") == 1


def reads_on_ranks(directory: str, kind: str, attached: bool) -> int:
    """Reads in steps 11 and 12, one of them with full statistics; on the way other devices than the CPU take."""
    import sharded

    free, stats.reads_are_free = stats.reads_are_free, lambda device: False
    task = sharded.Task(directory, kind, 12, "fused_adamw", attach=attached, config={"measure": {"detail_every": 11}})
    counting = CountReads()
    original, seen = sharded.loss_of, 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 11:
            counting.__enter__()
        return original(*args)

    sharded.loss_of = counted
    try:
        sharded.train(task)
    finally:
        counting.__exit__(None, None, None)
        sharded.loss_of, stats.reads_are_free = original, free
    return counting.reads["_local_scalar_dense"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_need_no_read_either(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    """What one step's record is read from is one step old and comes by `tolist`, which is not counted here."""
    without = two_ranks.run(reads_on_ranks, str(tmp_path), kind, False)
    assert two_ranks.run(reads_on_ranks, str(tmp_path), kind, True) == without


def test_every_sync_is_marked() -> None:
    """Places that may wait for the device say so."""
    marked = [
        f"{path.name}"
        for path in sorted(Path(gradmon.__file__).parent.glob("*.py"))
        for line in path.read_text().splitlines()
        if "# sync:" in line
    ]
    in_steps, in_rollbacks = ["actions.py", "landing.py", "measuring.py"], ["guard.py", "guard.py", "snapshot.py"]
    assert sorted(marked) == sorted(in_steps + in_rollbacks)
