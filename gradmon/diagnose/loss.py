"""The loss of a replay: the user's function and what it is called with, the model's own, or what stands for it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmon.diagnose.bundle import Forward, inputs_of, rest_of, tensors_in
from gradmon.diagnose.operations import OperationWatch, Seen

#: For the help of `gradmon replay`.
CONVENTION = """\
--loss          needed where the loss is not computed inside forward: `criterion(model(x), y)`. It is called as
                loss(output, *rest), rest being what the DataLoader gave and forward did not get: for batches (x, y) and
                model(x) as loss(output, y). Of a dict the entries that remain come as keyword arguments, and where the
                function does not take those, the whole dict as one argument. Where nothing remains, or no DataLoader
                was used, it is called as loss(output, *args, **kwargs) with what forward got.
                Name a function, a criterion, or its class: `torch.nn:CrossEntropyLoss`, `train:criterion`.
"""


class ReplayError(ValueError):
    """A bundle can't be replayed with what was given; the message says why and what to do about it."""


class Loss(NamedTuple):
    """What the backward of a replay starts from."""

    root: Tensor
    ends: list[tuple[str, Tensor]]
    """Name and tensor of each end of the forward."""
    real: bool
    """False where the sum of the outputs stands for it."""
    operations: int
    """Operations of the forward and of the real loss, without those that stand for one."""


