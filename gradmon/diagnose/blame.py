"""From what the operations of a step made to the one that is to blame, in words, and with a cure.

A step that is not finite is traced from its first bad end (the loss, then each parameter's gradient in the order of
backward) to the root. A spike is traced from the largest gradient along the largest input of each operation to where
the magnitude jumps.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmon.diagnose.operations import Given, Operation, Origin, Seen
from gradmon.record import Finding

#: An operation jumps if its output is so many times its largest input; a sum over a few elements is no jump.
JUMP = 30.0
#: A sample stands out if its largest value is so many times the median sample's.
OUTLIER = 10.0
#: A row may be masked by several of them together; so many are named.
_MASKS_NAMED = 3
_ROWS_NAMED = 4
#: Rows of the table.
_GROWTHS = 8
#: An operation that makes less than this share of the largest value around is in no table.
_NEGLIGIBLE = 1e-3
#: These give what they are told, whatever they are given.
_CONSTANT = frozenset({"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "rand_like"})
_ARITHMETIC = "IEEE 754"

#: First word of an operation's name -> what to change.
_CURES = {
    "log": "torch.log(x.clamp_min(1e-6)), or log_softmax / logsigmoid / log1p in place of the log of a probability",
    "log2": "torch.log2(x.clamp_min(1e-6))",
    "log10": "torch.log10(x.clamp_min(1e-6))",
    "log1p": "torch.log1p(x.clamp_min(-1 + 1e-6))",
    "div": "divide by count.clamp_min(1), or by x + 1e-6; skip rows whose mask is empty",
    "reciprocal": "1 / x.clamp_min(1e-6)",
    "rsqrt": "torch.rsqrt(x + 1e-6)",
    "sqrt": "torch.sqrt(x + 1e-6): the slope of sqrt at 0 is infinite",
    "norm": "x.square().sum(-1).add(1e-6).sqrt(): the slope of a norm at 0 is not defined",
    "pow": "keep the base away from 0: x.clamp_min(1e-6) ** p",
    "exp": "torch.exp(x - x.max()), or logsumexp / softmax; x.clamp_max(10) in fp16, whose largest number is 65504",
    "expm1": "torch.expm1(x.clamp_max(10))",
    "softmax": "leave one entry of each row unmasked, or mask with torch.finfo(x.dtype).min in place of -inf",
    "log_softmax": "leave one class of each row unmasked, or mask with torch.finfo(x.dtype).min in place of -inf",
    "scaled_dot_product_attention": "leave one key of each query unmasked",
    "nll_loss": "skip batches in which every label is ignore_index: if (labels != -100).any()",
    "mean": "skip what is empty, its mean is 0/0: if x.numel()",
    "std": "torch.sqrt(x.var(0, unbiased=False) + 1e-6); with unbiased=True one sample is 0/0: drop_last=True",
    "var": "x.var(0, unbiased=False), as unbiased=True makes 0/0 of one sample; or DataLoader(drop_last=True)",
    "cdist": "torch.cdist has no slope at 0: add 1e-6 to one side, or leave the diagonal out",
    "to": "the value does not fit the smaller type: train in bf16 in place of fp16, or scale it before",
    "acos": "torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))",
    "asin": "torch.asin(x.clamp(-1 + 1e-6, 1 - 1e-6))",
    "atan2": "keep both arguments from being 0 at once",
    "upsample": "a gradient through upsampling is summed over the copies: use a smaller scale_factor per stage, with a"
    " norm layer behind each",
    "mul": "scale or normalise what is multiplied; clip the gradients",
    "sub": "Inf - Inf is NaN: keep both sides finite before",
}
#: (operation, what it gave) -> what alone can give that: a fact of arithmetic.
_WHY = {
    ("log", "-Inf"): "the logarithm of 0",
    ("log", "NaN"): "the logarithm of a negative number",
    ("sqrt", "NaN"): "the root of a negative number",
    ("rsqrt", "NaN"): "the root of a negative number",
    ("rsqrt", "Inf"): "1 / sqrt(0)",
    ("div", "NaN"): "0 / 0",
    ("reciprocal", "Inf"): "1 / 0",
    ("acos", "NaN"): "the argument is outside of -1 to 1",
    ("asin", "NaN"): "the argument is outside of -1 to 1",
    ("sqrt backward", "Inf"): "the slope of sqrt at 0",
    ("norm backward", "NaN"): "the slope of a norm at 0",
    ("pow", "NaN"): "a negative number to a power that is no whole number",
    ("mean", "NaN"): "the mean of nothing",
}
#: Beyond fp16's range already: what overflowed was no half precision.
_BEYOND_HALF = 65504.0
#: Their gradient has the rows of what they were given, as their output has.
ELEMENTWISE = frozenset(
    {
        "log",
        "log2",
        "log10",
        "log1p",
        "sqrt",
        "rsqrt",
        "div",
        "reciprocal",
        "acos",
        "asin",
        "atan2",
        "exp",
        "pow",
        "norm",
    }
)
#: A module that is on the way to an overflow so often is a recurrence.
_RECURRENCE = 8
_PRODUCTS = frozenset({"addmm", "mm", "bmm", "matmul", "conv", "baddbmm", "linear", "square", "mul", "cumprod", "prod"})


@dataclass(frozen=True, slots=True)
class Blame:
    """What began it."""

    finding: Finding
    culprit: Operation | None
    """None where the batch or the weights are to blame."""
    steps: list[str]
    """How it went on from there, one sentence each."""
    end: str
    """Where it arrived: `the loss`, or the name of a parameter."""


def blame_bad(ends: list[tuple[str, Seen]]) -> Blame | None:
    """For what is not finite.

    Args:
        ends: name and contents of the loss and of each parameter's gradient, in order of time.

    Returns:
        None if all ends are finite.
    """
    bad = [(name, seen) for name, seen in ends if seen.holds.bad]
    if not bad:
        return None
    end, seen = bad[0]
    root, maker = seen.root, seen.nan_maker
    steps = []
    if isinstance(root, Operation) and isinstance(root.fed_by, (Operation, Given)):
        sources = root.masks[:_MASKS_NAMED] if root.fed_by in root.masks else (root.fed_by,)
        steps.append(f"the -Inf came from {' and from '.join(map(_named, sources))}")
    if maker is not None and maker is not root:
        steps.append(f"it became NaN in {_named(maker)}")
    steps.append(f"it reached {_end(end)} ({seen.holds.told()})")
    if isinstance(root, Operation):
        steps = _growth_before(root) + steps
        return Blame(_of_operation(root), root, steps, end)
    return Blame(_of_given(root), None, steps, end)


def _growth_before(root: Operation) -> list[str]:
    """How what overflowed had become so large, where it was before; one sentence or none."""
    grown = _grown_before(root)
    if not grown or not root.largest_input > _BEYOND_HALF:
        return []
    modules = Counter(op.module for op in grown if op.module).most_common(3)
    named = ", ".join(f"{name} ({times} times)" if times > 1 else name for name, times in modules)
    through = f", {'most often ' if modules[0][1] > 1 else ''}in {named}" if modules else ""
    return [
        f"its input had grown from {grown[0].largest_input:.3g} to {root.largest_input:.3g} over {len(grown)}"
        f" operation{'s' if len(grown) > 1 else ''}{through}"
    ]


def _grown_before(root: Operation) -> list[Operation]:
    before = Seen(root.grew_from, root.holds)
    return [op for op in path_of(before)[0] if _grows(op)]


def _recurrence(root: Operation) -> str:
    """Module through which the values went again and again, growing; empty if there is none."""
    often = Counter(op.module for op in _grown_before(root) if op.module).most_common(1)
    return often[0][0] if often and often[0][1] >= _RECURRENCE else ""


def _of_operation(root: Operation) -> Finding:
    told, cure = root.holds.told() or "values that are not finite", _cure(root)
    if root.given_nan:
        message = f"{root.name} was given a number that is NaN"
        cure = "look where that number comes from: a weight of the sample or the loss, a schedule, a missing value"
    elif root.meant:
        message = f"{root.name} puts {told} there on purpose, and it reached the end"
    elif root.fed_by is not None:
        message = f"{root.name} made {told} out of -Inf"
    else:
        why = _WHY.get((root.name, told)) or f"largest {root.largest_input:.3g}"
        message = f"{root.name} gave {told} out of finite inputs ({why})"
    return Finding(
        rule="broken_operation",
        where=root.place(),
        message=message,
        measured=float(root.holds.nan_count + root.holds.inf_count),
        threshold=0.0,
        source=_ARITHMETIC,
        cure=cure,
        severity="error",
    )


def _of_given(root: Given | None) -> Finding:
    if root is None or root.kind == "constant":
        message = "a tensor that was made outside of the model's forward is not finite"
        return Finding("broken_constant", "", message, source=_ARITHMETIC, severity="error")
    input_cure = "batch = {k: v for k, v in batch.items() if v.isfinite().all()}, or repair the sample in the data set"
    cures = {
        "input": input_cure,
        "parameter": "go back to a checkpoint from before this step: the weights themselves are broken",
        "buffer": "reset the buffer (BatchNorm: module.reset_running_stats()), or go back to an older checkpoint",
    }
    told = root.told or f"{root.name} holds {root.holds.told()}"
    rule = {"input": "broken_input"}.get(root.kind, "broken_weights")
    count = float(root.holds.nan_count + root.holds.inf_count)
    cure = cures[root.kind]
    if root.kind == "parameter" and 0 < len(root.holds.rows) < root.holds.of_rows:
        rows = root.holds.rows
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        named = ", ".join(map(str, rows[:_ROWS_NAMED]))
        told += f" in row{'s' if len(rows) > 1 else ''} {named}{more} of its {root.holds.of_rows}"
        cure += "; if they came so from a file, make these rows anew"
    return Finding(rule, root.name, told, count, 0.0, _ARITHMETIC, cure, "error")


def blame_jump(
    operations: list[Operation],
    ends: list[tuple[str, Seen]],
    suspect: str | None,
    inputs: list[tuple[Given, Tensor]],
) -> Blame | None:
    """For gradients that are too large.

    Args:
        operations: all of the step.
        ends: name and gradient of each parameter.
        suspect: the parameter that the alarm named.
        inputs: the batch.

    Returns:
        None without any gradient.
    """
    if not ends:
        return None
    end, seen = next(((n, s) for n, s in ends if n == suspect), max(ends, key=lambda e: e[1].holds.magnitude))
    path, leaf = path_of(seen)
    scaled = _loss_factor(operations)
    steps = [f"it reached the gradient of {end} ({seen.holds.magnitude:.3g})"]
    if isinstance(leaf, Given) and leaf.kind == "input":
        tensor = next((t for given, t in inputs if given is leaf), None)
        outlier = None if tensor is None else _outlier(leaf, tensor)
        if outlier is not None:
            return Blame(outlier, None, steps, end)
    if scaled is not None:
        return Blame(_of_loss_factor(scaled), scaled, steps, end)
    # The last one sums up a parameter's gradient over the batch: it grows by nature.
    jumping = [op for op in path[:-1] if jumps(op)]
    if jumping:
        return Blame(_of_jump(jumping[0]), jumping[0], steps, end)
    grown = [op for op in path if _grows(op)]
    if not grown:
        return None
    largest = max(grown, key=lambda op: op.growth)
    first = path[0].largest_input if path[0].largest_input > 0 else path[0].holds.magnitude
    factor = seen.holds.magnitude / first if first > 0 else math.nan
    if not factor >= JUMP:
        return Blame(_of_all(seen.holds.magnitude, factor), None, steps, end)
    modules = list(dict.fromkeys(op.module for op in grown if op.module))
    through = f", through {', '.join(modules[:4])}{' ...' if len(modules) > 4 else ''}" if modules else ""
    finding = Finding(
        rule="growth",
        where=largest.place(),
        message=f"no single operation jumps: {len(grown)} of {len(path)} in a row grow, by {factor:.3g} together"
        f"{through}; most in {largest.name} (x{largest.growth:.3g})",
        measured=factor,
        threshold=JUMP,
        source="ratio of largest absolute values",
        cure="normalise inside each block (nn.LayerNorm), or scale the residual branch by 1 / sqrt(2 * depth)",
        severity="error",
    )
    return Blame(finding, largest, steps, end)


def _loss_factor(operations: list[Operation]) -> Operation | None:
    """What makes the loss's own gradient, which begins as 1, large before it has come to anything else."""
    for operation in operations:
        if operation.backward and operation.elements > 1:
            return None
        if operation.backward and jumps(operation):
            return operation
    return None


