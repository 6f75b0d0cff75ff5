"""What flows through the model: sizes that explode or fade, units that are dead or saturated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from gradmon.diagnose.doctor.flow import Flow, Skip
from gradmon.diagnose.doctor.probe import Evidence
from gradmon.diagnose.doctor.trace import Operation
from gradmon.diagnose.doctor.vocabulary import FLAT_RECTIFIERS, RECTIFIERS, RECURRENT
from gradmon.record import Finding

SAGEMAKER = "Amazon SageMaker Debugger"
#: Layer with more dead (or saturated) units than this is told (SageMaker Debugger, DeadRelu and SaturatedActivation).
MOST_DEAD = 0.5
MOST_SATURATED = 0.5
#: A unit is not called dead after fewer values: of 32 fair coins none falls the same way.
LEAST_OBSERVATIONS = 32
#: A rectifier that lets nearly all of its input pass is a straight line; large inputs then stay large.
ALWAYS_POSITIVE = 0.99
LARGE_PREACTIVATION = 10.0
#: Variance of one layer's output over that of the layer before (SageMaker Debugger, PoorWeightInitialization: 10).
VARIANCE_RATIO = 10.0
#: A single pair that far apart is told alone; nearer ones only when two in a row go the same way.
VARIANCE_RATIO_ALONE = 100.0
#: An upsampling by copying or weighing neighbours leaves the root mean square alone; He's initialisation gives 1.4.
UPSAMPLING_GROWTH = 4.0
#: Joined inputs that differ by more: 99.9 % of the variance that the next layer sees is the larger one's.
CONCAT_RATIO = 30.0
#: From the first to the last of several joins, sums or upsamplings. With normalised branches the residual stream grows
#: as the root of the depth, by 10 in 100 blocks.
CHAIN_GROWTH = 10.0
#: Each sum of independent parts of equal size multiplies by 1.41 (Zhang et al. 2019, Fixup); told from half of that on.
RESIDUAL_GROWTH_EACH = 1.2
_LEAST_RESIDUALS = 4
_NORMALISE = "normalise before it: nn.LayerNorm(width), nn.BatchNorm2d(channels) or nn.GroupNorm(8, channels)"


def check_activations(evidence: Evidence, flow: Flow) -> Iterator[Finding]:
    """All findings about the forward's values."""
    finite = evidence.loss is not None and math.isfinite(evidence.loss)
    yield from _nonfinite(evidence.operations, finite=finite)
    for operation in evidence.operations:
        if operation.units is not None and operation.from_data:
            yield from _dead_rectifier(operation)
            yield from _large_preactivation(operation, flow)
            yield from _saturated(operation, flow)
    yield from _variances(flow)
    yield from _upsampling(flow)
    yield from _concatenations(flow)
    yield from _residuals(flow)
    yield from _overwritten(evidence)


def _nonfinite(operations: Sequence[Operation], *, finite: bool) -> Iterator[Finding]:
    """The first operation that made NaN or Inf out of finite inputs; masks made of -inf are meant so.

    Unless the loss is `finite`, also the first that made NaN out of a mask.
    """
    bad = {o.index for o in operations if o.scale is not None and o.scale.nonfinite}
    nan = {o.index for o in operations if o.scale is not None and o.scale.nan}
    masks = ("masked_fill", "where", "setitem")
    for operation in operations:
        if operation.index not in bad or not operation.from_data or operation.name in masks:
            continue
        if operation.kind == "input" and operation.scale is not None:
            yield _nonfinite_input(operation, operation.scale.nonfinite)
            return
        masked = operation.index in nan and not nan.intersection(operation.inputs) and not finite
        alone = not bad.intersection(operation.inputs)
        if operation.scale is not None and (alone or masked):
            yield Finding(
                "nonfinite_forward",
                operation.place,
                f"{operation.told} makes {operation.scale.nonfinite} NaN or infinite elements in the first forward"
                + ("" if alone else ", out of infinite ones: a row that is masked in all places"),
                measured=float(operation.scale.nonfinite),
                threshold=0.0,
                source=f"{SAGEMAKER}, ExplodingTensor",
                cure=("" if alone else "leave one entry of each row unmasked; ")
                + "keep its input in its domain: torch.log(x.clamp_min(1e-12)), x / y.clamp_min(1e-6),"
                " F.cross_entropy(logits, target) for log(softmax)",
                severity="error",
            )
            return


