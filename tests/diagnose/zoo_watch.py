"""Trainings that the watches over data, loss and weights must explain: real ones, tiny, each with one thing wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset
from zoo import Broken, Healthy

from gradmon import stats
from gradmon.config import Config, LossConfig, MeasureConfig
from gradmon.data_watch import BatchWatch
from gradmon.loss_watch import LossWatch
from gradmon.record import STATISTICS, Finding
from gradmon.updates import UpdateSample
from gradmon.weight_watch import MomentSample, WeightWatch

FEATURES, CLASSES = 16, 4
Loss = Callable[[nn.Module, Any], Tensor]
SHORT = Config(measure=MeasureConfig(detail_every=5, updates_every=10), loss=LossConfig(flat_steps=160))
"""Cadences for trainings of a hundred steps; thresholds as they are."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Watching:
    """Drives the three watches over one process's training, as the monitor does."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config = SHORT) -> None:
        self.found: list[Finding] = []
        self.loss, self.batches = LossWatch(config.loss), BatchWatch(config.data)
        self._optimizer, self._every = optimizer, config.measure
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(named.values())
        self._weights = WeightWatch(config.weights, list(named), [p.shape for p in self._parameters])
        self._step = 0

    def epochs(self, loader: DataLoader[Any], steps: int) -> Iterator[Any]:
        """So many batches, epoch after epoch."""
        with one_thread(), contextlib.ExitStack() as stack:
            self.batches.start()
            stack.callback(self.batches.stop)
            while True:
                iterator = iter(loader)
                for batch in iterator:
                    self.batches.seen(iterator, batch)
                    self.found += self.batches.take()
                    yield batch
                    steps -= 1
                    if steps == 0:
                        return

    def step(self, loss: Tensor, *, by_rank: Sequence[float] | None = None, validation: float | None = None) -> None:
        """Backward and step."""
        self._step += 1
        self._optimizer.zero_grad()
        loss.backward()
        due = self._step == 1 or self._step % self._every.updates_every == 0
        before = UpdateSample(self._parameters) if due else None
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        table = torch.full((len(self._parameters), len(STATISTICS) + 1), math.nan, dtype=torch.float64)
        places = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        table[places, : len(STATISTICS)] = stats.measure(gradients, extremes=True, zeros=True)
        healthy = all(bool(g.isfinite().all()) for g in gradients)
        if healthy:
            self._optimizer.step()
        moments = None
        if before is not None:
            table[:, -1] = before.ratios()[0]
            moments = MomentSample([self._optimizer], self._parameters).norms().tolist()
        if due or self._step % self._every.detail_every == 0:
            self.found += self._weights.update(self._step, table.flatten().tolist(), moments)
        found = self.loss.update(self._step, float(loss.detach()), by_rank, validation, healthy)
        if found or not healthy:
            self.batches.look_again()
        self.found += found + self.batches.take()

    def said(self) -> str:
        return "\n".join(f"{finding.rule}: {finding.message}" for finding in self.found)


def table(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around four centres, near enough to each other that some can't be told apart: inputs, labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return centres[labels] + 2 * torch.randn(samples, FEATURES, generator=generator), labels


def mlp(*, width: int = 32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def shuffled(dataset: Dataset[Any], batch_size: int = 32, **more: Any) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True, **more)


def trained(
    loader: DataLoader[Any],
    *,
    steps: int = 60,
    model: nn.Module | None = None,
    loss: Loss = classify,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, 1e-3),
    validate: tuple[int, Any] | None = None,
) -> str:
    """What the watches said of a training; `validate` is every how many steps, and on which batch."""
    model = model or mlp()
    watching = Watching(model, optimizer(model.parameters()))
    for number, batch in enumerate(watching.epochs(loader, steps), start=1):
        validation = None
        if validate is not None and number % validate[0] == 0:
            with torch.no_grad():
                validation = float(loss(model, validate[1]))
        watching.step(loss(model, batch), validation=validation)
    return watching.said()


# --- data ------------------------------------------------------------------------------------------------------------


def nan_sample(_: Path) -> str:
    inputs, labels = table(256)
    inputs[37, 5] = math.nan
    return trained(shuffled(TensorDataset(inputs, labels)), steps=8)


def unscaled_sample(_: Path) -> str:
    """One picture still from 0 to 255, in a dataset read by two workers."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(320, FEATURES, generator=generator)
    pictures[201] *= 255
    loader = DataLoader(TensorDataset(pictures, table(320)[1]), batch_size=16, num_workers=2)
    return trained(loader, steps=20 * 6)


