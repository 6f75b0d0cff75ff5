"""Broken trainings that gradmon must explain, and healthy models on which it must stay quiet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Broken:
    """One training with one thing wrong.

    `find` breaks it for real, in a directory of its own, asks the tool, and returns all that the tool said.
    """

    name: str
    wrong: str
    """What is wrong with it, in a few words: for the table in the docs."""
    tool: Literal["doctor", "replay", "watch", "report"]
    names: tuple[str, ...]
    """What must be in the answer: the layer, the operation, the cause."""
    find: Callable[[Path], str]


@dataclass(frozen=True)
class Healthy:
    """A model as people train it. `make` is seeded and returns model, batch and `loss_fn(model, batch)`."""

    name: str
    make: Callable[[], tuple[nn.Module, Any, Callable[[nn.Module, Any], Any]]]
