"""What a batch holds: its tensors by name, and numbers read from them cheaply. It is looked at and never changed.

Words used here: an *input* is one tensor of a batch, named by its place (`input_ids`, `batch[0]`); a *sample* is a row
of it. Legend: B samples of a batch, E elements looked at of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradmon.stats import flat

WHOLE_BYTES = 4 << 20
#: Elements looked at of what is larger.
PART = 1 << 16
#: Tensors of a batch that are looked at.
MOST_INPUTS = 32
#: Things in a batch that are looked through for tensors.
_MOST_THINGS = 1024
_DEEPEST = 6
#: Samples of fewer elements are alike by chance.
TELLING_ELEMENTS = 8
#: Elements that tell one batch from the others.
_MARK_ELEMENTS = 16
_BITS = frozenset(getattr(torch, name) for name in ("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"))
_LABEL_NAMES = frozenset({"label", "labels", "target", "targets", "class", "classes", "y"})


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One tensor of a batch."""

    name: str
    value: Tensor
    """Of torch's own class; a complex one's halves in a last dimension."""
    samples: int
    """B if its rows are samples, else 0."""
    is_label: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """By which a batch is known again after it was moved to a device or cast."""

    elements: int
    values: tuple[float, ...]

    def fits(self, value: Tensor) -> bool:
        """True if the tensor, on the host, is the batch's first one; within what float16 rounds away."""
        if value.numel() != self.elements or not is_readable(value):
            return False
        return all(
            mine == other or abs(mine - other) <= 1e-2 * max(abs(mine), abs(other)) or (mine != mine and other != other)
            for mine, other in zip(self.values, mark_of(value).values, strict=True)
        )


def mark_of_batch(batch: Any) -> Mark | None:
    """Of its first tensor; None where there is none on the host. In every step, so the usual batches are looked at at
    once.
    """
    parts = batch if isinstance(batch, list | tuple) else (batch,)
    first = next((part for part in parts if isinstance(part, Tensor)), None)
    if first is None:
        first = next((value for _, value in leaves(batch) if value.numel()), None)
    if first is None or not (first.numel() and is_readable(first) and on_host(first)):
        return None
    return mark_of(first)


