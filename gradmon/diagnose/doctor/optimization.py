"""The optimizer's settings against this model: trial steps on the batch, from which everything is put back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmon.diagnose.doctor.probe import Evidence, LossFunction
from gradmon.diagnose.doctor.state import own_copy, untouched
from gradmon.diagnose.doctor.vocabulary import ATTENTION, RECURRENT
from gradmon.record import Finding

#: Norm of a step's update over the norm of the weights. About 0.001 is usual (Karpathy, A Recipe for Training Neural
#: Networks; Bottou 2012); Adam's first step is its largest. Told at 0.1 if the loss does not fall either, at 1 always.
UPDATE_RATIO_HIGH = 0.1
UPDATE_RATIO_ABSURD = 1.0
#: At 1e-6 a weight needs a million steps to become another; SageMaker Debugger tells at 1e-8.
UPDATE_RATIO_LOW = 1e-6
#: Loss after the trial steps over the loss before them, on the same batch.
LOSS_GROWTH = 1.5
TRIAL_STEPS = 6
#: Norm of the gradient over the norm of the weights from which on clipping is advised.
CLIPPING_RATIO = 1.0
#: Decay that is worth a word where it also pulls on norms and biases; AdamW's default 0.01 is not.
DECAY_WORTH_TELLING = 0.05
#: Elements that a step in half precision leaves as they were.
LOST_UPDATES = 0.5
#: Learning-rate range test (Smith 2017): from and to, and in how many steps.
RANGE_FROM, RANGE_TO, RANGE_STEPS = 1e-6, 1.0, 48
#: It ends where the loss is so many times the lowest (fast.ai's lr_find).
RANGE_DIVERGED = 4.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What a few steps on one batch did."""

    learning_rate: float
    losses: tuple[float, ...]
    """Before the first step, then after each; it ends with the first that is not finite."""
    update_ratio: float
    """Norm of the first update over the norm of the weights, of weights with two or more dimensions."""
    lost_share: float
    """Elements in half precision with a gradient that the first step did not change."""


def check_optimizer(
    model: nn.Module, batch: Any, loss_fn: LossFunction, optimizer: torch.optim.Optimizer, evidence: Evidence
) -> Iterator[Finding]:
    """All findings about the optimizer; takes trial steps if the first gradients are finite."""
    yield from _epsilon(optimizer)
    yield from _decay(optimizer, model)
    yield from _not_fused(optimizer)
    yield from _clipping(evidence)
    finite = evidence.loss is not None and math.isfinite(evidence.loss) and not evidence.backward_failure
    finite = finite and not any(w.gradient is not None and w.gradient.nonfinite for w in evidence.weights)
    if finite:
        trial = try_steps(model, batch, loss_fn, optimizer)
        if trial is not None:
            yield from _learning_rate(trial)


def try_steps(model: nn.Module, batch: Any, loss_fn: LossFunction, optimizer: torch.optim.Optimizer) -> Trial | None:
    """A few steps on one batch with a copy of the optimizer; None where it needs a closure or has no weights."""
    with untouched(model, weights=True), torch.enable_grad():
        model.train()
        twin = _twin(optimizer)
        weights = [p for g in twin.param_groups for p in g["params"] if p.requires_grad and p.dim() > 1]
        if not weights or isinstance(optimizer, torch.optim.LBFGS):
            return None
        losses = [_backward(model, batch, loss_fn, twin)]
        before = [p.detach().clone() for p in weights]
        twin.step()
        ratio = _ratio(weights, before)
        lost = _lost(weights, before)
        while len(losses) <= TRIAL_STEPS and math.isfinite(losses[-1]):
            losses.append(_backward(model, batch, loss_fn, twin))
            twin.step()
    return Trial(_rate(twin), tuple(losses), ratio, lost)


def range_test(
    model: nn.Module, batch: Any, loss_fn: LossFunction, optimizer: torch.optim.Optimizer
) -> list[tuple[float, float]]:
    """(learning rate, loss) of steps with a rising rate, on one batch (Smith 2017); ends where the loss diverges.

    The loss is the one before the step with that rate. Groups keep their rates' proportions.
    """
    seen: list[tuple[float, float]] = []
    with untouched(model, weights=True), torch.enable_grad():
        model.train()
        twin = _twin(optimizer)
        first = _rate(twin)
        shares = [group["lr"] / first if first > 0 else 1.0 for group in twin.param_groups]
        for step in range(RANGE_STEPS):
            rate = RANGE_FROM * (RANGE_TO / RANGE_FROM) ** (step / (RANGE_STEPS - 1))
            for group, share in zip(twin.param_groups, shares, strict=True):
                group["lr"] = torch.as_tensor(rate * share) if isinstance(group["lr"], Tensor) else rate * share
            loss = _backward(model, batch, loss_fn, twin)
            seen.append((rate, loss))
            if not loss <= RANGE_DIVERGED * max(min(value for _, value in seen), 1e-12):  # not `>`: NaN too
                break
            twin.step()
    return seen