def one_label(_: Path) -> str:
    inputs, labels = table(512)
    return trained(shuffled(TensorDataset(inputs, torch.full_like(labels, 3))), steps=300)


def rare_class(_: Path) -> str:
    inputs, labels = table(4096)
    rare = (labels == 2) & (torch.arange(4096) % 40 > 0)
    return trained(shuffled(TensorDataset(inputs, torch.where(rare, 0, labels)), 64), steps=400)


class SameBatch(Sampler[int]):
    """Its generator is made anew for every batch."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(8):
            yield from torch.randperm(256, generator=torch.Generator().manual_seed(1))[:32].tolist()

    def __len__(self) -> int:
        return 256


def repeated_batch(_: Path) -> str:
    return trained(DataLoader(TensorDataset(*table(256)), batch_size=32, sampler=SameBatch()), steps=8)


class OneBuffer(Dataset[Any]):
    """`__getitem__` fills the same buffer for every sample, and returns it without a copy."""

    def __init__(self) -> None:
        self.inputs, self.labels = table(256)
        self.buffer = torch.empty(FEATURES)

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.buffer.copy_(self.inputs[index])
        return self.buffer, self.labels[index]


def shared_buffer(_: Path) -> str:
    return trained(shuffled(OneBuffer()), steps=8)


def padding(_: Path) -> str:
    """Short texts, padded with 0 to 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (256, 128), generator=generator)
    tokens[:, 12:] = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(50, FEATURES, padding_idx=0), nn.Linear(FEATURES, CLASSES))
    return trained(shuffled(TensorDataset(tokens, table(256)[1])), steps=20, model=model)


# --- loss ------------------------------------------------------------------------------------------------------------


def overfit(_: Path) -> str:
    """64 samples with labels drawn by lot, learnt by heart."""
    inputs, labels = table(64)
    held_back = table(256, seed=1)
    lots = torch.randint(CLASSES, labels.shape, generator=torch.Generator().manual_seed(2))
    loader = shuffled(TensorDataset(inputs, lots), 16)
    return trained(loader, steps=200, model=mlp(width=128), validate=(20, held_back))


def rate_too_high(_: Path) -> str:
    """The warm-up ends at 300 times the rate that works."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = Watching(model, optimizer)
    loader = shuffled(TensorDataset(*table(2048)))
    for number, batch in enumerate(watching.epochs(loader, 120), start=1):
        optimizer.param_groups[0]["lr"] = 0.1 if number < 60 else 30.0
        watching.step(classify(model, batch))
    return watching.said()


def dead_network(_: Path) -> str:
    """All weights begin at 0: no gradient gets through, and every class stays as likely."""
    model = nn.Sequential(nn.Linear(FEATURES, 32, bias=False), nn.ReLU(), nn.Linear(32, CLASSES, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return trained(shuffled(TensorDataset(*table(512))), steps=40, model=model)


def leaked_labels(_: Path) -> str:
    """From step 200 on the label stands in the input, as after a change of the collate function."""
    model = mlp()
    watching = Watching(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    loader = shuffled(TensorDataset(*table(4096)))
    for number, (inputs, labels) in enumerate(watching.epochs(loader, 320), start=1):
        if number > 200:
            inputs[:, :CLASSES] = 10.0 * F.one_hot(labels, CLASSES)
        watching.step(classify(model, (inputs, labels)))
    return watching.said()


def masked_labels(_: Path) -> str:
    """The mask leaves no label at all, and the mean over none of them was made 0."""

    def masked(model: nn.Module, batch: Any) -> Tensor:
        mask = torch.zeros(len(batch[1]))
        return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * mask).sum() / mask.sum().clamp(min=1)

    return trained(shuffled(TensorDataset(*table(512))), steps=40, loss=masked)


def bad_rank(_: Path) -> str:
    """Four ranks' shards, their gradients averaged; the labels of rank 2 do not belong to its inputs."""
    model = mlp()
    watching = Watching(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    inputs, labels = table(4096)
    loader = shuffled(TensorDataset(inputs / 2, labels), 128)
    for inputs, labels in watching.epochs(loader, 160):
        shards = list(zip(inputs.chunk(4), labels.chunk(4), strict=True))
        shards[2] = shards[2][0], (shards[2][1] + 1) % CLASSES
        losses = [classify(model, shard) for shard in shards]
        watching.step(torch.stack(losses).mean(), by_rank=[float(loss.detach()) for loss in losses])
    return watching.said()


def nan_loss(_: Path) -> str:
    """log(0) in the loss of one rank of two."""
    model = mlp()
    watching = Watching(model, torch.optim.Adam(model.parameters()))
    for inputs, labels in watching.epochs(shuffled(TensorDataset(*table(256))), 8):
        losses = [classify(model, (half, own)) for half, own in zip(inputs.chunk(2), labels.chunk(2), strict=True)]
        losses[1] = losses[1] + (model(inputs)[0, 0].detach() * 0).log() * 0
        watching.step(torch.stack(losses).mean(), by_rank=[float(loss.detach()) for loss in losses])
    return watching.said()


# --- weights ---------------------------------------------------------------------------------------------------------


def forgotten_layer(_: Path) -> str:
    """The first layer is to be trained, and in no optimizer."""
    model = mlp()
    return trained(
        shuffled(TensorDataset(*table(512))),
        steps=40,
        model=model,
        optimizer=lambda _: torch.optim.Adam(model[2].parameters(), lr=1e-3),
    )


def steps_too_long(_: Path) -> str:
    """Each step replaces a good part of the weights, and AdamW's decay, times the same rate, forgets the rest."""
    return trained(
        shuffled(TensorDataset(*table(512))),
        steps=40,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.3),
    )


