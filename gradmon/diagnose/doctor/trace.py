"""Every operation of one forward, as plain numbers: what it was, whose it was, what went in and how large it came out.

Glossary:

- *operation*: one call of a torch function as the model's code wrote it (`relu`, `conv2d`, `add`); what such a call
  does inside is not looked into.
- *layer*: path of the innermost module that was running, `blocks.3.act`; empty for the model's or the loss's own code.
- *unit*: one channel or one column of an activation.
- *from data*: computed from the batch, not from parameters and constants alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradmon.diagnose.doctor.vocabulary import (
    CONCATS,
    CONSTANTS,
    CONVOLUTIONS,
    DEVIATIONS,
    FLAT_RECTIFIERS,
    LOSSES,
    PRODUCTS,
    TRANSPOSED,
    UPSAMPLING,
    Kind,
    kind_of,
)

_ROOTS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the elements of a tensor are; of the finite ones."""

    mean: float
    std: float
    rms: float
    abs_max: float
    nonfinite: int
    """NaN and infinite elements."""
    nan: int = 0
    """NaN elements alone."""


@dataclass(frozen=True, slots=True)
class Units:
    """What the units of an activation do, over all samples and positions."""

    count: int
    observations: int
    """Values per unit."""
    dead_share: float
    """Units that are active in under 1 % of their values; rectifiers with a flat half only."""
    positive_share: float
    """Elements above 0."""
    saturated_share: float
    """Elements where the slope is under 1 % of the steepest; tanh and sigmoid only."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `inputs` are the indices of those that made its inputs."""

    index: int
    name: str
    """As torch calls it, without underscores: `relu` for `relu_`."""
    kind: Kind
    layer: str
    line: str
    """Where the user's code called it: `net.py:12`."""
    inputs: tuple[int, ...]
    from_data: bool
    trained: bool
    """Gradients flow through it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: Scale | None
    """Of its (first) output; None where that holds no floating-point numbers."""
    units: Units | None
    parameters: tuple[str, ...] = ()
    """Names of the parameters it uses, also through views of them."""
    operands: tuple[float, ...] = ()
    """Root mean square of each input that comes from data, of a concatenation or upsampling."""
    in_place: bool = False
    dim: int | None = None
    """Along which a concatenation joins."""

    @property
    def weighted(self) -> bool:
        """True for a layer with weights; a transposed convolution is one, and an upsampling."""
        return self.kind == "weight" or self.name in TRANSPOSED

    @property
    def place(self) -> str:
        """Layer, or operation and line where it has none: for `Finding.where`."""
        return self.layer or f"{self.name} ({self.line})"

    @property
    def told(self) -> str:
        """`relu in blocks.3 (net.py:12)`, for a message."""
        return f"{self.name} in {self.layer} ({self.line})" if self.layer else f"{self.name} at {self.line}"


class Trace(TorchFunctionMode):
    """Writes down the operations of what runs inside `with`.

    Args:
        model: whose modules and parameters give the names.
        batch: its tensors are written down first, as operations of kind `input`.
        watch: called with each loss function's name, arguments and keywords before it runs; may raise.
    """

    def __init__(
        self, model: nn.Module, batch: Any, watch: Callable[[str, tuple[Any, ...], Mapping[str, Any]], None]
    ) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._watch = watch
        self._model = model
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._constants = {id(b) for b in model.buffers()}.union(self._names)
        self._layers: list[str] = []
        self._handles: list[Any] = []
        self._makers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """id of a tensor -> the tensor, and the operation that made (or last changed) it."""
        for tensor in tensors_in(batch):
            self._source(tensor)
        self.entered: dict[str, list[tuple[int, int]]] = {}
        """Layer -> (operations before it ran, maker of its first input) at each call, of modules that hold others."""

    def __enter__(self) -> Any:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._layers.append(name)
            if next(module.children(), None) is not None:
                for tensor in tensors_in((args, kwargs)):
                    self.entered.setdefault(name, []).append((len(self.operations), self._maker(tensor)))

        return enter

    def _leave(self, *_: Any) -> None:
        self._layers.pop()

    def _source(self, tensor: Tensor) -> int:
        """Index of the operation that made it; data that comes from outside is written down as an input."""
        maker = self._maker(tensor)
        if maker >= 0 or not self.is_data(tensor):
            return maker
        self._note("input", "input", [], [tensor], from_data=True)
        return len(self.operations) - 1

    def _maker(self, tensor: Tensor) -> int:
        """Index of the operation that made it, -1 if none did."""
        found = self._makers.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else -1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it, and write it down if it makes a tensor."""
        kwargs = kwargs or {}
        written = getattr(func, "__name__", str(func))
        name = written.strip("_")
        if name in LOSSES:
            self._watch(name, args, kwargs)
        entering = list(tensors_in((args, kwargs)))
        with torch.no_grad():
            operands = self._operands(name, entering)
        result = func(*args, **kwargs)
        made = [args[0]] if name == "setitem" else list(tensors_in(result))
        if made and not name.startswith("set_"):
            in_place = any(made[0] is tensor for tensor in entering)
            with torch.no_grad():
                self._write(name, entering, made, operands, in_place=in_place, dim=_dim(name, args, kwargs))
        return result

    def _operands(self, name: str, entering: list[Tensor]) -> tuple[float, ...]:
        if name not in CONCATS and name not in UPSAMPLING:
            return ()
        values = [t for t in entering if t.is_floating_point() and self.is_data(t)]
        return tuple(scale.rms for t in values if (scale := scale_of(t)) is not None)

    def is_data(self, tensor: Tensor) -> bool:
        """True if it was computed from the batch, or came from outside; not for parameters, buffers and constants."""
        maker = self._maker(tensor)
        if maker >= 0:
            return self.operations[maker].from_data
        return id(tensor) not in self._constants and not isinstance(tensor, nn.Parameter)

    def _write(
        self,
        name: str,
        entering: list[Tensor],
        made: list[Tensor],
        operands: tuple[float, ...],
        *,
        in_place: bool,
        dim: int | None,
    ) -> None:
        inputs = [maker for t in entering if (maker := self._source(t)) >= 0]
        parameters = [self._names[id(t)] for t in entering if id(t) in self._names]
        parameters += [p for i in inputs if not self.operations[i].from_data for p in self.operations[i].parameters]
        from_data = any(map(self.is_data, entering)) if entering else name.startswith("rand")
        self._note(
            name,
            self._kind(name, inputs, entering, parameters=bool(parameters)),
            inputs,
            made,
            from_data=from_data and name not in CONSTANTS,
            parameters=tuple(dict.fromkeys(parameters)),
            operands=operands,
            in_place=in_place,
            dim=dim,
        )

    def _note(
        self, name: str, kind: Kind, inputs: Sequence[int], made: list[Tensor], *, from_data: bool, **more: Any
    ) -> None:
        """Write an operation down, as the maker of these tensors."""
        out = made[0]
        scale = scale_of(out)
        by_unit = kind == "activation" and scale is not None
        self.operations.append(
            Operation(
                index=len(self.operations),
                name=name,
                kind=kind,
                layer=self._layers[-1] if self._layers else "",
                line=_users_line(),
                inputs=tuple(dict.fromkeys(inputs)),
                from_data=from_data,
                trained=any(t.requires_grad for t in made),
                shape=tuple(out.shape),
                dtype=out.dtype,
                scale=scale,
                units=_units(name, out, channels_first=self._behind_convolution(inputs)) if by_unit else None,
                **more,
            )
        )
        for tensor in made:
            self._makers[id(tensor)] = (weakref.ref(tensor), len(self.operations) - 1)

    def _kind(self, name: str, inputs: Sequence[int], entering: list[Tensor], *, parameters: bool) -> Kind:
        if name in PRODUCTS and parameters:
            return "weight"
        if name in ("mul", "div", "truediv") and self._by_deviation(inputs):
            return "norm"
        if name in ("add", "radd", "iadd") and sum(map(self.is_data, entering)) > 1:
            return "sum"
        return kind_of(name)

    def _by_deviation(self, inputs: Sequence[int]) -> bool:
        """True if a root or deviation is among the inputs, with an epsilon added or a clamp at most."""
        near = [self.operations[i] for i in inputs]
        near += [self.operations[j] for o in near if o.name in ("add", "clamp", "clamp_min") for j in o.inputs]
        return any(operation.name in DEVIATIONS for operation in near)

    def _behind_convolution(self, inputs: Sequence[int]) -> bool:
        """True if what comes in is laid out as a convolution leaves it: units in dimension 1."""
        while inputs:
            operation = self.operations[inputs[0]]
            if operation.name in CONVOLUTIONS or operation.name in TRANSPOSED:
                return True
            if operation.kind not in ("norm", "pass", "activation", "sum") or operation.name in (
                "flatten",
                "transpose",
            ):
                return False
            inputs = operation.inputs
        return False