def check_range(seen: Sequence[tuple[float, float]], optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    """What the range test says: the rate where the loss falls fastest, and whether the optimizer's is past the end."""
    smooth = _smoothed([loss for _, loss in seen if math.isfinite(loss)])
    if len(smooth) < 3:
        return
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    falls = [smooth[i] - smooth[i + 1] for i in range(max(1, lowest))] if lowest else [0.0]
    steepest = max(range(len(falls)), key=falls.__getitem__)
    suggested = min(seen[steepest][0], seen[lowest][0] / 10)
    current, limit = _rate(optimizer), seen[lowest][0]
    diverged = len(seen) < RANGE_STEPS or not math.isfinite(seen[-1][1])
    high = diverged and current > limit
    yield Finding(
        "lr_range",
        "learning rate",
        f"the loss falls fastest near {suggested:.1e} and is lowest at {limit:.1e}"
        + (f", it diverges at {seen[-1][0]:.1e}" if diverged else "")
        + f"; the optimizer's rate is {current:.1e}",
        measured=current,
        threshold=limit,
        source="Smith 2017, Cyclical Learning Rates: range test",
        cure=f"{type(optimizer).__name__}(model.parameters(), lr={suggested:.1e}), and watch the loss",
        severity="warning" if high else "info",
    )


def _smoothed(losses: list[float]) -> list[float]:
    """Mean over three neighbours: one batch under dropout jitters."""
    return [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - 1) : i + 2])]


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy with its own state on the same parameters, at the rate that a warm-up leads to; without hooks."""
    parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    twin: torch.optim.Optimizer = copy.deepcopy(optimizer, dict(parameters))
    for group in twin.param_groups:
        peak = group.get("initial_lr", group["lr"])
        group["lr"] = peak if float(peak) > float(group["lr"]) else group["lr"]
    return twin


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


def _backward(model: nn.Module, batch: Any, loss_fn: LossFunction, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = loss_fn(model, own_copy(batch))
    if bool(loss.isfinite()):
        loss.backward()
    return float(loss.detach())


def _ratio(weights: list[Tensor], before: list[Tensor]) -> float:
    moved = sum(float((p.detach() - b).double().square().sum()) for p, b in zip(weights, before, strict=True))
    size = sum(float(b.double().square().sum()) for b in before)
    return math.sqrt(moved / size) if size > 0 else 0.0


def _lost(weights: list[Tensor], before: list[Tensor]) -> float:
    still = reached = 0
    for weight, old in zip(weights, before, strict=True):
        if weight.dtype in (torch.bfloat16, torch.float16) and weight.grad is not None and not weight.grad.is_sparse:
            with_gradient = weight.grad != 0
            reached += int(with_gradient.sum())
            still += int((with_gradient & (weight.detach() == old)).sum())
    return still / reached if reached else 0.0


def _learning_rate(trial: Trial) -> Iterator[Finding]:
    first, last = trial.losses[0], trial.losses[-1]
    blown_up = not last <= LOSS_GROWTH * first if first > 0 else not math.isfinite(last)
    rising = not last <= first
    high = trial.update_ratio > UPDATE_RATIO_ABSURD or (trial.update_ratio > UPDATE_RATIO_HIGH and rising)
    advice = "AdamW and Adam train with 1e-4 to 1e-3, SGD with 1e-2 to 1e-1, after a warm-up"
    told = f"one step at rate {trial.learning_rate:.3g} moves the weights by {trial.update_ratio:.3g} of their size"
    if blown_up or high:
        yield Finding(
            "learning_rate_high",
            "learning rate",
            f"{told}; the loss on the same batch goes from {first:.4g} to {last:.4g} in {len(trial.losses) - 1} steps",
            measured=last / first if blown_up and first > 0 else trial.update_ratio,
            threshold=LOSS_GROWTH if blown_up else UPDATE_RATIO_HIGH,
            source="Karpathy (A Recipe for Training Neural Networks): about 1e-3",
            cure=f"lr={_tenth(trial)}; {advice}; gradmon doctor --lr-range finds one",
            severity="error" if blown_up else "warning",
        )
    elif trial.update_ratio < UPDATE_RATIO_LOW and (trial.update_ratio > 0 or trial.learning_rate == 0):
        lasts = (
            "nothing is learnt"
            if trial.update_ratio == 0
            else f"it would take {1 / trial.update_ratio:.1e} steps to make other weights of them"
        )
        yield Finding(
            "learning_rate_low",
            "learning rate",
            f"{told}: {lasts}",
            measured=trial.update_ratio,
            threshold=UPDATE_RATIO_LOW,
            source="Amazon SageMaker Debugger, WeightUpdateRatio (1e-8), with a margin",
            cure=f"a higher rate: {advice}; gradmon doctor --lr-range finds one",
        )
    if trial.lost_share > LOST_UPDATES:
        yield Finding(
            "lost_updates",
            "optimizer",
            f"{trial.lost_share:.0%} of the elements in half precision stay as they were in a step: it is smaller than"
            " half of their last digit",
            measured=trial.lost_share,
            threshold=LOST_UPDATES,
            source="fact: bfloat16 keeps 8 bits, a change under 0.2 % is rounded away",
            cure="keep the parameters in float32 and run under torch.autocast('cuda', torch.bfloat16)",
        )


def _tenth(trial: Trial) -> str:
    """A rate whose update is about 0.001 of the weights."""
    ratio = trial.update_ratio if math.isfinite(trial.update_ratio) and trial.update_ratio > 0 else 1.0
    return f"{trial.learning_rate * min(0.1, 1e-3 / ratio):.0e}"


def _epsilon(optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    for group in optimizer.param_groups:
        half = next((p for p in group["params"] if p.dtype in (torch.float16, torch.bfloat16)), None)
        eps = group.get("eps")
        if half is None or not isinstance(eps, float):
            continue
        smallest = torch.finfo(half.dtype).tiny
        if eps < smallest:
            yield Finding(
                "epsilon_small",
                "optimizer",
                f"eps={eps:.0e} is under {smallest:.0e}, the smallest normal number of {_dtype(half.dtype)}, in which"
                " the optimizer keeps its moments: it rounds to 0, and 0 / 0 is NaN",
                measured=eps,
                threshold=smallest,
                source="IEEE 754: smallest normal number",
                cure=f"eps=1e-4 for parameters in {_dtype(half.dtype)}; better, float32 and torch.autocast",
            )
            return


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[Finding]:
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay", 0) or 0)
        flat = [names.get(id(p), "?") for p in group["params"] if p.dim() <= 1]
        if decay >= DECAY_WORTH_TELLING and flat and len(flat) < len(group["params"]):
            yield Finding(
                "decay_on_norms",
                flat[0],
                f"weight decay {decay:g} also pulls on {len(flat)} biases and norm scales, as {flat[0]}",
                measured=decay,
                threshold=DECAY_WORTH_TELLING,
                source="usual practice since He et al. 2019, Bag of Tricks (no bias decay)",
                cure="AdamW([{'params': [p for p in model.parameters() if p.dim() > 1], 'weight_decay': "
                f"{decay:g}}}, {{'params': [p for p in model.parameters() if p.dim() <= 1], 'weight_decay': 0.0}}])",
                severity="info",
            )
            return


def _not_fused(optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    on_gpu = all(p.is_cuda and p.is_floating_point() for group in optimizer.param_groups for p in group["params"])
    could = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    if on_gpu and could and not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        yield Finding(
            "not_fused",
            "optimizer",
            f"{type(optimizer).__name__} runs several kernels per step where one would do",
            source="PyTorch, torch.optim: fused",
            cure=f"torch.optim.{type(optimizer).__name__}(..., fused=True)",
            severity="info",
        )


def _clipping(evidence: Evidence) -> Iterator[Finding]:
    gradients = [w for w in evidence.weights if w.gradient is not None]
    norm = math.sqrt(sum(w.gradient.rms**2 * math.prod(w.shape) for w in gradients if w.gradient is not None))
    size = math.sqrt(sum(w.scale.rms**2 * math.prod(w.shape) for w in gradients))
    ratio = norm / size if size > 0 else 0.0
    kinds = {o.name for o in evidence.operations}
    prone = "recurrent" if kinds & RECURRENT else "a transformer" if kinds & ATTENTION else ""
    if ratio > CLIPPING_RATIO or prone:
        why = f"the model is {prone}" if prone else "the gradient is large against the weights"
        yield Finding(
            "clipping_advised",
            "optimizer",
            f"{why}; the first gradient norm is {norm:.3g}, {ratio:.3g} of the weights' norm: clip it, unless you do",
            measured=ratio,
            threshold=CLIPPING_RATIO,
            source="Pascanu et al. 2013",
            cure="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before optimizer.step(); or gradmon.attach",
            severity="info",
        )