def _nonfinite_input(operation: Operation, count: int) -> Finding:
    return Finding(
        "nonfinite_input",
        "batch",
        f"an input of shape {list(operation.shape)} holds {count} NaN or infinite elements",
        measured=float(count),
        threshold=0.0,
        source="fact: NaN in, NaN out",
        cure="inputs = torch.nan_to_num(inputs), or leave such samples out; torch.isfinite(inputs).all() in the loader",
        severity="error",
    )


def _dead_rectifier(operation: Operation) -> Iterator[Finding]:
    units = operation.units
    if units is None or operation.name not in FLAT_RECTIFIERS or units.observations < LEAST_OBSERVATIONS:
        return
    if units.dead_share > MOST_DEAD:
        yield Finding(
            "dead_relu",
            operation.place,
            f"{units.dead_share:.0%} of the {units.count} units of {operation.told} are active in under 1 % of their"
            " values: they get no gradient",
            measured=units.dead_share,
            threshold=MOST_DEAD,
            source=f"{SAGEMAKER}, DeadRelu",
            cure="nn.LeakyReLU(0.01), nn.SELU() or nn.GELU() in its place, biases at 0"
            " (nn.init.zeros_(layer.bias)), and a lower learning rate",
        )


def _large_preactivation(operation: Operation, flow: Flow) -> Iterator[Finding]:
    units, before = operation.units, flow.inputs(operation)
    if units is None or operation.name not in RECTIFIERS or not before or before[0].scale is None:
        return
    mean = before[0].scale.mean
    if units.positive_share >= ALWAYS_POSITIVE and mean > LARGE_PREACTIVATION:
        yield Finding(
            "large_preactivation",
            operation.place,
            f"{units.positive_share:.0%} of what enters {operation.told} is positive, {mean:.3g} in the mean:"
            " it bends nothing and lets large values grow",
            measured=mean,
            threshold=LARGE_PREACTIVATION,
            source="own limit; cf. He et al. 2015, pre-activations of mean 0",
            cure=f"{_NORMALISE}; nn.LeakyReLU(0.01), nn.SELU() or nn.GELU() instead; inputs of mean 0",
        )


def _saturated(operation: Operation, flow: Flow) -> Iterator[Finding]:
    """Of hidden layers only: gates multiply, and a sigmoid at the end is the loss's business."""
    units = operation.units
    if units is None or units.saturated_share <= MOST_SATURATED or not _feeds_layer(operation, flow):
        return
    yield Finding(
        "saturated_activation",
        operation.place,
        f"{units.saturated_share:.0%} of the values of {operation.told} lie where its slope is under 1 % of the"
        " steepest: gradients end there",
        measured=units.saturated_share,
        threshold=MOST_SATURATED,
        source=f"{SAGEMAKER}, SaturatedActivation (1 %, 50 %)",
        cure=f"nn.init.xavier_uniform_(layer.weight) for the layer before, or {_NORMALISE}; nn.ReLU() in hidden layers",
    )


def _feeds_layer(operation: Operation, flow: Flow) -> bool:
    """True if the next thing of weight that uses it is a layer, not a product of gates."""
    waiting = [operation]
    for current in waiting:
        for near in flow.consumers(current):
            if near.weighted:
                return True
            if near.kind in ("pass", "norm", "concat", "sum"):
                waiting.append(near)
    return False