def _of_loss_factor(operation: Operation) -> Finding:
    return dataclasses.replace(
        _of_jump(operation),
        message=f"the loss is multiplied by {operation.growth:.3g} before anything else: {operation.name}",
        cure="look at the weight on the loss: another unit, a sum in place of a mean, a scale that is not divided out",
    )


def _of_all(magnitude: float, factor: float) -> Finding:
    return Finding(
        rule="large_throughout",
        where="",
        message=f"no operation stands out: the largest gradient, {magnitude:.3g}, is {factor:.3g} times its source",
        measured=factor,
        threshold=JUMP,
        source="ratio of largest absolute values",
        cure="look at the steps before: weights that a learning rate has moved too far make all gradients large; lower "
        "it, or warm it up for longer",
        severity="error",
    )


def _of_jump(operation: Operation) -> Finding:
    return Finding(
        rule="jump",
        where=operation.place(),
        message=f"{operation.name} is the first that jumps: from {operation.largest_input:.3g} to"
        f" {operation.holds.magnitude:.3g} (x{operation.growth:.3g})",
        measured=operation.growth,
        threshold=JUMP,
        source="ratio of largest absolute values",
        cure=_cure(operation),
        severity="error",
    )


def _outlier(leaf: Given, tensor: Tensor) -> Finding | None:
    if tensor.dim() < 1 or tensor.shape[0] < 3 or not tensor.is_floating_point():
        return None
    each = tensor.detach().abs().flatten(1).amax(1) if tensor.dim() > 1 else tensor.detach().abs()
    largest, median = float(each.max()), float(each.median())
    if not largest > OUTLIER * median:
        return None
    sample = int(each.argmax())
    return Finding(
        rule="outlier_sample",
        where=leaf.name,
        message=f"sample {sample} of {leaf.name} reaches {largest:.3g}, {largest / median if median else math.inf:.3g}"
        f" times the median sample",
        measured=largest / median if median else math.inf,
        threshold=OUTLIER,
        source="largest absolute value per sample against their median",
        cure=f"x = x.clamp(-{10 * median:.3g}, {10 * median:.3g}), or repair the sample in the data set",
        severity="error",
    )


