"""What a DataLoader gave, and which of it a forward call was given: found out later, as nothing may be read before."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from gradmon.inputs import Mark, leaves, mark_of, on_host


class Gave(NamedTuple):
    """A batch that a DataLoader gave."""

    asked: Any
    """What the sampler asked for; None where it is not known."""
    mark: Mark | None
    """None where its first tensor is not on the host."""
    batch: Any
    """By reference; None of older ones."""

    @property
    def indices(self) -> list[int] | None:
        """Of its samples, where they are known."""
        return index_numbers(self.asked)

    def holds(self, memory: list[tuple[int, int]]) -> bool:
        """True if a tensor of it lies in this memory."""
        mine = [memory_of(tensor) for _, tensor in leaves(self.batch)]
        return any(begin < end2 and begin2 < end for begin, end in mine for begin2, end2 in memory)

    def resembles(self, tensors: list[Tensor]) -> bool:
        """True if any of its tensors, not only the first, is one of these; what is constant tells nothing."""
        marks = [mark_of(tensor) for _, tensor in leaves(self.batch) if tensor.numel() and on_host(tensor)]
        return any(mark.fits(t) for mark in marks if len(set(mark.values)) > 1 for t in tensors)


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """The newest batches, the newest first: what it takes to find out later which of them a forward call was given."""

    batches: tuple[Gave, ...]
    in_step: bool = False
    """Each batch was used by one forward call before the next came, so that this call's can only be the newest."""

    def batch_of(self, held: Iterable[Tensor], on_host: Iterable[Tensor]) -> Gave | None:
        """The batch that a forward call was given; None where it is none of these.

        Args:
            held: tensors of the call, wherever they lie.
            on_host: the same, copied to the host.
        """
        memory, given = [memory_of(tensor) for _, tensor in leaves(list(held))], list(on_host)
        tests: tuple[Callable[[Gave], bool], ...] = (
            lambda gave: gave.holds(memory),
            lambda gave: gave.mark is not None and any(map(gave.mark.fits, given)),
            lambda gave: gave.resembles(given),
        )
        found = next((gave for is_it in tests for gave in self.batches if is_it(gave)), None)
        return self.batches[0] if found is None and self.in_step and self.batches else found


def memory_of(value: Tensor) -> tuple[int, int]:
    """(First byte, byte after the last) of a tensor that can be read."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    begin = value.data_ptr()
    return begin, begin + (last + 1) * value.element_size() if value.numel() else begin


def index_numbers(asked: Any) -> list[int] | None:
    """What a sampler asked for, as indices; None where it is something else: a sampler may ask for anything."""
    try:
        return [operator.index(i) for i in asked] if isinstance(asked, list | tuple) else [operator.index(asked)]
    except TypeError:
        return None