def _variances(flow: Flow) -> Iterator[Finding]:
    """Variance from layer to layer along plain chains."""
    ratios: dict[int, float] = {}
    for operation in flow.operations:
        if not _keeps_variance(operation) or operation.scale is None or flow.bypassed(operation):
            continue
        before, mixed = flow.layer_before(operation)
        if before is None or mixed or not _keeps_variance(before) or before.scale is None or before.scale.std == 0:
            continue
        ratio = (operation.scale.std / before.scale.std) ** 2
        ratios[operation.index] = ratio
        earlier = ratios.get(before.index, 1.0)
        up = ratio > VARIANCE_RATIO and earlier > VARIANCE_RATIO
        small = ratio > 0 and not flow.following(operation).last  # a head may start small: PPO's at 0.01, many at 0
        down = small and ratio < 1 / VARIANCE_RATIO and earlier < 1 / VARIANCE_RATIO
        alone = ratio > VARIANCE_RATIO_ALONE or (small and ratio < 1 / VARIANCE_RATIO_ALONE)
        if up or down or alone:
            yield Finding(
                "variance_ratio",
                operation.place,
                f"the variance of {operation.told} is {ratio:.3g} times that of {before.place}"
                + ("" if alone else f", which is {earlier:.3g} times that of the layer before"),
                measured=ratio,
                threshold=VARIANCE_RATIO_ALONE if alone else VARIANCE_RATIO,
                source=f"{SAGEMAKER}, PoorWeightInitialization (ratio 10)",
                cure="nn.init.kaiming_normal_(layer.weight, nonlinearity='relu') before rectifiers,"
                f" nn.init.xavier_uniform_(layer.weight) else; or {_NORMALISE}",
            )
            return


def _keeps_variance(operation: Operation) -> bool:
    """True if sound weights keep the variance: a lookup, a mean over attention and a recurrence do as they like."""
    excepted = RECURRENT | {"embedding", "embedding_bag", "multi_head_attention_forward"}
    return operation.weighted and operation.name not in excepted


def _upsampling(flow: Flow) -> Iterator[Finding]:
    stages = [o for o in flow.operations if o.kind == "upsample" and o.scale is not None and o.operands]
    stages = [o for o in stages if o.operands[0] > 0]
    for operation in stages:
        growth = _rms(operation) / operation.operands[0]
        if growth > UPSAMPLING_GROWTH and not flow.following(operation).normalised:
            yield _upsampling_finding(
                operation, f"{operation.told} multiplies the size of its input by {growth:.3g}", growth
            )
            return
    for first, last in _chains(stages, flow):
        growth = _rms(last) / first.operands[0]
        if growth > CHAIN_GROWTH:
            message = f"from {first.told} to {last.told} values grow {growth:.3g} times, with nothing that normalises"
            yield _upsampling_finding(last, message, growth)
            return


def _upsampling_finding(operation: Operation, message: str, growth: float) -> Finding:
    return Finding(
        "upsampling_growth",
        operation.place,
        message,
        measured=growth,
        threshold=UPSAMPLING_GROWTH if "multiplies" in message else CHAIN_GROWTH,
        source="own limit: interpolation keeps the root mean square, He's initialisation gives 1.4",
        cure="nn.Sequential(nn.Upsample(scale_factor=2, mode='bilinear'), nn.Conv2d(c, c, 3, padding=1),"
        " nn.BatchNorm2d(c)); a transposed convolution with nn.init.kaiming_normal_(layer.weight) and a norm behind it",
    )


def _chains(stages: list[Operation], flow: Flow) -> Iterator[tuple[Operation, Operation]]:
    """First and last of stages that follow each other with no normalisation between."""
    for i, first in enumerate(stages):
        last = first
        for later in stages[i + 1 :]:
            if flow.plain_between(last, later):
                last = later
        if last is not first:
            yield first, last


