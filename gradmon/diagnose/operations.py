"""A watch over every operation of a forward and a backward: what it made, how large, and out of what.

Each tensor is traced to the operation that wrote it, so that a NaN in the loss or in a gradient leads back to where it
began: an Inf on the way that nobody used (a mask's) is not blamed.

Glossary:

- *bad*: holding a NaN or an Inf.
- *meant*: an Inf that the code put there, as masks do (`masked_fill(mask, -inf)`); of itself no mistake.
- *origin*: what wrote a tensor: an operation, or what was given (the batch, a parameter, a buffer).
- *root*: the origin where a bad value began.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradmon

#: Frames of these are not the user's code.
_NOT_THE_USERS = tuple(str(Path(str(m.__file__)).parent) + os.sep for m in (torch, gradmon)) + (
    str(contextlib.__file__),
    str(functools.__file__),
)
#: How people write what torch calls otherwise, once a leading `_` and `native_` are off.
_AS_WRITTEN = {
    "convolution": "conv",
    "linalg_vector_norm": "norm",
    "to_copy": "to",
    "scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "scaled_dot_product_fused_attention_math": "scaled_dot_product_attention",
    "unsafe_view": "view",
    "nll_loss2d": "nll_loss",
}
#: Rows of longer tensors are not named: nobody reads that many.
_MOST_ROWS = 1 << 20
#: These hand out memory as it is: what it holds means nothing.
_UNWRITTEN = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize"})
#: These do not read what they write over.
_OVERWRITES = frozenset(
    {"copy", "fill", "zero", "uniform", "normal", "bernoulli", "random", "exponential", "geometric", "cauchy"}
    | {"log_normal", "set"}
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a tensor holds, as far as it is asked here."""

    magnitude: float = 0.0
    """Largest finite absolute value."""
    nan_count: int = 0
    positive_inf_count: int = 0
    negative_inf_count: int = 0
    rows: tuple[int, ...] = ()
    """Places in dimension 0 that are not finite."""
    of_rows: int = 0
    """Size of that dimension, where some are finite."""

    @property
    def inf_count(self) -> int:
        """Infinite elements of either sign."""
        return self.positive_inf_count + self.negative_inf_count

    @property
    def bad(self) -> bool:
        """True if any element is not finite."""
        return self.nan_count + self.inf_count > 0

    def told(self) -> str:
        """`NaN`, `Inf`, `NaN and Inf`; empty if all is finite."""
        names = (("NaN", self.nan_count), ("Inf", self.positive_inf_count), ("-Inf", self.negative_inf_count))
        return " and ".join(name for name, count in names if count)


