"""What people hold in place of a plain optimizer: wrappers and containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import toy
from torch import nn


class Wrapper(torch.optim.Optimizer):
    """As accelerate's and torchft's: a subclass of Optimizer that never calls its __init__."""

    def __init__(self, inner: torch.optim.Optimizer, name: str) -> None:
        setattr(self, name, inner)
        self._inner = inner

    def step(self, closure: Any = None) -> None:
        self._inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)


class OptimizersContainer(torch.optim.Optimizer):
    """As torchtitan's: an optimizer over all parameters with hooks of its own, that steps those it holds."""

    def __init__(self, model_parts: list[nn.Module], **settings: Any) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), **settings) for part in model_parts]
        super().__init__([p for part in model_parts for p in part.parameters()], settings)

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


def accelerated(model: nn.Module) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(toy.optimizer_for("fused_adamw", model.parameters()))


def forget_accelerate() -> None:
    """What an Accelerator leaves behind in its process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def fabric(model: nn.Module) -> Any:
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricOptimizer

    optimizer = toy.optimizer_for("fused_adamw", model.parameters())
    return _FabricOptimizer(optimizer, SingleDeviceStrategy(device=torch.device("cpu")))


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "accelerate": accelerated,
    "lightning fabric": fabric,
    "torchft": lambda model: Wrapper(toy.optimizer_for("adamw", model.parameters()), "optim"),
    "wrapper in wrapper": lambda model: Wrapper(
        Wrapper(toy.optimizer_for("sgd", model.parameters()), "optim"), "optimizer"
    ),
    "container": lambda model: OptimizersContainer(list(model.children()), lr=1e-3, fused=True),
    "container in wrapper": lambda model: Wrapper(OptimizersContainer(list(model.children()), lr=1e-3), "optim"),
}