class _Call(NamedTuple):
    """One way to call the user's function."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    told: str


def loss_of(
    watch: OperationWatch,
    output: Any,
    forward: Forward,
    rest: tuple[Any, ...] | dict[str, Any],
    loss_fn: Callable[..., Any] | None,
) -> Loss:
    """The loss of an output, under watch.

    Args:
        watch: over the model that made the output.
        output: what the model returned.
        forward: its batch, on the model's device.
        rest: as `rest_of` gives it of `forward`.
        loss_fn: the user's; None: the model's own loss, else the sum of the outputs.

    Raises:
        ReplayError: the function fails or returns no loss, or there is nothing that could be summed.
    """
    if loss_fn is not None:
        loss = _called(watch, output, forward, rest, loss_fn)
        return Loss(loss, [("the loss", loss)], real=True, operations=len(watch.operations))
    own = output
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        own = output["loss"]
    elif isinstance(getattr(output, "loss", None), Tensor):
        own = output.loss
    made = len(watch.operations)
    if isinstance(own, Tensor) and own.numel() == 1:
        return Loss(own, [("the loss", own)], real=True, operations=made)
    parts = [(name, t) for name, t in _outputs(output) if t.is_floating_point()]
    if not parts:
        raise ReplayError(f"the model returns no tensor of floating point ({told(output)}): give --loss")

    def total() -> Tensor:
        # An Inf that a mask has put into an output is no loss of anybody's.
        return sum((torch.where(t.isfinite(), t, torch.zeros_like(t)).sum() for _, t in parts), torch.zeros(()))

    root: Tensor = watch.call(total)
    ends = [(f"the {name}", t) for name, t in parts]
    return Loss(root, [(name, t) for name, t in ends if not _masked(watch.look(t))], real=False, operations=made)


def _called(
    watch: OperationWatch,
    output: Any,
    forward: Forward,
    rest: tuple[Any, ...] | dict[str, Any],
    loss_fn: Callable[..., Any],
) -> Tensor:
    ways = list(_ways(output, forward, rest, loss_fn))
    way = next((way for way in ways if _takes(loss_fn, way)), ways[0])
    try:
        if isinstance(loss_fn, nn.Module) and isinstance(output, Tensor):
            loss_fn = loss_fn.to(output.device)  # class weights
        loss = watch.call(loss_fn, *way.args, **way.kwargs)
    except Exception as error:  # the user's function: whatever it raises
        raise ReplayError(f"--loss failed with {type(error).__name__}: {error}; it is called as {way.told}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ReplayError(f"--loss must return one number as a tensor (got {told(loss)}); it is called as {way.told}")
    return loss


def _ways(
    output: Any, forward: Forward, rest: tuple[Any, ...] | dict[str, Any], loss_fn: Callable[..., Any]
) -> Iterator[_Call]:
    """The ways to call it, the first choice first. A part without a tensor (a path, a name) is left off if need be."""
    if isinstance(rest, dict) and rest:
        for entries in (rest, {key: part for key, part in rest.items() if _has_tensor(part)}):
            if entries and all(isinstance(key, str) for key in entries):
                listed = ", ".join(f"{key}: {told(part)}" for key, part in entries.items())
                yield _Call((output,), entries, f"loss(output, **rest), with {listed} that only the DataLoader gave")
        if isinstance(loss_fn, nn.Module):  # torch's criteria call it `target`
            targets = tuple(part for part in rest.values() if _has_tensor(part))
            yield _Call((output, *targets), {}, f"loss(output, *rest), with {_listed(targets)}")
        keys = ", ".join(map(repr, forward.loaded))
        yield _Call((output, forward.loaded), {}, f"loss(output, batch), with the DataLoader's batch ({keys})")
    elif rest:
        for parts in (tuple(rest), tuple(part for part in rest if _has_tensor(part))):
            said = f"loss(output, *rest), with {_listed(parts)} that only the DataLoader gave"
            yield _Call((output, *parts), {}, said)
    said = f"loss(output, *args, **kwargs), with {inputs_told(forward)}"
    yield _Call((output, *forward.args), dict(forward.kwargs), said)


def _takes(loss_fn: Callable[..., Any], way: _Call) -> bool:
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # a builtin does not tell
        return True
    try:
        signature.bind(*way.args, **way.kwargs)
    except TypeError:
        return False
    return True


def _has_tensor(part: Any) -> bool:
    return next(tensors_in(part, ""), None) is not None


def _listed(parts: tuple[Any, ...]) -> str:
    return ", ".join(map(told, parts)) or "nothing"


def _masked(seen: Seen) -> bool:
    root = seen.root
    return seen.holds.bad and not seen.holds.nan_count and root is not None and root.meant


def _outputs(output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "output", output
        return
    if isinstance(output, Mapping):
        value: Any = dict(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        value = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    else:
        value = output
    yield from tensors_in(value, "output")


def inputs_told(forward: Forward) -> str:
    """Names, shapes and types of what forward got, for a sentence."""
    return ", ".join(f"{name} {told(value)}" for name, value in inputs_of(forward.args, forward.kwargs)) or "nothing"


def told(value: Any) -> str:
    """Shape and type of a tensor, the class of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def where_the_loss_is(forward: Forward, command: str, notes: list[str]) -> str:
    """What to do where the loss is not in the bundle; one sentence.

    Args:
        forward: the batch.
        command: `gradmon replay ...` as it was given.
        notes: the bundle's.
    """
    samples = _samples_told(forward.indices)
    if forward.loaded is not None:
        left = "the targets are" if rest_of(forward) else "what the DataLoader gave is"
        batch = f" (the batch is {samples})" if samples else ""
        return f"{left} in the bundle{batch}: run `{command} --loss module:function`"
    left_out = any("what the DataLoader gave" in note for note in notes)
    why = "see the notes" if left_out else "no DataLoader gave them"
    return (
        f"the targets are not in the bundle ({why}): compute the loss inside forward, or run"
        f" gradmon.doctor(model, batch, loss_fn) on {samples or 'this batch'}"
    )


#: Indices that a sentence names; the bundle holds all.
_INDICES_TOLD = 64


def _samples_told(indices: Any) -> str:
    if isinstance(indices, Tensor):
        indices = indices.flatten().tolist()
    if not isinstance(indices, (list, tuple)) or not indices:
        return ""
    more = f" and {len(indices) - _INDICES_TOLD} more" if len(indices) > _INDICES_TOLD else ""
    return f"samples [{', '.join(map(str, indices[:_INDICES_TOLD]))}]{more} of the dataset"