def contents(value: Tensor) -> Contents | None:
    """Read a tensor; waits for the device. None for integers, and for layouts that can't be read."""
    try:
        x = value.detach()
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        if not x.is_floating_point():
            return None
        if x.layout != torch.strided:
            x = x.coalesce().values() if x.layout == torch.sparse_coo else x.values()
        if x.numel() == 0:
            return Contents()
        if x.element_size() == 1:  # float8 has no arithmetic of its own
            x = x.float()
        low, high = (float(v) for v in torch.aminmax(x))
        if math.isfinite(low) and math.isfinite(high):
            return Contents(max(abs(low), abs(high)))
        finite = torch.isfinite(x)
        broken = (~finite).flatten(1).any(1) if x.dim() > 1 else ~finite
        rows: list[int] = broken.nonzero().flatten().tolist() if 0 < broken.numel() <= _MOST_ROWS and x.dim() else []
        return Contents(
            float(torch.where(finite, x, torch.zeros_like(x)).abs().max()),
            int(torch.isnan(x).sum()),
            int(torch.isposinf(x).sum()),
            int(torch.isneginf(x).sum()),
            tuple(rows),
            x.shape[0] if rows else 0,
        )
    except RuntimeError:  # also NotImplementedError: a tensor without numbers, or without these operations
        return None


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor that was there before the first operation."""

    kind: str
    """`input`, `parameter`, `buffer` or `constant`."""
    name: str
    holds: Contents
    told: str = ""
    """What is wrong with it, as a person is told: `sample 3 of input 0 holds NaN`."""

    @property
    def meant(self) -> bool:
        """True if it is bad by -Inf alone, as a mask is."""
        only_masks = not self.holds.nan_count and not self.holds.positive_inf_count
        return self.holds.bad and only_masks and self.kind != "parameter"


@dataclass(slots=True, eq=False)
class Operation:
    """One call of a torch operation."""

    index: int
    """In order of time, from 0."""
    name: str
    """As people write it: `log`, `sqrt backward`."""
    kernel: str
    """What torch ran: `aten.div.Tensor`."""
    module: str
    """Path of the module it is part of; of a backward, that of its forward. Empty outside of any."""
    line: str
    """`file:line` of the user's code, of a backward that of its forward; empty where torch's own module called it."""
    text: str
    """The source there."""
    backward: bool
    holds: Contents
    """Of its output; of all of them in backward, of the first in forward."""
    largest_input: float
    """Largest finite absolute value among its inputs, numbers too; NaN without any."""
    sequence: int
    """Number of the node in the autograd graph; -1 where it has none."""
    grew_from: Origin | None = field(default=None, repr=False)
    """What wrote its largest input."""
    fed_by: Origin | None = field(default=None, repr=False)
    """What wrote the bad input it was given, the root of it; None if all were finite."""
    root: Origin | None = field(default=None, repr=False)
    """Where what is bad in its output began; None if all is finite."""
    nan_maker: Operation | None = field(default=None, repr=False)
    """Which made a NaN out of the root's Inf; None where there is no NaN."""
    meant: bool = False
    """True if it writes an Inf because it was told to."""
    given_nan: bool = False
    """True if one of the numbers it was called with is NaN."""
    elements: int = 0
    """Of its outputs."""
    masks: tuple[Operation, ...] = field(default=(), repr=False)
    """All that wrote an Inf into its inputs, or into itself, because they were told to; the first one's first."""

    @property
    def growth(self) -> float:
        """Output over largest input; NaN where one of them is 0 or there is none."""
        known = self.largest_input > 0 and self.holds.magnitude > 0
        return self.holds.magnitude / self.largest_input if known else math.nan

    def place(self) -> str:
        """Module and line, for a person."""
        module = f"module {self.module}" if self.module else ""
        line = f"{self.line}: {self.text}" if self.text else self.line
        return ", ".join(filter(None, (module, line)))