def mark_of(value: Tensor) -> Mark:
    """Of a tensor on the host: some of its elements, in the order of its dimensions."""
    stride = max(1, value.numel() // _MARK_ELEMENTS) | 1
    if value.is_contiguous():
        seen = value.view(-1)[::stride].tolist()
    else:
        seen = [value[tuple(_place(at, value.shape))].item() for at in range(0, value.numel(), stride)]
    return Mark(value.numel(), tuple(seen[:_MARK_ELEMENTS]))


def _place(at: int, shape: Iterable[int]) -> Iterator[int]:
    """Of element number `at`, by dimension."""
    sizes = list(shape)
    for number in range(len(sizes)):
        rest = math.prod(sizes[number + 1 :])
        yield at // rest
        at %= rest


def is_readable(value: Tensor) -> bool:
    """True for a tensor whose elements lie in memory of its own, one after the other, and can be computed with.

    Not for one of a class that does its own arithmetic (a FakeTensor, a quantised weight, a DTensor), nor for one that
    is being transformed (`torch.func`).
    """
    return (
        type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
        and value.layout == torch.strided
        and value.device.type in ("cpu", "cuda")
        and not (value.is_nested or value.is_quantized or value.dtype in _BITS)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def inputs(batch: Any, rows: int) -> list[Input]:
    """The tensors of a batch, named by their place; bounded.

    Args:
        batch: anything.
        rows: samples it has, where that is known, else 0.
    """
    there = list(itertools.islice((leaf for leaf in leaves(batch) if leaf[1].numel()), MOST_INPUTS))
    rows = rows if rows > 1 else next((v.shape[0] for _, v in there if v.dim()), 0)
    last = there[-1][0] if len(there) > 1 and isinstance(batch, list | tuple) else None
    found = []
    for name, value in there:
        samples = rows if value.dim() and value.shape[0] == rows and rows > 0 else 0
        whole = not value.is_floating_point()
        called = name.rpartition(".")[2].lower() in _LABEL_NAMES
        label = called or (whole and name == last and value.dim() == 1)
        found.append(Input(name or "batch", value, samples, label and whole))
    return found


def leaves(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """(Name, tensor) of what can be read of it."""
    return _leaves(batch, "", 0, itertools.repeat(None, _MOST_THINGS))


def _leaves(thing: Any, name: str, depth: int, room: Iterator[None]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(thing, Tensor):
        if is_readable(thing):
            plain = thing.detach().as_subclass(Tensor)
            yield name, torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
        return
    if depth > _DEEPEST:
        return
    parts: Iterator[tuple[str, Any]]
    if isinstance(thing, Mapping):
        parts = ((f"{name}.{key}" if name else str(key), value) for key, value in thing.items())
    elif isinstance(thing, tuple) and hasattr(thing, "_fields"):
        parts = ((f"{name}.{key}" if name else key, getattr(thing, key)) for key in thing._fields)
    elif isinstance(thing, list | tuple):
        parts = ((f"{name or 'batch'}[{i}]", value) for i, value in zip(range(4 * MOST_INPUTS), thing, strict=False))
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        keys = [field.name for field in dataclasses.fields(thing)]
        parts = ((f"{name}.{key}" if name else key, getattr(thing, key, None)) for key in keys)
    else:
        return
    for _, (path, value) in zip(room, parts, strict=False):
        yield from _leaves(value, path, depth + 1, room)


def on_host(value: Tensor) -> bool:
    """True if reading it waits for nothing."""
    return value.device.type == "cpu"


def looked_at(value: Tensor) -> Tensor:
    """All of its elements in one dimension, or so many spread over it."""
    small = value.numel() * value.element_size() <= WHOLE_BYTES
    return flat(value) if small else spread(value, PART)


def spread(value: Tensor, most: int) -> Tensor:
    """At most about so many elements; the odd stride meets other columns in each row."""
    stride = -(-value.numel() // most)
    return flat(value)[:: stride | 1] if stride > 1 else flat(value)


def counted(values: Tensor) -> dict[int, int]:
    """Value -> how often it is there."""
    different, times = torch.unique(values, return_counts=True)
    return dict(zip(different.tolist(), times.tolist(), strict=True))


def lowest_and_highest(value: Tensor) -> tuple[float, float]:
    """(Lowest, highest) of what is looked at; NaN if an element is."""
    seen = looked_at(value)
    low, high = torch.aminmax(seen if seen.dtype in (torch.float32, torch.float64) else seen.float())
    return float(low), float(high)


def on_device(value: Tensor) -> Tensor:
    """[not finite elements, lowest, highest] of the finite ones, float64, on its device; nothing is waited for."""
    seen = looked_at(value).double()
    finite = seen.isfinite()
    low = seen.masked_fill(~finite, math.inf).amin()
    high = seen.masked_fill(~finite, -math.inf).amax()
    return torch.stack(((~finite).sum().double(), low, high))


def rows_of(part: Input) -> Tensor:
    """All of it as [B, elements of a sample]; for what is to be told only."""
    return part.value.reshape(part.samples, -1)


def fingerprints(parts: list[Input]) -> list[float]:
    """A number for each sample, equal for equal samples; empty where samples are too small to tell them apart."""
    batched = [part for part in parts if part.samples and not part.is_label]
    wide = [part for part in batched if part.value.numel() // part.samples >= TELLING_ELEMENTS]
    if not wide:
        return []
    samples = wide[0].samples
    prints_B = torch.zeros(samples, dtype=torch.float64, device="cpu")
    for number, part in enumerate(wide[:4], start=1):
        value = part.value
        order = sorted(range(1, value.dim()), key=value.stride, reverse=True)
        rows = value.permute(0, *order).reshape(samples, -1)  # in the order of memory it is a view
        stride = max(1, -(-rows.shape[1] // max(64, PART // samples)))
        seen_BE = rows[:, :: stride | 1].double()
        weights_E = torch.arange(1, seen_BE.shape[1] + 1, dtype=torch.float64, device="cpu").mul_(number).sin_()
        prints_B += (seen_BE * weights_E).sum(1)
    return list(prints_B.tolist())
