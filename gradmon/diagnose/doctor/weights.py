"""Parameters and their first gradients: initialisation, profile over the depth, sharing, depth itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from gradmon.diagnose.doctor.activations import SAGEMAKER
from gradmon.diagnose.doctor.flow import Flow, Follower
from gradmon.diagnose.doctor.probe import FIRST_LOSS_SCALE, Evidence, Weight
from gradmon.diagnose.doctor.trace import Operation
from gradmon.diagnose.doctor.vocabulary import RECTIFIERS, RECURRENT
from gradmon.record import Finding

#: Standard deviation over what He or Glorot give. PyTorch's own initialisation is at 0.4 of He's; in 5 layers that are
#: 5 times too large, values grow 3,000 times.
INIT_FACTOR = 5.0
#: Mean of |gradient| (SageMaker Debugger, VanishingGradient).
VANISHING_MEAN = 1e-7
#: First layers' gradients over the last layers'. Sound initialisation keeps them near 1 (Glorot & Bengio 2010); ten
#: sigmoids with PyTorch's initialisation make 1e-7.
PROFILE_RATIO = 1e-3
#: Norm of a parameter's gradient over the norm of the parameter: a step at rate 0.01 would turn it over.
EXPLODING_RATIO = 1e3
#: Layers with weights in a row that neither normalisation nor a residual path interrupts (He et al. 2015: plain
#: networks degrade from there on).
MOST_PLAIN_LAYERS = 10
#: Gradient over weight of a shared parameter: a step at rate 0.1 would replace it.
SHARED_TURNOVER = 10.0
#: Uses of one untied parameter from which on its gradient is compared (two inputs, or a GAN's real and fake, are not
#: meant), and from which on they are worth a word anyway.
FEW_USES, MANY_USES = 4, 16
#: Gradient elements lost to fp16 (Micikevicius et al. 2018, figure 2: 5 % of the values lay below its range).
UNDERFLOW_SHARE = 0.05
_LEAST_PROFILE = 4


def check_weights(evidence: Evidence, flow: Flow) -> Iterator[Finding]:
    """All findings about parameters."""
    yield from _initialisation(evidence, flow)
    if evidence.loss is not None and math.isfinite(evidence.loss) and not evidence.backward_failure:
        yield from _nonfinite(evidence)
        yield from _without_gradient(evidence)
        yield from _profile(evidence, flow)
        yield from _shared(evidence)
        yield from _underflow(evidence)
    yield from _depth(flow)


def _initialisation(evidence: Evidence, flow: Flow) -> Iterator[Finding]:
    weights = {weight.name: weight for weight in evidence.weights}
    told: set[str] = set()
    for operation in flow.operations:
        named = [name for name in operation.parameters if name in weights and len(weights[name].shape) > 1]
        if not operation.weighted or operation.name in RECURRENT or len(named) != 1:
            continue
        weight = weights[named[0]]
        if "embedding" in operation.name or weight.name in told or not weight.trained or flow.reshaped(operation):
            continue
        told.add(weight.name)
        finding = _judged(weight, operation, flow)
        if finding is not None:
            yield finding


def _judged(weight: Weight, operation: Operation, flow: Flow) -> Finding | None:
    """Its standard deviation against the one that goes with what follows."""
    follower = flow.following(operation)
    expected, rule, init = _expected(weight, operation, follower)
    std = weight.scale.rms  # about 0: a weight that is all the same is as bad as one that is too large
    ratio = std / expected
    harmless_small = follower.normalised or follower.last or flow.bypassed(operation)
    rescaled = flow.rescaled(operation)
    if weight.scale.std < 1e-6 * max(std, 1e-30) and not harmless_small and weight.shape[0] > 1:
        return Finding(
            "bad_init",
            weight.name,
            f"all elements of {weight.name} are {weight.scale.mean:.3g}: its units can never differ",
            measured=weight.scale.std,
            threshold=0.0,
            source="fact: equal units get equal gradients",
            cure=init,
            severity="error",
        )
    too_large = ratio > INIT_FACTOR and not follower.normalised and not rescaled
    too_small = ratio < 1 / INIT_FACTOR and not harmless_small and not rescaled and not flow.renormalised(operation)
    if not too_large and not too_small:
        return None
    if too_large and len(weight.names) > 1:
        return _tied_too_large(weight, std, expected)
    behind = follower.activation.name if follower.activation is not None else "no activation"
    return Finding(
        "bad_init",
        weight.name,
        f"{weight.name} has standard deviation {std:.3g}, {ratio:.3g} times the {expected:.3g} that goes with {behind}"
        " behind it: values " + ("explode" if too_large else "fade") + " from layer to layer",
        measured=ratio,
        threshold=INIT_FACTOR if too_large else 1 / INIT_FACTOR,
        source=rule,
        cure=init,
    )


def _tied_too_large(weight: Weight, std: float, expected: float) -> Finding:
    known_as = " = ".join(weight.names)
    return Finding(
        "shared_weight",
        weight.name,
        f"{known_as} has standard deviation {std:.3g}, as embeddings have; a layer"
        f" takes {expected:.3g}: what it puts out is {std / expected:.3g} times too large",
        measured=std / expected,
        threshold=INIT_FACTOR,
        source="Press & Wolf 2017; GPT-2 starts tied embeddings at 0.02",
        cure=f"nn.init.normal_(model.get_parameter({weight.name!r}), std=0.02); or scale the shared weight where it is"
        " a layer: F.linear(x, weight * width**-0.5); or detach it there: F.linear(x, weight.detach())",
    )


def _expected(weight: Weight, operation: Operation, follower: Follower) -> tuple[float, str, str]:
    """Standard deviation that keeps the variance, the paper, and the code that sets it."""
    fan_in, fan_out = _fans(weight.shape, transposed=operation.name.startswith("conv_transpose"))
    name = follower.activation.name if follower.activation is not None else ""
    target = f"model.get_parameter({weight.name!r})"
    if name in RECTIFIERS:
        cure = f"nn.init.kaiming_normal_({target}, nonlinearity='relu')"
        return math.sqrt(2 / fan_in), "He et al. 2015: sqrt(2 / fan_in)", cure
    if name == "selu":
        cure = f"nn.init.kaiming_normal_({target}, nonlinearity='linear')"
        return math.sqrt(1 / fan_in), "Klambauer et al. 2017: sqrt(1 / fan_in)", cure
    cure = f"nn.init.xavier_uniform_({target})"
    return math.sqrt(2 / (fan_in + fan_out)), "Glorot & Bengio 2010: sqrt(2 / (fan_in + fan_out))", cure


def _fans(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    """(fan in, fan out); a transposed convolution's weight has its inputs in front."""
    field = math.prod(shape[2:])
    outer, inner = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return max(1, inner * field), max(1, outer * field)


