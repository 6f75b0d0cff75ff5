"""The step in progress, and what tells it from the next: same gradients or new ones, an outer step or one inside it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradmon.actions import Verdict
from gradmon.detector import Limits

#: For each gradient which tensor it was, and how often that had been written.
Marks = list[tuple["weakref.ref[Tensor]", int]]
_OPTIMIZER_SOURCE = Optimizer.profile_hook_step.__code__.co_filename


@dataclass(slots=True)
class Measured:
    """A step's gradients as the optimizer was to get them, before any clip."""

    sums: Tensor
    """stats_PK summed over P."""
    norm: Tensor
    rows: Tensor
    """One per rank, as in `local.ROW`; this rank's alone where there is no communication hook."""
    synced: bool
    """False if the gradients were not averaged in this step (all backwards under `no_sync`)."""


@dataclass(slots=True)
class StepInProgress:
    """The step in progress."""

    measured: Measured
    verdict: Verdict
    limits: Limits
    judged: bool
    acting: bool
    scale: float
    rate: float | Tensor


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if `optimizer.step` was given a closure, which computes the gradients only inside the step."""
    return (len(args) > 1 and callable(args[1])) or callable(kwargs.get("closure"))


def inside_own_step(optimizer: Optimizer) -> bool:
    """True if torch's wrapper of `step` is on the call stack twice for this optimizer. Asked only in doubt."""
    frame, wrappers = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == _OPTIMIZER_SOURCE and frame.f_code.co_name == "wrapper":
            wrappers += frame.f_locals.get("self") is optimizer
    return wrappers > 1


def marks_of(gradients: list[Tensor]) -> Marks:
    """What tells whether gradients were replaced or written since. Weak, so that memory is freed."""
    return [(weakref.ref(g), g._version) for g in gradients]


def unchanged(marks: Marks, gradients: list[Tensor]) -> bool:
    """True if these are the gradients that were marked, and nobody has written them since."""
    return len(gradients) == len(marks) and all(
        ref() is g and version == g._version for (ref, version), g in zip(marks, gradients, strict=True)
    )


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that are there, in the order of the groups."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
