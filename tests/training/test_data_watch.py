"""What is seen in the batches of real DataLoaders, and what looking at them must not do."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import weakref
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.data.dataloader as dataloader
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gradmon import data_watch
from gradmon.config import Config, DataConfig
from gradmon.data_watch import RULES, BatchWatch, index_numbers
from gradmon.inputs import WHOLE_BYTES
from gradmon.landing import HostCopy
from gradmon.record import Finding

ALWAYS = DataConfig(every=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def watch() -> Iterator[BatchWatch]:
    watch = BatchWatch(ALWAYS)
    watch.start()
    yield watch
    watch.stop()


def seen(watch: BatchWatch, loader: DataLoader[Any], epochs: int = 1) -> Iterator[Any]:
    for _ in range(epochs):
        iterator = iter(loader)
        for batch in iterator:
            watch.seen(iterator, batch)
            yield batch


def asked_for(watch: BatchWatch) -> list[int] | None:
    """Indices of the newest batch."""
    loaded = watch.loaded().batches
    return index_numbers(loaded[0][0]) if loaded else None


def told(watch: BatchWatch, *batches: Any) -> list[Finding]:
    for batch in batches:
        watch.observe(batch)
    return watch.take()


def rows(count: int = 64, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


class Numbers(Dataset[Any]):
    """Sample i holds i, and is made by whatever process."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((8,), float(index))


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_indices_are_those_of_the_batch(watch: BatchWatch, workers: int, persistent: bool) -> None:
    """With shuffling, prefetching, an epoch that is broken off and another that follows."""
    loader = DataLoader(
        Numbers(),
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator().manual_seed(0),
    )
    orders = []
    for epoch in range(3):
        iterator, order = iter(loader), []
        for number, batch in enumerate(iterator):
            watch.seen(iterator, batch)
            assert asked_for(watch) == batch[:, 0].int().tolist()
            order += batch[:, 0].int().tolist()
            if epoch == 1 and number == 3:
                break
        orders.append(order)
    assert sorted(orders[0]) == list(range(40)) != orders[0], "shuffled"
    assert orders[2] != orders[0]


def test_indices_of_a_custom_batch_sampler_and_of_single_samples(watch: BatchWatch) -> None:
    for batch in seen(watch, DataLoader(Numbers(), batch_sampler=[[3, 1], [2], [7, 7, 7]])):
        assert asked_for(watch) == batch[:, 0].int().tolist()
    for sample in seen(watch, DataLoader(Numbers(), batch_size=None)):
        assert asked_for(watch) == [int(sample[0])]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from rows(8)


class Keyed(Dataset[Any]):
    def __getitem__(self, key: str) -> Tensor:
        return torch.ones(8) * len(key)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(Keyed(), batch_sampler=[["a", "bc"], ["d"]]),
        lambda: DataLoader(Numbers(), batch_size=4, num_workers=2, **OUT_OF_ORDER),
    ],
    ids=["stream", "keys", "out of order"],
)
def test_indices_that_can_not_be_known(watch: BatchWatch, loader: Callable[[], DataLoader[Any]]) -> None:
    batches = [asked_for(watch) for _ in seen(watch, loader())]
    assert batches
    assert set(map(type, batches)) == {type(None)}


OUT_OF_ORDER = {"in_order": False}


class Breaks(Numbers):
    def __getitem__(self, index: int) -> Tensor:
        if index == 9:
            raise OSError("no such file")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_failed_does_not_shift_the_indices(watch: BatchWatch, workers: int) -> None:
    iterator, good, failed = iter(DataLoader(Breaks(), batch_size=4, num_workers=workers)), 0, 0
    while True:
        try:
            batch = next(iterator)
        except OSError:
            failed += 1
            continue
        except StopIteration:
            break
        watch.seen(iterator, batch)
        assert asked_for(watch) == batch[:, 0].int().tolist()
        good += 1
    assert (good, failed) == (9, 1)


# --- rules -----------------------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", ["image", "text"])