Origin = Operation | Given


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor as it was written."""

    origin: Origin | None
    holds: Contents
    elements: int = 0

    @property
    def root(self) -> Origin | None:
        """Where what is bad in it began."""
        return self.origin.root if isinstance(self.origin, Operation) else self.origin

    @property
    def nan_maker(self) -> Operation | None:
        """Which operation made its NaN out of an Inf."""
        return self.origin.nan_maker if isinstance(self.origin, Operation) else None


class OperationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what every operation made inside of `with watch:`, in forward and in backward.

    Reads each tensor back: to be used on one step, never on a run.

    Args:
        model: whose modules are named.
        given: what is there before the first operation, and the tensor that holds it.
    """

    def __init__(self, model: nn.Module, given: list[tuple[Given, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.arrived: list[tuple[str, Seen]] = []
        """Name and contents of each parameter's gradient, in the order in which backward finished them."""
        self._model = model
        self._modules: list[str] = []
        self._handles: list[Any] = []
        self._of_node: dict[int, Operation] = {}
        #: Storage -> offset -> what was written there.
        self._written: dict[int, dict[int, Seen]] = {}
        for origin, tensor in given:
            self._write(tensor, Seen(origin, origin.holds, tensor.numel()), fresh=False)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it under watch. What lies above this in the stack is not the user's training."""
        with self:
            return function(*args, **kwargs)

    def __enter__(self) -> Any:
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(functools.partial(self._enter_module, name)),
                module.register_forward_hook(self._leave_module, always_call=True),
            ]
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter.is_leaf:
                hook = functools.partial(self._arrive, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._modules.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def look(self, value: Tensor) -> Seen:
        """What is known of a tensor."""
        here = self._written.get(_storage(value), {})
        seen = here.get(int(value.storage_offset())) if here else None
        if seen is not None and seen.elements == value.numel():
            return seen
        holds = contents(value) or Contents()
        if seen is None and here:  # a view into what was written as one
            seen = next(reversed(here.values()))
        if seen is not None:
            return Seen(seen.origin, holds, value.numel())
        return Seen(Given("constant", "a constant", holds) if holds.bad else None, holds, value.numel())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch calls this for every operation."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        plain = name.strip("_")
        given = list(_tensors((args, kwargs)))
        if func.is_view:
            return self._view(func, args, kwargs, given)
        overwritten = given[0] if given and name.endswith("_") and plain in _OVERWRITES else None
        inputs = [self.look(t) for t in given if t is not overwritten]
        made = func(*args, **kwargs)
        outputs = list(_tensors(made))
        if plain in _UNWRITTEN:
            for output in outputs:
                self._written.pop(_storage(output), None)
        elif outputs:
            storages = {_storage(t) for t in given}
            self._note(func, plain, inputs, list(_numbers((args, kwargs))), outputs, storages)
        return made

    def _view(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        seen = self.look(given[0]) if given else None
        made = func(*args, **kwargs)
        for output in _tensors(made):
            if seen is not None and output.is_floating_point():
                whole = output.numel() == seen.elements
                holds = seen.holds if whole else contents(output) or Contents()
                self._write(output, Seen(seen.origin, holds, output.numel()), fresh=False)
        return made

    def _note(
        self,
        func: Any,
        plain: str,
        inputs: list[Seen],
        numbers: list[float],
        outputs: list[Tensor],
        storages: set[int],
    ) -> None:
        measured = [(t, c) for t in outputs if (c := contents(t)) is not None]
        if not measured:
            return
        operation = self._operation(func, plain)
        shown = measured if operation.backward else measured[:1]
        operation.holds = _together([c for _, c in shown])
        largest = max(inputs, key=lambda seen: seen.holds.magnitude, default=None)
        sizes = [abs(n) for n in numbers if math.isfinite(n)] if inputs and not operation.backward else []
        if largest is not None:
            sizes.append(largest.holds.magnitude)
            operation.grew_from = largest.origin
        operation.largest_input = max(sizes, default=math.nan)
        _explain(operation, _together([c for _, c in measured]), inputs, numbers)
        operation.elements = sum(tensor.numel() for tensor, _ in measured)
        self.operations.append(operation)
        for tensor, holds in measured:
            fresh = func._schema.is_mutable or _storage(tensor) not in storages
            self._write(tensor, Seen(operation, holds, tensor.numel()), fresh=fresh)

    def _operation(self, func: Any, plain: str) -> Operation:
        in_backward = torch._C._current_graph_task_id() != -1
        line, text = _users_line()
        name = _as_written(plain)
        module = self._modules[-1] if self._modules else ""
        sequence = torch._C._autograd._get_sequence_nr() - 1
        if in_backward and not self._modules:  # else a checkpointed forward that runs again
            node = torch._C._current_autograd_node()
            name, sequence = "sum of gradients", -1
            if node is not None:
                name, sequence = _node_name(node.name()), node._sequence_nr()
            forward = self._of_node.get(sequence)
            if forward is not None:
                module = forward.module
                line, text = (line, text) if line else (forward.line, forward.text)
        operation = Operation(
            index=len(self.operations),
            name=name,
            kernel=str(func),
            module=module,
            line=line,
            text=text,
            backward=in_backward and not self._modules,
            holds=Contents(),
            largest_input=math.nan,
            sequence=sequence,
        )
        if not in_backward:
            self._of_node.setdefault(sequence, operation)
        return operation

    def _write(self, tensor: Tensor, seen: Seen, *, fresh: bool) -> None:
        storage = _storage(tensor)
        if not storage:
            return
        here = self._written.setdefault(storage, {})
        if fresh:
            here.clear()
        offset = int(tensor.storage_offset())
        here.pop(offset, None)  # so that the newest is the last
        here[offset] = seen

    def _enter_module(self, name: str, _module: nn.Module, _args: Any) -> None:
        self._modules.append(name)

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._modules:
            self._modules.pop()

    def _arrive(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.arrived.append((name, self.look(parameter.grad)))


def _explain(operation: Operation, holds: Contents, inputs: list[Seen], numbers: list[float]) -> None:
    """Where what is bad in its output came from."""
    if not holds.bad:
        return
    bad = [seen for seen in inputs if seen.holds.bad]
    told_to = any(math.isinf(n) for n in numbers)
    operation.given_nan = any(math.isnan(n) for n in numbers)
    masks = [mask for seen in bad if isinstance(seen.origin, Operation) for mask in seen.origin.masks]
    operation.masks = tuple(dict.fromkeys([*masks, *([operation] if told_to else [])]))
    # A NaN tells more than an Inf, a mistake more than a mask, the first more than what came of it.
    first = min(bad, key=lambda seen: (_meant(seen.root), not seen.holds.nan_count, _time(seen.root)), default=None)
    makes_nan = holds.nan_count > 0 and not any(seen.holds.nan_count for seen in bad)
    if first is None:
        operation.root = operation
        operation.meant = told_to
    elif makes_nan and _meant(first.root):
        operation.root, operation.fed_by = operation, first.root
    else:
        operation.root, operation.fed_by = first.root, first.root
    if makes_nan:
        operation.nan_maker = operation
    elif first is not None:
        operation.nan_maker = first.nan_maker


def _meant(origin: Origin | None) -> bool:
    return origin is not None and origin.meant


def _time(origin: Origin | None) -> int:
    return origin.index if isinstance(origin, Operation) else -1


def _together(parts: list[Contents]) -> Contents:
    if len(parts) == 1:
        return parts[0]
    return Contents(
        max((c.magnitude for c in parts), default=0.0),
        sum(c.nan_count for c in parts),
        sum(c.positive_inf_count for c in parts),
        sum(c.negative_inf_count for c in parts),
    )


def _storage(value: Tensor) -> int:
    try:
        return value.untyped_storage().data_ptr()
    except RuntimeError:  # also NotImplementedError: sparse tensors have none
        return 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))


@functools.lru_cache(maxsize=4096)
def is_users(file: str) -> bool:
    """True for a source file that is neither torch's nor gradmon's."""
    return not file.startswith((*_NOT_THE_USERS, "<"))


def _users_line() -> tuple[str, str]:
    """(`file:line`, its text) of the innermost frame of the user's code below `OperationWatch.call`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not OperationWatch.call.__code__:
        name = frame.f_code.co_filename
        if is_users(name):
            return f"{name}:{frame.f_lineno}", linecache.getline(name, frame.f_lineno).strip()
        frame = frame.f_back  # type: ignore[assignment]
    return "", ""


def _as_written(plain: str) -> str:
    plain = plain.removeprefix("native_").removeprefix("cudnn_").removesuffix("_forward")
    return _AS_WRITTEN.get(plain, plain)


def _node_name(node: str) -> str:
    """`SqrtBackward0` -> `sqrt backward`; a function of the user's keeps its name: `MyExp backward`."""
    name = node.rpartition("::")[2]
    if name == "AccumulateGrad":
        return "sum of gradients"
    operation, backward, number = name.partition("Backward")
    if not backward:
        return name
    if not number:  # torch numbers its own
        return f"{operation} backward"
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"(?<=[0-9])D", "d", operation))
    return f"{_as_written(words.lower())} backward"
