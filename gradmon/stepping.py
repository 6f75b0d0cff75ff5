"""The step in progress, and what tells it from the next: same gradients or new ones, an outer step or one inside it."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmon.actions import Verdict
from gradmon.detector import Limits
from gradmon.measuring import Measured
from gradmon.updates import UpdateSample

#: For each gradient which tensor it was, how often it (and a DTensor's own part) may have been written by now.
Marks = list[tuple["weakref.ref[Tensor]", range, int]]
_OPTIMIZER_SOURCE = Optimizer.profile_hook_step.__code__.co_filename


@dataclass(slots=True)
class StepInProgress:
    """The step in progress."""

    number: int
    """From 1."""
    measured: Measured
    verdict: Verdict
    limits: Limits
    judged: bool
    acting: bool
    scale: float
    rate: float | Tensor
    loss_scale: Tensor | None
    """A GradScaler's, if one is stepping the optimizer."""
    left_out: bool
    """True if a GradScaler has decided not to call the optimizer's step."""
    detail_due: bool
    """True if full statistics are to be written down whatever happens."""
    updates: UpdateSample | None = None
    rolled_back: bool = False
    """True if the weights were replaced just before it, so that its gradients are of others."""


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if `optimizer.step` was given a closure, which computes the gradients only inside the step."""
    return (len(args) > 1 and callable(args[1])) or callable(kwargs.get("closure"))


def hooks_on(
    optimizers: Iterable[Optimizer], before: Callable[..., Any], after: Callable[..., Any], saving: Callable[..., Any]
) -> list[Any]:
    """Have them called around each step, and before a state is taken; what removes the hooks again."""
    handles: list[Any] = []
    for optimizer in optimizers:
        # A hook traced into a compiled step would be silently ignored.
        for register, hook in (
            (optimizer.register_step_pre_hook, before),
            (optimizer.register_step_post_hook, after),
            (optimizer.register_state_dict_pre_hook, saving),
        ):
            handles.append(register(torch.compiler.disable(hook)))  # type: ignore[no-untyped-call]
    return handles


class Nesting:
    """Tells an optimizer's own step from a base class's that it calls: torch's hooks fire for both."""

    def __init__(self) -> None:
        self._depth: Counter[Optimizer] = Counter()

    def depth(self, optimizer: Optimizer) -> int:
        """Steps of it that have begun and not ended."""
        return self._depth[optimizer]

    def enters(self, optimizer: Optimizer) -> bool:
        """To be called before every step; True for one inside another."""
        if self._depth[optimizer] > 0 and not _inside_own_step(optimizer):
            self._depth[optimizer] = 0  # the step before raised, and never came to its post hook
        self._depth[optimizer] += 1
        return self._depth[optimizer] > 1

    def leaves(self, optimizer: Optimizer) -> bool:
        """To be called after every step; True for one inside another."""
        self._depth[optimizer] -= 1
        return self._depth[optimizer] > 0


def _inside_own_step(optimizer: Optimizer) -> bool:
    """True if torch's wrapper of `step` is on the call stack twice for this optimizer. Asked only in doubt."""
    frame, wrappers = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == _OPTIMIZER_SOURCE and frame.f_code.co_name == "wrapper":
            wrappers += frame.f_locals.get("self") is optimizer
    return wrappers > 1


def marks_of(gradients: list[Tensor]) -> Marks:
    """What tells whether gradients were replaced or written since. Weak, so that memory is freed."""
    return [(weakref.ref(g), range(g._version, g._version + 1), _part_version(g)) for g in gradients]


def marks_after(gradients: list[Tensor], written: list[Tensor], writes: int) -> Marks:
    """What the marks will be when a clip has written up to `writes` times to `written`, and nobody else to any.

    The foreach operations of a DTensor do not count up its version; only a backward that adds to its own part does.
    """
    touched = {id(g) for g in written}
    marks = marks_of(gradients)
    for i, gradient in enumerate(gradients):
        if id(gradient) in touched:
            reference, versions, part = marks[i]
            least = 0 if hasattr(gradient, "_local_tensor") else 1
            marks[i] = (reference, range(versions.start + least, versions.start + writes + 1), part)
    return marks


def _part_version(gradient: Tensor) -> int:
    part: Tensor | None = getattr(gradient, "_local_tensor", None)
    return 0 if part is None else part._version


def with_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], wrap: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `optimizer.step`, its closure replaced by `wrap(closure)`."""
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": wrap(kwargs["closure"])}


def unchanged(marks: Marks, gradients: list[Tensor]) -> bool:
    """True if these are the gradients that were marked, and nobody has written them since."""
    return len(gradients) == len(marks) and all(
        reference() is g and g._version in versions and _part_version(g) == part
        for (reference, versions, part), g in zip(marks, gradients, strict=True)
    )


def same_tensors(marks: Marks, gradients: list[Tensor]) -> bool:
    """True if these are the tensors that were marked, whatever has been written to them since."""
    return len(gradients) == len(marks) and all(m[0]() is g for m, g in zip(marks, gradients, strict=True))


def is_due(every: int, step: int) -> bool:
    """True for the first step and every so-many-th; never for 0."""
    return every > 0 and (step == 1 or step % every == 0)