@dataclasses.dataclass
class Record:
    image: Tensor
    more: dict[str, Any]


@pytest.mark.parametrize(
    ("nest", "name"),
    [
        (lambda x: x, "batch"),
        (lambda x: (rows(4), x), "batch[1]"),
        (lambda x: [rows(4), [x]], "batch[1][0]"),
        (lambda x: {"pixel_values": x, "note": ["a", "b"]}, "pixel_values"),
        (lambda x: UserDict(pixel_values=x), "pixel_values"),
        (lambda x: {"vision": {"pixels": x}}, "vision.pixels"),
        (lambda x: Pair(rows(4), x), "text"),
        (lambda x: Record(rows(4), {"deep": (x, 3)}), "more.deep[0]"),
    ],
)
def test_nan_names_input_and_sample(nest: Callable[[Tensor], Any], name: str) -> None:
    bad = rows(4)
    bad[2, 7] = math.nan
    watch = BatchWatch(ALWAYS)
    assert told(watch, nest(rows(4, seed=1))) == []
    (finding,) = told(watch, nest(bad))
    assert (finding.rule, finding.where, finding.severity) == ("data_nonfinite", name, "error")
    assert f"{name}: sample 2 of the batch" in finding.message
    again = torch.where(bad.isnan(), bad, rows(4, seed=2))
    assert told(watch, nest(again)) == [], "told once while it lasts"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_float_type(dtype: torch.dtype, value: float) -> None:
    bad = rows().to(dtype)
    assert told(BatchWatch(ALWAYS), bad.clone()) == []
    bad[3, 3] = value
    assert [f.rule for f in told(BatchWatch(ALWAYS), bad)] == ["data_nonfinite"]


def test_several_samples_and_the_indices_of_the_dataset(watch: BatchWatch) -> None:
    inputs = rows(40)
    inputs[[5, 7, 30]] = math.inf
    list(seen(watch, DataLoader(TensorDataset(inputs), batch_size=20)))
    (finding,) = watch.take()
    assert "samples 5, 7 of the batch (dataset indices 5, 7)" in finding.message


