"""One forward and one backward of the model, and what was seen in them.

Legend: C classes, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from gradmon.diagnose.doctor.state import own_copy, untouched
from gradmon.diagnose.doctor.trace import Operation, Scale, Trace, scale_of, tensors_in

LossFunction = Callable[[nn.Module, Any], Any]

#: GradScaler's first factor: what fp16 gradients are multiplied by before they can round to 0.
FIRST_LOSS_SCALE = 65536.0
_IN_PLACE = "modified by an inplace operation"


class ModelError(ValueError):
    """The model or its loss does not run on the batch; the message says what it raised."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, and the gradient of one backward."""

    name: str
    names: tuple[str, ...]
    """All names that it has in the model; more than one where it is tied."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    trained: bool
    scale: Scale
    gradient: Scale | None
    """Unscaled; None if the backward left it without one."""
    gradient_mean_abs: float
    """Over the elements that are not 0: an embedding has no gradient for tokens that aren't in the batch."""
    underflow_share: float
    """Elements that are 0 only because fp16 can't hold them; 0 where that was not measured."""
    uses: int
    """Places in the graph that add to its gradient."""
    accumulations: int
    """Times that its gradient was added to in the backward."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a loss function was given to compare with."""

    loss: str
    """Name of the loss function, `cross_entropy`."""
    classes: int
    """C; 0 for targets that are no classes."""
    count: int
    """N, without those that are ignored."""
    lowest: float
    highest: float
    out_of_range: int
    """Labels outside 0..C-1; for binary targets, outside 0..1."""
    most: int
    """Labels of the most frequent class."""
    least: int
    """Labels of the least frequent class, of all C."""
    per_sample: bool
    """One label per sample, not one per token or pixel."""
    hard: bool
    """Whole classes, not probabilities."""
    weighted: bool
    """The loss weighs classes against each other."""
    given: bool = True
    """False for what the loss function makes itself, as a GAN does of ones and zeros."""
    value: float = math.nan
    """The loss itself, if it is a mean; NaN where the loss could not be computed."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the checks go by."""

    operations: tuple[Operation, ...]
    weights: tuple[Weight, ...]
    labels: tuple[Labels, ...]
    loss: float | None
    """None if the forward ended early."""
    backward_failure: str
    """What the backward raised, if a tensor it needed had been changed in place; else empty."""
    half_without_scale: bool
    """fp16 took part, and the loss was not scaled."""
    reused_in_place: tuple[tuple[Operation, int], ...]
    """Operations that changed their caller's tensor, and how many operations used it as if it had not been changed."""


class _LabelsOutOfRangeError(Exception):
    """Ends a forward before labels that are out of range crash it (on a GPU for good)."""


def probe(model: nn.Module, batch: Any, loss_fn: LossFunction, *, loss_scale: float = 1.0) -> Evidence:
    """Run the model once forward and once backward; leaves it as it was.

    Raises:
        ModelError: forward, loss or backward failed, or the loss is not one number with a gradient.
    """
    mine = own_copy(batch)
    books = _LabelBook(next((len(t) for t in tensors_in(mine) if t.dim()), 0))
    trace = Trace(model, mine, books.look)
    books.from_data = trace.is_data
    failure = ""
    with untouched(model, weights=False), torch.enable_grad():
        if not model.training:
            model.train()
        loss = _forward(model, mine, loss_fn, trace)
        gradients = _Gradients(model)
        unscaled = loss_scale == 1.0 and _uses_half(model, trace.operations)
        if loss is not None and bool(loss.isfinite()):
            failure = gradients.collect(loss, loss_scale, half=unscaled)
        weights = gradients.weights()
    value = None if loss is None else float(loss.detach())
    reused = () if loss is None else _reused_in_place(trace)
    labels = books.with_values(trace.operations)
    return Evidence(tuple(trace.operations), weights, labels, value, failure, unscaled, reused)