def path_of(seen: Seen) -> tuple[list[Operation], Origin | None]:
    """The operations through which its largest value came, oldest first; and what was given to the first of them."""
    path: list[Operation] = []
    origin = seen.origin
    while isinstance(origin, Operation):
        path.append(origin)
        origin = None if _is_constant(origin) else origin.grew_from
    return path[::-1], origin


def growths(operations: list[Operation]) -> list[Operation]:
    """Those that grew most, the largest first, of those that made large values."""
    largest = {back: max((o.holds.magnitude for o in operations if o.backward is back), default=0.0) for back in (0, 1)}
    counted = [o for o in operations if _grows(o) and o.holds.magnitude > _NEGLIGIBLE * largest[o.backward]]
    return sorted(counted, key=lambda o: -o.growth)[:_GROWTHS]


def jumps(operation: Operation) -> bool:
    """True if it makes something large out of something small: a sigmoid's 0.5 out of 0.001 is none."""
    large = operation.backward or operation.holds.magnitude >= JUMP
    return _grows(operation) and operation.growth >= JUMP and large


def _grows(operation: Operation) -> bool:
    return operation.growth > 1 and not _is_constant(operation)


def _is_constant(operation: Operation) -> bool:
    return operation.name in _CONSTANT


def _cure(operation: Operation) -> str:
    first = operation.name.split(" ")[0]
    if first.startswith("upsample"):
        first = "upsample"
    if first in _PRODUCTS and operation.holds.bad and operation.largest_input > _BEYOND_HALF:
        if again := _recurrence(operation):
            return (
                f"{again} is applied again and again and multiplies by more than 1 each time: nn.GRU or nn.LSTM, a norm"
                " layer in the loop, nn.init.orthogonal_ with gain 1, or shorter sequences"
            )
        return (
            f"what goes in is far too large already ({operation.largest_input:.3g}): lower the learning rate, clip the"
            " gradients, and go on from a checkpoint of before; or look for the growth in the table below"
        )
    if first in _PRODUCTS and operation.holds.bad:
        half = "fp16, whose largest number is 65504: train in bf16, or scale the inputs down"
        return f"the product is too large for its type; {half}"
    if operation.name.endswith("backward") and first not in _CURES and first[:1].isupper():
        return f"check the backward of your own autograd function {first}: torch.autograd.gradcheck({first}.apply, x)"
    return _CURES.get(first, "look at its inputs in the line above; torch.nan_to_num would only hide it")


def _named(origin: Origin) -> str:
    if isinstance(origin, Given):
        return origin.told or origin.name
    place = origin.place()
    return f"{origin.name} ({place})" if place else origin.name


def _end(name: str) -> str:
    return name if name.startswith("the ") else f"the gradient of {name}"


def norm_of(gradients: list[Tensor]) -> float:
    """Their 2-norm, in float64."""
    if not gradients:
        return 0.0
    parts = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return float(torch.stack([p.detach().double().norm().cpu() for p in parts]).norm())
