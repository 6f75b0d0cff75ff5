"""The only writer to optimizers and gradients: skips a step, scales gradients down, scales the learning rate.

Two ways to the same result:

- *general*, for every optimizer: the verdict is read on the host (one synchronisation), gradients are held aside as
  `p.grad = None` so that `step()` does nothing, and put back afterwards with the groups' other entries. Zeroed
  gradients would not be a skip: Adam moves on its moments, weight decay still decays, and 0 * NaN is NaN.
- *fused*, for fused Adam and AdamW: the verdict never leaves the device. `optimizer.found_inf` skips inside the kernel
  and gives the step count back; `optimizer.grad_scale` divides the gradients while the kernel reads them. Both are how
  `torch.amp.GradScaler` talks to fused optimizers; where it does so too, its values are combined with ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, AdamW, Optimizer

from gradmon import stats
from gradmon.detector import Limits
from gradmon.record import Action, StepReason

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement over one step; 0-dim float64 tensors on the gradients' device, equal on all ranks."""

    norm: Tensor
    """Global, unscaled, before any clipping."""
    left: Tensor
    """What the script's own clip has left of it."""
    divisor: Tensor
    """Gradients are to be divided by this; exactly 1 for a step that is left alone."""
    skip: Tensor
    """1 or 0."""


def judge(norm: Tensor, left: Tensor, limits: Limits, ok: Tensor | None = None) -> Verdict:
    """Judge a step on the device, against the step's own norm, without waiting for it.

    Args:
        norm: global norm before any clipping, float64, 0-dim.
        left: norm of what the script's own clip has left (`norm` where it has none).
        limits: from the detector, computed from earlier steps.
        ok: 0-dim, False if this step is to be left alone after all, as only the device knows yet; None: True.

    `name_verdict` says in words what this has decided.
    """
    # full_like, not torch.tensor(x, device=...): the latter is a synchronous copy on CUDA
    max_norm = torch.full_like(norm, limits.max_norm)
    target = torch.where(norm > limits.spike_above, min(limits.rescale_to, limits.max_norm), max_norm)
    divisor = torch.where(left > target, left / target, 1.0)
    whole = norm.isfinite().logical_and_(left.isfinite())  # a clip by an overflowed norm leaves NaN behind
    skip = whole.logical_not_()
    if math.isfinite(limits.skip_above):
        skip = skip.logical_or_(norm > limits.skip_above)
        divisor = torch.where(skip, 1.0, divisor)
    if ok is not None:
        divisor, skip = torch.where(ok, divisor, 1.0), skip.logical_and_(ok)
    return Verdict(norm, left, divisor, skip.double())


def thrown_away(norm: Tensor) -> Verdict:
    """The verdict over gradients of weights that have just been replaced: skip, whatever they are."""
    return Verdict(norm, norm, torch.ones_like(norm), torch.ones_like(norm))


def unjudged(norm: Tensor) -> Verdict:
    """The verdict over gradients that differ between ranks, or are not there yet: leave them alone."""
    return Verdict(norm, norm, torch.ones_like(norm), torch.zeros_like(norm))


def name_verdict(norm: float, left: float, divisor: float, limits: Limits) -> tuple[Action, StepReason, float]:
    """What `judge` decided, from its numbers on the host: action, reason, and the norm the optimizer got.

    The comparisons are those of `judge`, in the same precision. NaN compares false with everything, so it comes first.
    """
    if not (math.isfinite(norm) and math.isfinite(left)):
        return "skip", "nonfinite", 0.0
    reason: StepReason = "healthy"
    if norm > limits.skip_above:
        return "skip", "spike", 0.0
    if norm > limits.spike_above:
        reason = "spike"
    elif left > limits.max_norm:
        reason = "max_norm"
    return ("none" if divisor == 1.0 else "rescale"), reason, left / divisor