def _forward(model: nn.Module, batch: Any, loss_fn: LossFunction, trace: Trace) -> Tensor | None:
    try:
        with trace:
            loss = loss_fn(model, batch)
    except _LabelsOutOfRangeError:
        return None
    except ModelError:
        raise
    except Exception as error:  # the user's code: whatever it raises is told as it is
        raise ModelError(
            f"the model does not run on this batch: {type(error).__name__}: {error};"
            " check the batch's shapes and types, and what the loss is given"
        ) from error
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.requires_grad:
        raise ModelError(
            "no path leads from the loss back to a parameter that is trained; look for torch.no_grad(), .detach(),"
            " .item() and torch.tensor(...) between them"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ModelError(f"the loss must be one number with a gradient (got {got}); return the mean over the batch")
    return loss


def _uses_half(model: nn.Module, operations: list[Operation]) -> bool:
    return any(o.dtype is torch.float16 and o.trained for o in operations) or any(
        p.dtype is torch.float16 for p in model.parameters()
    )


class _Gradients:
    """Of one backward."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._parameters = list(model.parameters())
        self._uses: dict[int, int] = {}
        self._accumulations: dict[int, int] = {}
        self._underflow: dict[int, float] = {}
        self._loss_scale = 1.0

    def collect(self, loss: Tensor, loss_scale: float, *, half: bool) -> str:
        """Run the backward; returns what it raised if a tensor had been changed in place."""
        self._loss_scale = loss_scale
        self._uses = _uses(loss)
        trained = [p for p in self._parameters if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._count) for p in trained]  # type: ignore[no-untyped-call]
        try:
            if half:
                self._compare_scaled(loss, trained)
            (loss * loss_scale).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if _IN_PLACE not in str(error):
                raise ModelError(f"the backward failed: {error}") from error
            return str(error)
        finally:
            for handle in handles:
                handle.remove()
        return ""

    def _count(self, parameter: Tensor) -> None:
        self._accumulations[id(parameter)] = self._accumulations.get(id(parameter), 0) + 1

    def _compare_scaled(self, loss: Tensor, trained: list[nn.Parameter]) -> None:
        """Share of the gradient that is 0 unscaled but not when scaled."""
        plain = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        scaled = torch.autograd.grad(loss * FIRST_LOSS_SCALE, trained, retain_graph=True, allow_unused=True)
        for parameter, small, large in zip(trained, plain, scaled, strict=True):
            if small is not None and large is not None:
                there = large != 0
                lost = float(((small == 0) & there).sum()) / max(1.0, float(there.sum()))
                self._underflow[id(parameter)] = lost

    def weights(self) -> tuple[Weight, ...]:
        """Of every parameter with elements, in the model's order."""
        return tuple(weight for p in self._parameters if (weight := self._weight(p)) is not None)

    def _weight(self, parameter: nn.Parameter) -> Weight | None:
        scale = scale_of(parameter)
        if scale is None:
            return None
        gradient, mean_abs = parameter.grad, 0.0
        if gradient is not None:
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            gradient = gradient.detach().float() / self._loss_scale
            mean_abs = float(gradient.abs().sum() / max(1, int(gradient.count_nonzero())))
        names = self._names[id(parameter)]
        return Weight(
            name=names[0],
            names=tuple(names),
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            device=parameter.device.type,
            trained=parameter.requires_grad,
            scale=scale,
            gradient=None if gradient is None else scale_of(gradient),
            gradient_mean_abs=mean_abs,
            underflow_share=self._underflow.get(id(parameter), 0.0),
            uses=self._uses.get(id(parameter), 0),
            accumulations=self._accumulations.get(id(parameter), 0),
        )


def _uses(loss: Tensor) -> dict[int, int]:
    """id of a parameter -> edges of the autograd graph that lead into its accumulation."""
    uses: dict[int, int] = {}
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        for onward, _ in node.next_functions if node is not None else ():
            leaf = getattr(onward, "variable", None)
            if leaf is not None:
                uses[id(leaf)] = uses.get(id(leaf), 0) + 1
            elif onward is not None and onward not in seen:
                seen.add(onward)
                waiting.append(onward)
    return uses


def _reused_in_place(trace: Trace) -> tuple[tuple[Operation, int], ...]:
    """Activations that overwrote the input of a module around them, which used it again later.

    Within the code that made a tensor, overwriting it is taken as meant; a module that overwrites what it was handed
    and reads it again, beside what it made of it, has lost a residual path.
    """
    found: list[tuple[Operation, int]] = []
    for operation in trace.operations:
        if not (operation.in_place and operation.kind == "activation" and operation.inputs):
            continue
        overwritten = operation.inputs[0]
        around = [
            layer
            for layer, calls in trace.entered.items()
            for before, maker in calls
            if maker == overwritten and before <= operation.index and _inside(operation.layer, layer)
        ]
        users = [o for o in trace.operations if operation.index in o.inputs]
        if around and len(users) > 1 and any(o.kind == "sum" for o in users):
            found.append((operation, len(users)))
    return tuple(found)


def _inside(layer: str, outer: str) -> bool:
    return outer == "" or layer == outer or layer.startswith(f"{outer}.")


class _LabelBook:
    """Looks at what loss functions are given, before they run.

    Args:
        samples: in the batch; as many labels are one per sample, more are tokens or pixels.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._seen: list[Labels] = []
        self.from_data: Callable[[Tensor], bool] = lambda _: True
        """Says of a tensor whether it comes from the batch."""

    def look(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write down the labels; raises where they are out of range."""
        output = kwargs.get("input", args[0] if args else None)
        target = kwargs.get("target", args[1] if len(args) > 1 else None)
        if not isinstance(output, Tensor) or not isinstance(target, Tensor) or target.numel() == 0:
            return
        try:
            given = self.from_data(target)
            labels = self._labels(name, output, target, kwargs)
        except RuntimeError:  # inside torch.vmap labels have no values that could be looked at
            return
        if labels is not None:
            self._seen.append(replace(labels, given=given))
            if labels.out_of_range and labels.classes > 2:
                raise _LabelsOutOfRangeError

    def _labels(self, name: str, output: Tensor, target: Tensor, kwargs: Mapping[str, Any]) -> Labels | None:
        if name in ("cross_entropy", "nll_loss") and not target.is_floating_point():
            return _class_labels(name, output, target, kwargs, self._samples)
        if name.startswith("binary_cross_entropy"):
            return _binary_labels(name, target, kwargs, self._samples)
        return None

    def with_values(self, operations: list[Operation]) -> tuple[Labels, ...]:
        """The labels, each with the value of its loss."""
        values = iter([o for o in operations if o.kind == "loss" and o.name.startswith(("cross", "nll", "binary"))])
        told = []
        for labels in self._seen:
            made = next((o for o in values if o.name == labels.loss), None)
            scale = made.scale if made is not None and made.shape == () else None
            value = scale.mean if scale is not None and not scale.nonfinite else math.nan
            told.append(replace(labels, value=value))
        return tuple(told)


def _class_labels(name: str, output: Tensor, target: Tensor, kwargs: Mapping[str, Any], samples: int) -> Labels:
    classes = output.shape[1] if output.dim() > 1 else output.shape[0]
    kept = target.detach()[target != kwargs.get("ignore_index", -100)]
    if kept.numel() == 0:
        return Labels(name, classes, 0, math.nan, math.nan, 0, 0, 0, False, hard=True, weighted=False)
    wrong = int(((kept < 0) | (kept >= classes)).sum())
    counts = torch.bincount(kept.clamp(0, classes - 1).flatten(), minlength=classes)
    return Labels(
        loss=name,
        classes=classes,
        count=kept.numel(),
        lowest=float(kept.min()),
        highest=float(kept.max()),
        out_of_range=wrong,
        most=int(counts.max()),
        least=int(counts.min()),
        per_sample=target.numel() == samples,
        hard=True,
        weighted=kwargs.get("weight") is not None,
    )


def _binary_labels(name: str, target: Tensor, kwargs: Mapping[str, Any], samples: int) -> Labels:
    positive = int((target > 0.5).sum())
    return Labels(
        loss=name,
        classes=2,
        count=target.numel(),
        lowest=float(target.min()),
        highest=float(target.max()),
        out_of_range=int(((target < 0) | (target > 1)).sum()),
        most=max(positive, target.numel() - positive),
        least=min(positive, target.numel() - positive),
        per_sample=target.numel() == samples,
        hard=bool(((target == 0) | (target == 1)).all()),
        weighted=kwargs.get("weight") is not None or kwargs.get("pos_weight") is not None,
    )


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss where none was given: the model's own, else by what the target of (input, target) is, else mean square.

    A target of whole numbers is taken as classes, one with decimals as values to meet.
    """
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    inputs, target = batch if pair else (batch, None)
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    elif isinstance(output, list | tuple):
        output = output[0]
    if not isinstance(output, Tensor) or output.numel() == 1:
        return output  # type: ignore[no-any-return]
    if not isinstance(target, Tensor):
        return output.float().square().mean()
    if target.is_floating_point():
        return mse_loss(output.reshape(target.shape), target)
    if output.dim() == target.dim() + 1 and target.dim() > 1 and output.shape[:-1] == target.shape:
        return cross_entropy(output.flatten(0, -2), target.flatten())  # classes come last, as in a language model
    return cross_entropy(output, target)


def as_loss_function(loss_fn: Any) -> LossFunction:
    """`loss_fn(model, batch)` as it is; a criterion (a module, or one of torch's) gets `model(inputs)` and the target.

    Raises:
        ValueError: it can't be called.
    """
    if loss_fn is None:
        return default_loss
    if isinstance(loss_fn, type):  # nn.CrossEntropyLoss itself
        try:
            loss_fn = loss_fn()
        except TypeError as error:
            raise ValueError(f"loss_fn is a class, and needs arguments: pass an instance ({error})") from error
    if not callable(loss_fn):
        kind = type(loss_fn).__name__
        raise ValueError(f"loss_fn must be a function of (model, batch) or a criterion (got a {kind})")  # noqa: TRY004
    if not isinstance(loss_fn, nn.Module) and getattr(loss_fn, "__module__", "") != "torch.nn.functional":
        called: LossFunction = loss_fn
        return called
    criterion: Callable[[Tensor, Tensor], Tensor] = loss_fn

    def compared(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise ModelError("a criterion needs a batch of (inputs, target); or pass a function of (model, batch)")
        return criterion(model(batch[0]), batch[1])

    return compared


def of_output(loss_fn: Callable[..., Any]) -> LossFunction:
    """`loss_fn(output, *targets)` as a function of (model, batch)."""

    def compared(model: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise ModelError("a loss of (output, target) needs a batch of (inputs, target)")
        inputs, *targets = batch
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return loss_fn(output, *targets)

    return compared


@contextmanager
def runs(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules of it that have been called inside; their parameters' types and memory are put back if none has.

    A function that takes the model for a tensor may call `.float()` on it.
    """
    ran: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda module, _: ran.append(module)) for m in model.modules()]
    data = [(p, p.data) for p in model.parameters()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
        for parameter, kept in data:
            if not ran and parameter.dtype != kept.dtype:
                parameter.data = kept