def vanishing(_: Path) -> str:
    """Fourteen sigmoids on top of each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [layer for _ in range(14) for layer in (nn.Linear(FEATURES, FEATURES), nn.Sigmoid())]
        model = nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES))
    return trained(shuffled(TensorDataset(*table(512))), steps=40, model=model)


BROKEN: tuple[Broken, ...] = (
    Broken("NaN sample", "one NaN in one sample of the dataset", "watch", ("batch[0]", "index 37"), nan_sample),
    Broken("unscaled sample", "one input 255 times the others", "watch", ("data_range", "index 201"), unscaled_sample),
    Broken("one label", "every label is the same", "watch", ("class_imbalance", "labels", "are 3"), one_label),
    Broken("rare class", "one class 40 times rarer", "watch", ("class_imbalance", "class 2"), rare_class),
    Broken("repeated batch", "a sampler seeded anew", "watch", ("data_duplicate", "same indices"), repeated_batch),
    Broken("shared buffer", "samples that share one buffer", "watch", ("data_duplicate", "like"), shared_buffer),
    Broken("padding", "nine tenths of the tokens are padding", "watch", ("token_share", "token 0"), padding),
    Broken("overfit", "64 random labels learnt by heart", "watch", ("overfit", "overtraining"), overfit),
    Broken("rate too high", "learning rate 300 times too high", "watch", ("loss_spike",), rate_too_high),
    Broken(
        "dead network",
        "a network whose weights are all 0",
        "watch",
        ("loss_constant", "gradients_zero", "0.weight"),
        dead_network,
    ),
    Broken("leaked labels", "the labels stand in the input", "watch", ("loss_low", "at once"), leaked_labels),
    Broken("masked labels", "every label masked", "watch", ("loss_low", "no more than 0"), masked_labels),
    Broken("bad rank", "one rank's labels are wrong", "watch", ("loss_outlier", "rank 2"), bad_rank),
    Broken("NaN loss", "log(0) in one rank's loss", "watch", ("loss_nonfinite", "rank 1"), nan_loss),
    Broken(
        "forgotten layer",
        "a layer that is in no optimizer",
        "watch",
        ("weights_unchanged", "0.weight"),
        forgotten_layer,
    ),
    Broken("steps too long", "AdamW with a learning rate of 1", "watch", ("update_large", "weight"), steps_too_long),
    Broken("vanishing", "14 layers of sigmoids", "watch", ("gradients_tiny", "0.weight"), vanishing),
)


# --- healthy ---------------------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """A batch, sample by sample, in the batch's own nesting."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch if isinstance(self.batch, Tensor) else self.batch[0])

    def __getitem__(self, index: int) -> Any:
        return self.batch[index] if isinstance(self.batch, Tensor) else tuple(part[index] for part in self.batch)


def watch_healthy(healthy: Healthy, steps: int = 60) -> str:
    """What the watches say of a short training of a healthy model: nothing."""
    model, batch, loss = healthy.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = Rows(batch)
        return trained(shuffled(rows, max(4, len(rows) // 3)), steps=steps, model=model, loss=loss)