#: A unit active in fewer of its values than this is dead (SageMaker Debugger, DeadRelu: 1 %).
DEAD_BELOW = 0.01
#: Slope under 1 % of the steepest: of tanh where |y| > 0.995; of the sigmoid within 0.0025 of its ends.
_FLAT_TANH = 0.995
_FLAT_SIGMOID = 0.0025


def scale_of(tensor: Tensor) -> Scale | None:
    """Of a tensor's finite elements; None where it has none, holds no floating-point numbers, or is under vmap."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_sparse:
        return None
    try:
        return _scale(tensor)
    except RuntimeError:  # inside torch.vmap a tensor stands for many and has no values of its own
        return None


def _scale(tensor: Tensor) -> Scale:
    values = tensor.detach().float() if tensor.element_size() < 4 else tensor.detach()
    rms = torch.linalg.vector_norm(values) / values.numel() ** 0.5
    mean, rms_value, largest = torch.stack([values.mean(), rms, values.abs().amax()]).double().tolist()
    nonfinite = nan = 0
    if not rms_value < float("inf"):  # not `>=`: NaN too
        finite = values.isfinite()
        nonfinite, nan = int(values.numel() - finite.sum()), int(values.isnan().sum())
        kept = values[finite].double()
        if kept.numel() == 0:
            return Scale(0.0, 0.0, 0.0, 0.0, nonfinite, nan)
        mean, rms_value, largest = float(kept.mean()), float(kept.square().mean().sqrt()), float(kept.abs().amax())
    return Scale(mean, max(0.0, rms_value**2 - mean**2) ** 0.5, rms_value, largest, nonfinite, nan)


def _units(name: str, out: Tensor, *, channels_first: bool) -> Units | None:
    if out.dim() < 2 or not out.is_floating_point() or out.numel() == 0:
        return None
    by_unit = out.detach().movedim(1 if channels_first or out.dim() > 3 else -1, 0).flatten(1)
    dead = saturated = 0.0
    positive = by_unit > 0
    if name in FLAT_RECTIFIERS:
        dead = float((positive.float().mean(1) < DEAD_BELOW).float().mean())
    if name == "tanh":
        saturated = float((by_unit.abs() > _FLAT_TANH).float().mean())
    if name == "sigmoid":
        saturated = float(((by_unit - 0.5).abs() > 0.5 - _FLAT_SIGMOID).float().mean())
    return Units(len(by_unit), by_unit.shape[1], dead, float(positive.float().mean()), saturated)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _all_in(value.values())
    elif isinstance(value, list | tuple | set):
        yield from _all_in(value)


def _all_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from tensors_in(value)


def _dim(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    if name not in CONCATS:
        return None
    if name in ("hstack", "column_stack"):
        return 1
    return int(kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)))


def _users_line() -> str:
    """`net.py:12`: the innermost line that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ROOTS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
