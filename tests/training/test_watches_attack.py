"""What the watches must stand: copies of the model, odd batches, loaders that run ahead, a rank that saves alone."""

from __future__ import annotations

import copy
import gc
import io
import random
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.data.dataloader as dataloader
from ranks import Ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toy import FEATURES, build

import gradmon
from gradmon.config import DataConfig
from gradmon.data_watch import BatchWatch
from gradmon.diagnose.bundle import load_bundle
from gradmon.inputs import MOST_INPUTS
from gradmon.journal import read_journal
from gradmon.monitor import Monitor

SETTINGS: dict[str, Any] = {"agent": {"start": "off"}}


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[tuple[nn.Module, torch.optim.Optimizer, Monitor]]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer, config=SETTINGS | {"dir": str(tmp_path)}) as monitor:
        yield model, optimizer, monitor


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *inputs: Any) -> None:
    optimizer.zero_grad()
    model(*inputs).square().mean().backward()
    optimizer.step()


def failures(monitor: Monitor) -> dict[Any, float]:
    assert monitor._journal is not None and monitor.journal_path is not None
    monitor._journal.flush()
    return {k: v for k, v in read_journal(monitor.journal_path).counters.items() if k[0] == "gradmon_errors_total"}


# --- copies of the model ----------------------------------------------------------------------------------------------


def test_a_watched_model_can_be_copied_averaged_and_saved_whole(attached: Any) -> None:
    model, optimizer, monitor = attached
    inputs = torch.randn(4, FEATURES)
    step(model, optimizer, inputs)
    averaged = torch.optim.swa_utils.AveragedModel(model)  # a deepcopy
    file = io.BytesIO()
    torch.save(model, file)
    assert b"gradmon" not in file.getvalue(), "it can be loaded where gradmon is not installed"
    file.seek(0)
    kept = len(monitor._watches._capture._now.held)
    for other in (copy.deepcopy(model), averaged, torch.load(file, weights_only=False)):
        assert torch.equal(other(inputs), model(inputs))
        kept += 1  # by the model itself; its copies are not watched
        assert len(monitor._watches._capture._now.held) == kept
    assert not failures(monitor)


# --- odd batches ------------------------------------------------------------------------------------------------------


class Rude:
    """Raises whatever is done with it."""

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError


class OwnArithmetic(Tensor):
    """A tensor that has no memory of its own, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> OwnArithmetic:
        made: OwnArithmetic = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


class TakesAnything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, inputs: Tensor, *_more: Any, **_named: Any) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output


def in_circles() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


ODD: dict[str, Any] = {
    "rude": lambda: [1, Rude()],
    "own arithmetic": lambda: OwnArithmetic(torch.randn(4, 16)),
    "fake": lambda: FakeTensorMode().from_tensor(torch.randn(4, 16)),
    "meta": lambda: torch.randn(4, 16, device="meta"),
    "bits": lambda: torch.zeros(4, 16, dtype=torch.uint8).view(torch.bits8),
    "in circles": in_circles,
}


@pytest.mark.parametrize("kind", [*ODD, "sparse"])
def test_one_odd_part_costs_the_bundle_no_other(kind: str, tmp_path: Path) -> None:
    odd = ODD[kind]() if kind in ODD else torch.eye(4).to_sparse()
    model = TakesAnything()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer, config=SETTINGS | {"dir": str(tmp_path)}) as monitor:
        inputs = torch.randn(4, FEATURES)
        for number in range(4):
            inputs = inputs.clone()
            if number == 2:
                inputs[3, 0] = torch.nan
            optimizer.zero_grad()
            model(inputs, odd, labels=odd).square().mean().backward()
            optimizer.step()
        assert not failures(monitor)
    (path,) = tmp_path.rglob("*.bundle")
    bundle = load_bundle(path)
    assert bundle.forwards[0].args[0][3, 0].isnan(), "the tensor beside it is there"
    assert any("left out" in note for note in bundle.notes) == (kind in ODD), bundle.notes
    if kind == "sparse":
        assert torch.equal(bundle.forwards[0].args[1].to_dense(), torch.eye(4))


def test_a_batch_of_very_many_parts_is_cut(attached: Any) -> None:
    _, _, monitor = attached
    capture = monitor._watches._capture
    many: list[Any] = [[torch.zeros(1)] * 10_000, {str(i): i for i in range(10_000)}]
    looked_at = 0

    class Counted(dict[Any, Any]):
        def items(self) -> Any:
            for item in super().items():
                nonlocal looked_at
                looked_at += 1
                yield item

    capture._take((many, Counted(many[1])), {})
    assert "more than 1024 parts" in capture._now.held[-1].notes[0]
    monitor._watches._batches.observe(Counted(many[1]))
    assert 0 < looked_at < 5000


def test_names_that_are_new_in_each_batch_are_not_remembered_for_ever() -> None:
    watch = BatchWatch(DataConfig(every=1))
    for number in range(100):
        watch.observe({f"sample {number * MOST_INPUTS + i}": torch.randn(4, 16) for i in range(MOST_INPUTS)})
    (source,) = watch._sources.values()
    assert 0 < len(source.ranges) <= 64


# --- what is held -----------------------------------------------------------------------------------------------------


def test_the_graph_behind_an_input_is_let_go(attached: Any) -> None:
    """As in a GAN: what the watched model is given was made by another one."""
    model, optimizer, _ = attached
    maker = nn.Linear(FEATURES, FEATURES)

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, kept: Any) -> Tensor:
            ctx.kept = kept
            return value * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0] * 2, None

    class Marker:
        pass

    gone = []
    for _ in range(4):
        marker = Marker()
        gone.append(weakref.ref(marker))
        made = Kept.apply(maker(torch.randn(4, FEATURES)), marker)
        step(model, optimizer, made)
        del made, marker
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_a_forward_that_was_interrupted_does_not_end_the_capture(attached: Any) -> None:
    model, optimizer, monitor = attached

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, FEATURES))
    handle.remove()
    for _ in range(2):
        step(model, optimizer, torch.randn(4, FEATURES))
    assert monitor._watches._capture._previous[1].held


def test_what_another_thread_loads_is_not_piled_up(attached: Any) -> None:
    _, _, monitor = attached
    batches = 0
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(400, 1)), batch_size=2)

    def load() -> None:
        nonlocal batches
        for _ in loader:
            batches += 1
            held.append(max(map(len, monitor._watches._batches._sent.values())))

    held: list[int] = []
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert batches == 200
    assert 0 < max(held) <= 3


def test_of_workers_no_more_is_noted_than_they_have_been_sent() -> None:
    watch = BatchWatch(DataConfig())
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(400, 1)), batch_size=2)
    iterator: Any = iter(loader)
    iterator._num_workers, iterator._prefetch_factor = 3, 2
    for number in range(50):
        iterator._send_idx = number
        watch._note(iterator, [number])
    assert list(watch._sent[iterator]) == list(range(43, 50)), "six on their way and the one that has come"


def test_an_iterator_that_can_not_be_noted_goes_on(attached: Any) -> None:
    class Odd(dataloader._SingleProcessDataLoaderIter):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=2)
    assert len(list(Odd(loader))) == 4


# --- which samples ----------------------------------------------------------------------------------------------------


class OneBad(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        sample = torch.full((FEATURES,), index / 64)
        sample[0] = torch.nan if index == 37 else 1
        return sample


def ahead(loader: Iterable[Any]) -> Iterator[Any]:
    """As Accelerate and Lightning do: one batch is fetched before the one before it is given out."""
    iterator = iter(loader)
    newest = next(iterator)
    for following in iterator:
        yield newest
        newest = following
    yield newest


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("changed", ["as it is", "moved", "half", "transformed"])
def test_a_loader_that_runs_ahead_puts_no_blame_on_the_next_batch(
    changed: str, workers: int, attached: Any, tmp_path: Path
) -> None:
    model, optimizer, monitor = attached
    for batch in ahead(DataLoader(OneBad(), batch_size=4, num_workers=workers)):
        batch = {"as it is": batch, "moved": batch.clone(), "half": batch.half().float(), "transformed": 1 - batch}[
            changed
        ]
        step(model, optimizer, batch)
    monitor.detach()
    (path,) = tmp_path.rglob("*.bundle")
    bundle = load_bundle(path)
    (forward,) = bundle.forwards
    assert forward.args[0][1, 0].isnan()
    if changed == "transformed":
        assert forward.indices is None
        assert any("indices are not known, and what the DataLoader gave is left out" in note for note in bundle.notes)
    else:
        assert forward.indices == [36, 37, 38, 39]


# --- the module random ------------------------------------------------------------------------------------------------


class Drops(nn.Module):
    def __init__(self, *, draws: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)
        self.draws = draws

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output * random.random() if self.draws else output


@pytest.mark.parametrize("draws", [True, False])
def test_the_state_of_random_is_taken_where_the_model_draws_from_it(
    draws: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Drops(draws=draws)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer, config=SETTINGS | {"dir": str(tmp_path)}) as monitor:
        for _ in range(20):
            step(model, optimizer, torch.randn(4, FEATURES))
        calls = 0
        state = random.getstate

        def counted() -> Any:
            nonlocal calls
            calls += 1
            return state()

        monkeypatch.setattr(random, "getstate", counted)
        before = state()
        model(torch.randn(4, FEATURES)).sum().backward()
        assert calls == int(draws)
        if draws:
            assert monitor._watches._capture._now.held[-1].rng["python"] == before


# --- optimizers -------------------------------------------------------------------------------------------------------


class LowBitAdam(torch.optim.SGD):
    """Its moments do their own arithmetic, as those of 8-bit optimizers do."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"] = OwnArithmetic(parameter.detach())


def test_moments_that_can_not_be_measured_leave_the_update_ratios(tmp_path: Path) -> None:
    model = build()
    optimizer = LowBitAdam(model.parameters(), lr=1e-2)
    config = SETTINGS | {"dir": str(tmp_path), "measure": {"updates_every": 1, "detail_every": 1}}
    with gradmon.attach(model, optimizer, config=config) as monitor:
        for _ in range(4):
            step(model, optimizer, torch.randn(4, FEATURES))
    view = read_journal(monitor.journal_path)
    assert [record.update_ratio for _, record in view.steps if record.update_ratio]


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def ask_when_to_stop(directory: str) -> list[tuple[bool, bool]]:
    """(As asked after a step, as the guard would tell at once) by step; only rank 0 saves a checkpoint."""
    torch.manual_seed(0)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    asked = []
    with gradmon.attach(model, optimizer, config=SETTINGS | {"dir": directory}) as monitor:
        for _ in range(14):
            monitor.observe(validation_loss=1.0)
            step(model, optimizer, torch.randn(4, FEATURES))
            if dist.get_rank() == 0:
                monitor.state_dict()
            asked.append((monitor.should_stop, bool(monitor._guard._loss_watch.why_stop)))
    return asked


def test_a_rank_that_saves_alone_does_not_stop_alone(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(ask_when_to_stop, str(tmp_path))
    assert [known for _, known in first] != [known for _, known in second], "rank 0 knows earlier"
    assert [asked for asked, _ in first] == [asked for asked, _ in second]
    assert first[-1][0]