def _concatenations(flow: Flow) -> Iterator[Finding]:
    joins = [o for o in flow.operations if o.kind == "concat" and o.dim not in (0, None) and len(o.operands) > 1]
    joins = [o for o in joins if not flow.following(o).normalised or not _normalised_next(o, flow)]
    grown = next(((a, b) for a, b in _chains(joins, flow) if _rms(b) > CHAIN_GROWTH * max(1e-30, a.operands[0])), None)
    if grown is not None:
        first, last = grown
        growth = _rms(last) / max(1e-30, first.operands[0])
        yield _concat_finding(
            last,
            f"from {first.told} to {last.told} values grow {growth:.3g} times, with nothing that normalises",
            growth,
        )
        return
    for operation in joins:
        small, large = min(operation.operands), max(operation.operands)
        if small > 0 and large / small > CONCAT_RATIO:
            sizes = ", ".join(f"{size:.3g}" for size in operation.operands)
            yield _concat_finding(
                operation,
                f"{operation.told} joins inputs of unlike size: {sizes} (root mean square)",
                large / small,
            )
            return


def _normalised_next(operation: Operation, flow: Flow) -> bool:
    """True if all that uses it is a normalisation: per channel, it makes sizes equal."""
    consumers = flow.consumers(operation)
    return bool(consumers) and all(near.kind == "norm" for near in consumers)


def _concat_finding(operation: Operation, message: str, measured: float) -> Finding:
    return Finding(
        "concat_growth",
        operation.place,
        message,
        measured=measured,
        threshold=CONCAT_RATIO if "unlike" in message else CHAIN_GROWTH,
        source="own limit: at 30 times the size 99.9 % of the variance is the larger's",
        cure="bring them to one size first: torch.cat([norm_a(a), norm_b(b)], dim=1), with a norm layer for each",
    )


def _residuals(flow: Flow) -> Iterator[Finding]:
    """Growth of the residual stream `x + f(x)` with depth."""
    streams: dict[int, list[Skip]] = {}
    for skip in flow.skips:
        if skip.operation.kind != "sum" or skip.around is None:
            continue
        before = flow.stream_before(skip.around)
        earlier = streams.pop(before.index, []) if before is not None else []
        streams[skip.operation.index] = [*earlier, skip]
    for stream in streams.values():
        start = stream[0].around
        if len(stream) < _LEAST_RESIDUALS or start is None or start.scale is None or start.scale.rms == 0:
            continue
        sizes = [start.scale.rms, *[_rms(skip.operation) for skip in stream]]
        each = median(b / a for a, b in pairwise(sizes) if a > 0)
        growth = sizes[-1] / sizes[0]
        if growth > CHAIN_GROWTH and each > RESIDUAL_GROWTH_EACH:
            last = stream[-1].operation
            yield Finding(
                "residual_growth",
                last.place,
                f"over {len(stream)} residual sums up to {last.told} values grow {growth:.3g} times, {each:.3g} each",
                measured=each,
                threshold=RESIDUAL_GROWTH_EACH,
                source="Zhang et al. 2019 (Fixup): unnormalised branches double the variance per block",
                cure="x = x + self.f(self.norm(x)); or start branches at 0: nn.init.zeros_(block.last.weight)",
            )
            return


def _overwritten(evidence: Evidence) -> Iterator[Finding]:
    cure = "nn.ReLU(inplace=False), or F.relu(x) for F.relu_(x)"
    source = "fact: an in-place operation changes all that shares its memory (PyTorch, Autograd mechanics)"
    for operation, users in evidence.reused_in_place:
        yield Finding(
            "inplace_reuse",
            operation.place,
            f"{operation.told} overwrites the tensor that its module was given, and {users} operations use it after"
            " that: the residual path carries the overwritten values",
            measured=float(users),
            threshold=1.0,
            source=source,
            cure=cure,
        )
    if evidence.backward_failure:
        culprit = next((o for o in reversed(evidence.operations) if o.in_place and o.trained), None)
        yield Finding(
            "inplace_reuse",
            culprit.place if culprit is not None else "",
            f"the backward needs a tensor that was changed in place{f', perhaps by {culprit.told}' if culprit else ''}:"
            f" {evidence.backward_failure.split(';')[0].split(': [')[0]}",
            source=source,
            cure=cure,
            severity="error",
        )


def _rms(operation: Operation) -> float:
    return operation.scale.rms if operation.scale is not None else 0.0