def _nonfinite(evidence: Evidence) -> Iterator[Finding]:
    bad = [w for w in evidence.weights if w.gradient is not None and w.gradient.nonfinite]
    if bad:
        worst = bad[-1]  # the last in the model's order is the first in the backward's
        yield Finding(
            "nonfinite_gradient",
            worst.name,
            f"{len(bad)} of {len(evidence.weights)} gradients hold NaN or Inf in the first backward; the first to break"
            f" is {worst.name}'s, while the loss is {evidence.loss:.3g}",
            measured=float(len(bad)),
            threshold=0.0,
            source=f"{SAGEMAKER}, ExplodingTensor",
            cure="keep roots, quotients and logarithms off 0: (x + 1e-12).sqrt(), x / y.clamp_min(1e-6);"
            " see torch.autograd.detect_anomaly()",
            severity="error",
        )


def _without_gradient(evidence: Evidence) -> Iterator[Finding]:
    lost = [w.name for w in evidence.weights if w.trained and w.gradient is None]
    if lost:
        yield Finding(
            "no_gradient",
            lost[0],
            f"{len(lost)} parameters get no gradient: {_listed(lost)}; they won't learn, and DDP waits for them",
            measured=float(len(lost)),
            threshold=0.0,
            source="fact: no path leads from the loss to them",
            cure="use them in forward, without .detach() or torch.no_grad(); or parameter.requires_grad_(False)",
        )
    reached = [w.gradient.abs_max for w in evidence.weights if w.gradient is not None]
    if reached and max(reached) == 0:
        yield Finding(
            "zero_gradient",
            "all parameters",
            f"all {len(reached)} gradients are exactly 0: nothing can learn",
            measured=float(len(reached)),
            threshold=0.0,
            source=f"{SAGEMAKER}, AllZero",
            cure="of two factors one may start at 0, not both (LoRA: A random, B zero); look for dead rectifiers and"
            " masks of zeros",
            severity="error",
        )
        return
    if any(w.scale.rms == 0 and len(w.shape) > 1 for w in evidence.weights):
        return  # a branch that starts at 0 (LoRA, zero-initialised residuals) passes nothing back in the first step
    zero = [w.name for w in evidence.weights if w.gradient is not None and len(w.shape) > 1 and w.gradient.abs_max == 0]
    if zero:
        yield Finding(
            "zero_gradient",
            zero[0],
            f"the gradients of {len(zero)} weights are exactly 0: {_listed(zero)}",
            measured=float(len(zero)),
            threshold=0.0,
            source=f"{SAGEMAKER}, AllZero",
            cure="look for dead rectifiers, masks of zeros and saturated outputs between them and the loss",
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _profile(evidence: Evidence, flow: Flow) -> Iterator[Finding]:
    """Gradients in the order in which their weights are used."""
    by_name = {w.name: w for w in evidence.weights}
    # Inside a residual branch gradients may be small: the path around it carries them on.
    plain = [o for o in flow.operations if o.weighted and o.from_data and not flow.bypassed(o)]
    used = dict.fromkeys(name for o in plain for name in o.parameters)
    layers = [by_name[name] for name in used if name in by_name and len(by_name[name].shape) > 1]
    layers = [w for w in layers if w.gradient is not None and 0 < w.gradient_mean_abs < math.inf]
    exploding = max(layers, key=_turnover, default=None)
    if exploding is not None and _turnover(exploding) > EXPLODING_RATIO:
        yield Finding(
            "exploding_gradient",
            exploding.name,
            f"the gradient of {exploding.name} is {_turnover(exploding):.3g} times as large as the weight itself",
            measured=_turnover(exploding),
            threshold=EXPLODING_RATIO,
            source="own limit: a step at rate 0.001 would replace the weight",
            cure="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before optimizer.step(); a smaller"
            " initialisation, normalisation, targets of mean 0 and variance 1, or the mean instead of the sum as loss",
        )
    ratio = _first_over_last(layers)
    faint = [w for w in layers if w.gradient_mean_abs < VANISHING_MEAN]
    if faint or ratio < PROFILE_RATIO:
        where = min(faint or layers, key=lambda w: w.gradient_mean_abs)
        yield Finding(
            "vanishing_gradient",
            where.name,
            f"the gradient of {where.name} is {where.gradient_mean_abs:.3g} in the mean of |g|, against"
            f" {layers[-1].gradient_mean_abs:.3g} at {layers[-1].name}: the first layers hardly learn",
            measured=where.gradient_mean_abs if faint else ratio,
            threshold=VANISHING_MEAN if faint else PROFILE_RATIO,
            source=f"{SAGEMAKER}, VanishingGradient (1e-7)" if faint else "Glorot & Bengio 2010: ratio near 1",
            cure="nn.ReLU() or nn.GELU() for nn.Sigmoid() in hidden layers, residual paths x + f(x),"
            " nn.BatchNorm or nn.LayerNorm, fewer layers",
        )


def _turnover(weight: Weight) -> float:
    gradient = weight.gradient.rms if weight.gradient is not None else 0.0
    return gradient / weight.scale.rms if weight.scale.rms > 0 else 0.0


def _first_over_last(layers: list[Weight]) -> float:
    """Of the gradients of the first and the last quarter; 1 where there are too few."""
    if len(layers) < _LEAST_PROFILE:
        return 1.0
    quarter = max(1, len(layers) // 4)
    first = median(w.gradient_mean_abs for w in layers[:quarter])
    return first / median(w.gradient_mean_abs for w in layers[-quarter:])


def _shared(evidence: Evidence) -> Iterator[Finding]:
    others = [_turnover(w) for w in evidence.weights if w.uses == 1 and len(w.shape) > 1 and w.scale.rms > 0]
    usual = median(others) if others else 0.0
    often = max((w for w in evidence.weights if w.uses >= MANY_USES and len(w.shape) > 1), key=_uses, default=None)
    for weight in evidence.weights:
        tied = len(weight.names) > 1
        if weight.uses < (2 if tied else FEW_USES) or len(weight.shape) < 2 or weight.gradient is None:
            continue
        turnover = _turnover(weight)
        known_as = " = ".join(weight.names)
        message = (
            f"{known_as} is used {weight.uses} times in a forward, and its gradient is the sum of them,"
            f" accumulated {weight.accumulations} time{'' if weight.accumulations == 1 else 's'} per backward"
        )
        if turnover > SHARED_TURNOVER:
            yield Finding(
                "shared_weight",
                weight.name,
                f"{message}: it is {turnover:.3g} times as large as the weight, others {usual:.3g} times",
                measured=turnover,
                threshold=SHARED_TURNOVER,
                source="own limit: gradients of all uses add up (Press & Wolf 2017 tie with small embeddings)",
                cure=f"scale it where it is used again: F.linear(x, weight / {weight.uses}), or keep one use out of the"
                " gradient: F.linear(x, weight.detach()); tied embeddings start at std=0.02",
            )
        elif tied or weight is often:  # of a loop over time one is enough
            yield Finding(
                "shared_weight",
                weight.name,
                message,
                measured=float(weight.uses),
                threshold=1.0,
                source="fact: gradients of all uses add up",
                cure="nothing, if meant; a weight used often takes a lower rate or F.linear(x, weight / uses)",
                severity="info",
            )


def _uses(weight: Weight) -> int:
    return weight.uses


def _underflow(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.half_without_scale:
        return
    lossy = [w for w in evidence.weights if len(w.shape) > 1]
    worst = max(lossy, key=lambda w: w.underflow_share, default=None)
    if worst is None:
        return
    lost = sum(w.underflow_share > UNDERFLOW_SHARE for w in lossy)
    yield Finding(
        "fp16_without_scaler",
        worst.name,
        f"the forward runs in fp16 and the loss is not scaled: {worst.underflow_share:.0%} of the gradient of"
        f" {worst.name} rounds to 0, which scaling by {FIRST_LOSS_SCALE:.0f} keeps; so in {lost} weights",
        measured=worst.underflow_share,
        threshold=UNDERFLOW_SHARE,
        source="Micikevicius et al. 2018, Mixed Precision Training: 5 % of values lost cost accuracy",
        cure="scaler = torch.amp.GradScaler(); scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update();"
        " or bfloat16. Where a scaler is in use, tell the doctor its factor: loss_scale=65536",
        severity="warning" if lost else "info",
    )


def _depth(flow: Flow) -> Iterator[Finding]:
    chain = flow.deepest_plain_chain()
    if len(chain) > MOST_PLAIN_LAYERS:
        yield Finding(
            "deep_plain_chain",
            chain[0].place,
            f"{len(chain)} layers in a row, {chain[0].place} to {chain[-1].place}, without normalisation or a residual"
            " path",
            measured=float(len(chain)),
            threshold=float(MOST_PLAIN_LAYERS),
            source="He et al. 2015 (Deep Residual Learning): plain networks get worse with depth",
            cure="x = x + layer(norm(x)) in place of x = layer(x); nn.LayerNorm or nn.BatchNorm behind each layer;"
            " fewer layers",
        )