class OptimizerActions:
    """What may be done to one optimizer in one step, and undone after it.

    `before` and `after` enclose `optimizer.step()`. A step that raises never reaches `after`: the next `before`, and
    `restore` by whoever reads the optimizer's state, put things back.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._entries: list[dict[str, Any]] = []
        self._states: list[tuple[Tensor, dict[str, Any]]] = []
        self._rates: list[tuple[dict[str, Any], float | Tensor, float | Tensor]] = []
        self._attributes: dict[str, Any] = {}

    def before(self, verdict: Verdict | None, learning_rate_scale: float) -> None:
        """Carry out `verdict` (None: leave the gradients alone) and scale the learning rate for the step to come."""
        self.restore()
        if verdict is not None:
            if takes_device_verdict(self.optimizer):
                self._offer(verdict)
            else:
                self._carry_out(verdict)
        if learning_rate_scale != 1.0:
            self._scale_rate(learning_rate_scale)

    def after(self) -> None:
        """Undo everything that was for this step only."""
        self.restore()

    def restore(self) -> None:
        """Put back gradients, group entries, learning rates and attributes that are still as this step left them.

        What the script has changed since is its own: a new gradient, another rate.
        """
        while self._rates:
            group, rate, ours = self._rates.pop()
            if isinstance(rate, Tensor) and group["lr"] is ours:
                ours.copy_(rate)
            elif group["lr"] is ours:
                group["lr"] = rate
        while self._aside:
            parameter, gradient = self._aside.pop()
            if parameter.grad is None:
                parameter.grad = gradient
        entries, self._entries = self._entries, []
        for group, kept in zip(self.optimizer.param_groups, entries, strict=False):
            group.update(kept)
        while self._states:
            parameter, kept = self._states.pop()
            self.optimizer.state[parameter].update(kept)
        attributes, self._attributes = self._attributes, {}
        for name, value in attributes.items():
            if value is _MISSING:
                vars(self.optimizer).pop(name, None)  # GradScaler may have deleted it already
            else:
                setattr(self.optimizer, name, value)

    def _offer(self, verdict: Verdict) -> None:
        """Let the fused kernel skip and divide. found_inf must be exactly 1 or 0, so two are joined by maximum."""
        offered: dict[str, Tensor] = {}
        # On CPU a look is free, and a grad_scale of 1 is not: the kernel writes all gradients back.
        looks = stats.reads_are_free(verdict.norm.device)
        if not (looks and float(verdict.skip) == 0.0):
            found = verdict.skip.float()
            theirs = getattr(self.optimizer, "found_inf", None)
            offered["found_inf"] = found if theirs is None else torch.maximum(found, theirs.to(found))
        if not (looks and float(verdict.divisor) == 1.0):
            divisor = verdict.divisor.float()
            scale = getattr(self.optimizer, "grad_scale", None)
            offered["grad_scale"] = divisor if scale is None else divisor * scale.to(divisor)
        for name, value in offered.items():
            self._attributes[name] = getattr(self.optimizer, name, _MISSING)
            setattr(self.optimizer, name, value.reshape(()))

    def _carry_out(self, verdict: Verdict) -> None:
        # sync: the general way needs the verdict on the host, once per step and optimizer
        skip, divisor = torch.stack((verdict.skip, verdict.divisor)).tolist()
        if skip:
            self._hold_aside()
        elif divisor != 1.0:
            # A sparse gradient is scaled as it lies: coalescing would scale a copy.
            values = [g if g.layout == torch.strided else g._values() for g in self._gradients()]
            torch._foreach_mul_([v.to_local() if hasattr(v, "to_local") else v for v in values], 1.0 / divisor)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _hold_aside(self) -> None:
        if evaluates_repeatedly(self.optimizer):  # it counts evaluations, also those that end its step at once
            self._states = [(p, dict(state)) for p, state in self.optimizer.state.items()]
        for group in self.optimizer.param_groups:
            # Schedule-free optimizers count steps in their groups.
            self._entries.append({name: value for name, value in group.items() if name != "params"})
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._aside.append((parameter, parameter.grad))
                    parameter.grad = None

    def _scale_rate(self, scale: float) -> None:
        for group in self.optimizer.param_groups:
            rate = group.get("lr")
            if rate is None:  # an optimizer that finds its own rate
                continue
            if not isinstance(rate, Tensor):
                group["lr"] = rate * scale
                self._rates.append((group, rate, group["lr"]))
            elif not any(ours is rate for _, _, ours in self._rates):  # groups may share one tensor
                # capturable and compiled steps hold on to the tensor: change it in place
                self._rates.append((group, rate.clone(), rate))
                rate.mul_(scale)


def takes_device_verdict(optimizer: Optimizer) -> bool:
    """True for Adam and AdamW whose groups are all fused now (a loaded checkpoint can change that) on one device."""
    if not isinstance(optimizer, (Adam, AdamW)) or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    groups = optimizer.param_groups
    devices = {p.device for group in groups for p in group["params"]}
    return len(devices) == 1 and all(group.get("fused") for group in groups)


def evaluates_repeatedly(optimizer: Optimizer) -> bool:
    """True for LBFGS, which calls its closure several times in a step and compares the gradients."""
    return isinstance(optimizer, LBFGS)


def learning_rate(optimizer: Optimizer) -> float | Tensor:
    """The first group's rate; a tensor where it is one, so that nobody waits for it; NaN where it has none."""
    rate: float | Tensor | None = optimizer.param_groups[0].get("lr")
    return math.nan if rate is None else rate
