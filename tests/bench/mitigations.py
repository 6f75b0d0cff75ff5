"""What is done about faults: nothing, what others have published, gradmon in several settings.

Each is called at the same places of a training loop: it makes the optimizer, sees the gradients before the step, and is
told the loss after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import bytegpt
import published
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


class Nothing:
    """Plain training, and what all others build on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Steps by what was done to them: skipped, clipped, ..."""
        self.norms: list[float] = []
        """Of every step, before anything was done about it."""
        self.events: list[str] = []
        self._parameters: list[nn.Parameter] = []

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer to train with; its learning rate is set in every step."""
        self._parameters = list(parameters)
        return torch.optim.AdamW(self._parameters, fused=True, **ADAMW)

    def start(self, model: nn.Module, optimizer: Optimizer, directory: Path) -> None:
        """Before the first step; `model` is the DDP object where there is one."""

    def before_step(self, loss: Tensor) -> None:
        """The gradients are there."""
        self.norms.append(float(torch.nn.utils.get_total_norm(self._gradients())))

    def after_step(self, loss: Tensor) -> None:
        """The step is made."""

    def finish(self) -> None:
        """After the last step, also where training was stopped: `counts` and `norms` are complete from here on."""

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]


ADAMW: dict[str, Any] = {
    "lr": bytegpt.LEARNING_RATE,
    "betas": bytegpt.BETAS,
    "eps": bytegpt.EPS,
    "weight_decay": bytegpt.WEIGHT_DECAY,
}


class Clip(Nothing):
    """torch's own clip to 1.0, as most scripts have it."""

    def before_step(self, loss: Tensor) -> None:
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, 1.0))
        self.norms.append(norm)
        self.counts["clipped"] += norm > 1.0


class ZClip(Nothing):
    """ZClip as published: the factor multiplies the gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._rule = published.ZClip()

    def before_step(self, loss: Tensor) -> None:
        super().before_step(loss)
        factor = self._rule.judge(self.norms[-1])
        if factor != 1.0:
            torch._foreach_mul_(self._gradients(), factor)
            self.counts["clipped"] += 1


class SkipStepAdamW(Optimizer):
    """AdamW as in OLMo-core: a step factor of 0 or 1 multiplies the update, and so 0 * NaN writes NaN."""

    def __init__(self, parameters: Iterable[nn.Parameter], **defaults: Any) -> None:
        super().__init__(parameters, defaults)
        self.factor = 1.0
        self._steps = 0.0
        (self._group,) = self.param_groups
        self._means = [torch.zeros_like(p) for p in self._group["params"]]
        self._squares = [torch.zeros_like(p) for p in self._group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of every parameter."""
        group, factor = self._group, self.factor
        (beta1, beta2), rate = group["betas"], group["lr"]
        parameters, gradients = group["params"], [p.grad for p in group["params"]]
        torch._foreach_mul_(parameters, 1 - factor * rate * group["weight_decay"])
        torch._foreach_lerp_(self._means, gradients, factor * (1 - beta1))
        torch._foreach_mul_(self._squares, 1 - factor * (1 - beta2))
        squares = torch._foreach_mul(gradients, factor)
        torch._foreach_mul_(squares, gradients)
        torch._foreach_add_(self._squares, squares, alpha=1 - beta2)
        self._steps += factor
        divisors = torch._foreach_sqrt(self._squares)
        torch._foreach_div_(divisors, math.sqrt(1 - beta2**self._steps))
        torch._foreach_add_(divisors, group["eps"])
        updates = torch._foreach_div(self._means, divisors)
        torch._foreach_mul_(updates, -rate / (1 - beta1**self._steps))
        torch._foreach_mul_(updates, factor)
        torch._foreach_add_(parameters, updates)


class SkipStep(Nothing):
    """OLMo-core's SkipStepAdamW as published."""

    def __init__(self) -> None:
        super().__init__()
        self._rule = published.SkipStep()
        self._optimizer: SkipStepAdamW | None = None

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        self._parameters = list(parameters)
        self._optimizer = SkipStepAdamW(self._parameters, **ADAMW)
        return self._optimizer

    def before_step(self, loss: Tensor) -> None:
        super().before_step(loss)
        self._optimizer.factor = self._rule.judge(self.norms[-1], _over_ranks(loss))
        self.counts["skipped"] += self._optimizer.factor == 0


class SkipStepClip(SkipStep):
    """The same with a clip to 1.0, as OLMo's own training scripts combine them; judged before the clip."""

    def before_step(self, loss: Tensor) -> None:
        super().before_step(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.counts["clipped"] += self.norms[-1] > 1.0 and self._optimizer.factor != 0


class Gradmon(Nothing):
    """gradmon, attached as a script would. Norms and counts come from its journal."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = settings

    def start(self, model: nn.Module, optimizer: Optimizer, directory: Path) -> None:
        import gradmon

        config = {"run": "faults", "dir": str(directory), "agent": {"start": "off"}, **self._settings}
        self._monitor = gradmon.attach(model, optimizer, config=config)

    def before_step(self, loss: Tensor) -> None:
        pass

    def after_step(self, loss: Tensor) -> None:
        self._monitor.observe(loss=loss)

    def finish(self) -> None:
        from gradmon.journal import read_journal

        path = self._monitor.journal_path
        self._monitor.detach()
        view = read_journal(path)
        done = {"skip": "skipped", "rescale": "clipped", "leave_out": "left_out"}
        for _, record in view.steps:
            self.norms.append(record.grad_norm)
            if record.applied and record.action in done:
                self.counts[done[record.action]] += 1
        for _, event in view.events:
            self.events.append(f"{event.step}: {event.message}")
            if event.applied and event.action in ("backoff", "rollback", "stop"):
                self.counts[event.action] += 1
        self.counts["errors"] += sum(
            round(value) for (name, _), value in view.counters.items() if name == "gradmon_errors_total"
        )


def _over_ranks(loss: Tensor) -> float:
    """Mean over the ranks, as OLMo-core's trainer reduces it."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return float(loss)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


MITIGATIONS: Mapping[str, tuple[str, Callable[[], Nothing]]] = {
    "none": ("nothing", Nothing),
    "clip": ("clip 1.0", Clip),
    "zclip": ("ZClip", ZClip),
    "skipstep": ("SkipStepAdamW", SkipStep),
    "skipstep_clip": ("SkipStepAdamW, clip 1.0", SkipStepClip),
    "gradmon": ("**gradmon**", Gradmon),
    "rollback": ("**gradmon**, rollback", lambda: Gradmon(rollback={"every_steps": 25})),
    "leave_out": ("**gradmon**, leaving out", lambda: Gradmon(leave_out={"bad_rank": True})),
    "no_stop": ("**gradmon**, never stopping", lambda: Gradmon(stop={"after_skips": 0})),
}
GRADMON = ("gradmon", "rollback", "leave_out", "no_stop")