def test_large_inputs_are_looked_at_in_part() -> None:
    large = torch.randn(4, WHOLE_BYTES // 8, generator=torch.Generator().manual_seed(0))
    assert large.numel() * 4 > WHOLE_BYTES
    large[2] = math.nan
    (finding,) = told(BatchWatch(ALWAYS), large)
    assert "sample 2 " in finding.message


def test_range_is_learnt_and_relearnt() -> None:
    watch = BatchWatch(ALWAYS)
    assert told(watch, *(rows(seed=n) for n in range(20))) == []
    odd = rows(seed=99)
    odd[9, 2] = 300.0
    assert odd.max() > 10 * (rows().max() - rows().min())
    (finding,) = told(watch, odd)
    assert (finding.rule, finding.where, finding.measured) == ("data_range", "batch", 300.0)
    assert "sample 9 of the batch" in finding.message
    shifted = [rows(seed=n) + 1000 for n in range(100, 180)]
    assert {f.rule for f in told(watch, *shifted)} <= {"data_range"}
    assert told(watch, *(rows(seed=n) + 1000 for n in range(200, 230))) == [], "the new normal"
    (low,) = told(watch, rows(seed=300) - 1000)
    assert low.rule == "data_range"


def test_heavy_tails_are_no_matter() -> None:
    watch = BatchWatch(ALWAYS)
    generator = torch.Generator().manual_seed(0)
    prices = [torch.randn(64, 8, generator=generator).mul_(1.2).exp_() for _ in range(200)]
    assert told(watch, *prices) == []


def test_constant_inputs_and_what_is_constant_by_nature() -> None:
    (finding,) = told(BatchWatch(ALWAYS), {"pixel_values": torch.full((2, 3, 8, 8), -1.0)})
    assert (finding.rule, finding.where) == ("data_constant", "pixel_values")
    usual = {
        "x": rows(4),
        "attention_mask": torch.ones(4, 16, dtype=torch.int64),
        "token_type_ids": torch.zeros(4, 16, dtype=torch.int64),
        "float_mask": torch.ones(4, 1, 4, 4),
        "sample_weight": torch.ones(4),
        "flags": torch.ones(4, 16, dtype=torch.bool),
        "present": torch.ones(4, 16),
        "scale": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "complex": torch.ones(4, 16, dtype=torch.complex64),
        "sparse": torch.eye(4).to_sparse(),
    }
    assert told(BatchWatch(ALWAYS), usual) == []


def test_duplicates_within_a_batch_and_between_two() -> None:
    watch = BatchWatch(ALWAYS)
    one, two = rows(8, seed=1), rows(8, seed=2)
    assert told(watch, one, two, one) == [], "not one after the other"
    assert told(watch, one.clone()) == [], "the same batch, used again: by a closure, a critic"
    (again,) = told(watch, torch.cat([one[1:], two[:1]]))
    assert again.rule == "data_duplicate"
    assert again.measured == 7 / 8
    (given,) = [
        f
        for _ in seen(watch, DataLoader(TensorDataset(one[[*range(8), *range(8)]]), batch_size=8))
        for f in watch.take()
    ]
    assert given.measured == 1.0, "what a DataLoader gives is another batch each time"
    (inside,) = told(BatchWatch(ALWAYS), one[[0, 1, 1, 1, 1, 1, 1, 3]])
    assert inside.measured == 5 / 8
    assert "like another sample" in inside.message
    half = torch.cat([one[:4], two[4:]])
    assert told(BatchWatch(ALWAYS), one, half) == [], "no more than half"


def test_the_one_batch_of_an_epoch_may_come_in_the_next(watch: BatchWatch) -> None:
    for workers in ({}, {"num_workers": 1, "persistent_workers": True}):
        loader = DataLoader(TensorDataset(rows(8)), batch_size=8, **workers)
        assert len(list(seen(watch, loader, epochs=4))) == 4
    assert watch.take() == []


def test_classes() -> None:
    def labels(common: int, rare: int) -> tuple[Tensor, Tensor]:
        return rows(common + rare), torch.tensor([0] * common + [1] * rare)

    config = DataConfig(every=1, duplicate_share=0)
    assert told(BatchWatch(config), *[labels(62, 2)] * 7) == [], "448 are not enough"
    (finding,) = told(BatchWatch(config), *[labels(62, 2)] * 20)
    assert (finding.rule, finding.where) == ("class_imbalance", "batch[1]")
    assert told(BatchWatch(config), *[labels(57, 7)] * 100) == [], "8 to 1"
    generator = torch.Generator().manual_seed(0)
    many = [(rows(64), torch.randint(200, (64,), generator=generator)) for _ in range(10)]
    assert told(BatchWatch(config), *many) == [], "of 200 classes some came once by chance"
    ignored = [{"x": rows(64), "labels": torch.where(torch.arange(64) < 60, -100, torch.arange(64) % 2)}] * 20
    assert told(BatchWatch(config), *ignored) == []
    numbers = [(rows(64), torch.randint(10**6, (64,), generator=generator)) for _ in range(40)]
    assert told(BatchWatch(config), *numbers) == [], "no classes"


def test_tokens() -> None:
    tokens = torch.randint(1, 1000, (8, 100), generator=torch.Generator().manual_seed(0))
    padded = tokens.clone()
    padded[:, 10:] = 0
    config = DataConfig(every=1, duplicate_share=0)
    assert told(BatchWatch(config), *[{"input_ids": tokens}] * 10) == []
    (finding,) = told(BatchWatch(config), *[{"input_ids": padded}] * 10)
    assert (finding.rule, finding.where) == ("token_share", "input_ids")
    assert "token 0 makes 90%" in finding.message
    half = tokens.clone()
    half[:, 50:] = 0
    assert told(BatchWatch(config), *[{"input_ids": half}] * 10) == []


def test_labels_below_0() -> None:
    (finding,) = told(BatchWatch(ALWAYS), (rows(4), torch.tensor([0, 1, -7, 2])))
    assert finding.rule == "labels_out_of_range"
    assert "label -7" in finding.message
    assert "sample 2 " in finding.message
    assert told(BatchWatch(ALWAYS), (rows(4), torch.tensor([0, 1, -100, -1]))) == []


def test_every_rule_can_be_switched_off() -> None:
    wrong = [
        {
            "bad": torch.full((64, 16), math.nan if n == 15 else 1.5),
            "far": torch.cat([rows(63), torch.full((1, 16), 1e6 if n == 12 else 0.0)]),
            "same": torch.full((64, 3, 4), 3.0),
            "input_ids": torch.zeros(64, 16, dtype=torch.int64) + 7,
            "labels": torch.where(torch.arange(64) < 1, -7, 0),
        }
        for n in range(20)
    ]
    assert {f.rule for f in told(BatchWatch(ALWAYS), *wrong)} == set(RULES), "all is wrong with them"
    off = DataConfig(
        every=1,
        nonfinite=False,
        range_ratio=0,
        constant=False,
        duplicate_share=0,
        imbalance_ratio=0,
        token_share=0,
        label_range=False,
    )
    assert told(BatchWatch(off), *wrong) == []
    assert told(BatchWatch(DataConfig(every=0)), *wrong) == []
    Config(data=off)  # in range


# --- when it looks ---------------------------------------------------------------------------------------------------


def test_looks_at_a_cadence_and_again_after_an_incident() -> None:
    watch = BatchWatch(DataConfig(every=10))
    bad = rows()
    bad[1, 1] = math.nan
    batches = {n: rows(seed=n) for n in range(1, 40)}
    assert told(watch, *(batches[n] for n in range(1, 9))) == []
    assert told(watch, bad.clone()) == [], "batch 9 is looked at by nobody"
    watch.look_again()
    assert [f.rule for f in watch.take()] == ["data_nonfinite"]
    watch.look_again()
    assert watch.take() == [], "once"
    for number, due in ((10, True), (11, True), (12, False), (20, True)):
        fresh = BatchWatch(DataConfig(every=10))
        told(fresh, *(batches[n] for n in range(1, number)))
        assert bool(told(fresh, bad.clone())) == due


def test_sources_are_told_apart(watch: BatchWatch) -> None:
    """Validation data may be of another range, and may be what training data was."""
    training = DataLoader(TensorDataset(rows(160)), batch_size=16)
    validation = DataLoader(TensorDataset(1000 * rows(160)), batch_size=16)
    for _ in range(3):
        list(seen(watch, training))
        list(seen(watch, validation))
    assert watch.take() == []
    highest = [max(high for _, high in known) for s in watch._sources.values() for known in s.ranges.values()]
    assert max(highest) > 1000 > 100 * min(highest), "both were looked at"


# --- what it must not do ---------------------------------------------------------------------------------------------


def test_changes_neither_batches_nor_random_state() -> None:
    batches = [(rows(seed=n), torch.randint(4, (64,)), torch.randint(9, (64, 8))) for n in range(12)]
    copies = [[part.clone() for part in batch] for batch in batches]
    state, versions = torch.get_rng_state(), [part._version for batch in batches for part in batch]
    told(BatchWatch(ALWAYS), *batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part._version for batch in batches for part in batch] == versions
    assert all(
        torch.equal(a, b) for one, two in zip(batches, copies, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_keeps_no_more_than_the_newest_pair(watch: BatchWatch) -> None:
    alive = []
    for batch in seen(watch, DataLoader(TensorDataset(rows(80)), batch_size=8)):
        alive.append(weakref.ref(batch[0]))
    del batch
    gc.collect()
    assert [ref() is not None for ref in alive] == [False] * 8 + [True] * 2
    watch.stop()
    gc.collect()
    assert not any(ref() for ref in alive)


def test_puts_torch_back_and_passes_through_under_another_patch() -> None:
    kind = dataloader._BaseDataLoaderIter
    before = kind._next_index
    watch = BatchWatch(ALWAYS)
    watch.start()
    assert kind._next_index is not before
    watch.stop()
    assert kind._next_index is before
    watch.start()
    ours = kind._next_index
    try:
        kind._next_index = lambda iterator: ours(iterator)  # type: ignore[method-assign]
        watch.stop()
        assert len(list(seen(watch, DataLoader(Numbers(), batch_size=4)))) == 10
        assert asked_for(watch) is None
    finally:
        kind._next_index = before  # type: ignore[method-assign]


class Nested(Numbers):
    """A worker that uses a DataLoader itself."""

    def __init__(self, watch: BatchWatch) -> None:
        super().__init__(8)
        self.watch = watch

    def __getitem__(self, index: int) -> Tensor:
        for _ in seen(self.watch, DataLoader(Numbers(8), batch_size=8)):
            pass
        noted = asked_for(self.watch) is not None or bool(self.watch.take())
        return torch.full((8,), float(noted) + 2 * (os.getpid() != self.watch._pid) + index * 10)


def test_forked_workers_do_not_run_it(watch: BatchWatch) -> None:
    loader = DataLoader(Nested(watch), batch_size=4, num_workers=1, multiprocessing_context="fork")
    flags = torch.cat(list(loader))[:, 0] % 10
    assert flags.tolist() == [2.0] * 8, "in another process, and nothing noted"


class Made(TorchDispatchMode):
    """Counts the bytes of what is made, other than views of `batch`."""

    def __init__(self, batch: Tensor) -> None:
        super().__init__()
        self.bytes, self._batch = 0, batch.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple) else (made,):
            if isinstance(part, Tensor) and part.untyped_storage().data_ptr() != self._batch:
                self.bytes += part.numel() * part.element_size()
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_look_makes_is_bounded(dtype: torch.dtype) -> None:
    """However large a batch is."""
    made = []
    for size in (128, 256):
        batch = torch.zeros(64, 3, size, size, dtype=dtype)
        with Made(batch) as counted:
            BatchWatch(DataConfig(every=1, constant=False)).observe(batch)
        made.append(counted.bytes)
    assert made[1] < 1.1 * made[0] < 8 * WHOLE_BYTES


def test_subclasses_and_gradients() -> None:
    class Image(Tensor):
        pass

    bad = rows()
    bad[0, 0] = math.nan
    wanted = bad.clone().requires_grad_(True)
    assert [f.where for f in told(BatchWatch(ALWAYS), (bad.as_subclass(Image), wanted))] == ["batch[0]", "batch[1]"]


def test_odd_batches_do_no_harm() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for batch in (None, 3, "text", [], {}, endless, [torch.tensor(1.0)] * 1000, torch.empty(0), {1: torch.ones(2)}):
        assert told(BatchWatch(ALWAYS), batch) == []


class Travelling(HostCopy):
    """A copy that has not landed before it is told so."""

    here = False

    def landed(self) -> bool:
        return self.here


def test_inputs_on_a_device_are_read_when_they_have_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device computes, computed here; CUDA itself is for tests/gpu."""
    monkeypatch.setattr(data_watch, "HostCopy", Travelling)
    monkeypatch.setattr(data_watch, "on_host", lambda value: False)
    monkeypatch.setattr(Travelling, "here", False)
    watch = BatchWatch(ALWAYS)
    far, bad = rows(seed=98), rows(seed=99)
    far[0, 0] = 300.0
    bad[:, 5] = math.inf
    with NoReads():
        assert told(watch, *(rows(seed=n) for n in range(10)), far, bad) == []
    Travelling.here = True
    found = watch.take()
    assert [(f.rule, f.where) for f in found] == [("data_range", "batch"), ("data_nonfinite", "batch")]
    assert "64 elements" in found[1].message
    assert told(watch, torch.full((4, 4), math.nan))[0:] == [], "lasts"


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a read would wait for the device"
        return func(*args, **(kwargs or {}))
