"""The audit leaves no trace: what it may change is kept aside and put back, to the bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, *, weights: bool) -> Iterator[None]:
    """Put back buffers, gradients, training mode, `requires_grad` and all random state at the end.

    Gradients are taken away inside. With `weights`, the parameters are put back too: one copy of the model is kept.
    """
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    required = [p.requires_grad for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, _copy(b)) for m in model.modules() for name, b in m._buffers.items()]
    copies = [p.detach().clone() for p in parameters] if weights else []
    random_state = _random_state()
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=False):
                parameter.copy_(copy)
            for module, name, buffer, kept in buffers:
                module._buffers[name] = buffer
                if buffer is not None and kept is not None:
                    buffer.copy_(kept)
        for parameter, gradient, wanted in zip(parameters, gradients, required, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        _restore_random_state(random_state)


def own_copy(value: Any) -> Any:
    """A batch whose tensors are copies: nothing done in place reaches the caller's. What is no tensor is as it was."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: own_copy(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(own_copy, value))
    if isinstance(value, list | tuple):
        return type(value)(map(own_copy, value))
    if isinstance(value, Mapping) and hasattr(value, "copy"):  # UserDict, as tokenizers give
        copied = value.copy()
        for key, item in value.items():
            copied[key] = own_copy(item)
        return copied
    return value


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if _uses_cuda() else None,
        numpy.random.get_state() if numpy is not None else None,
    )


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _restore_random_state(state: tuple[Any, ...]) -> None:
    python, cpu, cuda, numpy_state = state
    random.setstate(python)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)
