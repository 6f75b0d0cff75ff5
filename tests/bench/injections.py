"""What goes wrong in a run, scheduled by step: two runs of a seed meet the same faults at the same places.

Places are shares of the run, so that a shorter run meets the same faults: 0.3 of 500 steps is step 150.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["spike", "noise", "nan_element", "inf_element", "rate", "nan_loss", "not_taken"]
Schedule = Mapping[int, Kind]

SPIKE = 1000.0
"""Factor on the loss: a sample weight in the wrong unit, an unscaled micro-batch."""
RATE = 30.0
"""Factor on the learning rate."""
#: Where single elements break, one place after the other: an early layer, a late one, the head, the input.
BROKEN = ("blocks.0.attention_in.weight", "blocks.1.mlp.2.bias", "head.weight", "token.weight")


@dataclass(frozen=True)
class Injection:
    """One thing that goes wrong, at several places of a run."""

    title: str
    schedule: Callable[[int], Schedule]
    """Steps of a run -> which of them are broken, counted from 1, and how."""
    ranks: int = 1
    """Processes that train together; with more than one, only the last of them meets the fault."""

    @property
    def baseline(self) -> str:
        """The injection that its excess is counted from."""
        return "clean" if self.ranks == 1 else "ddp_clean"


def _at(kind: Kind, shares: Iterable[float], length: int = 1) -> Callable[[int], Schedule]:
    return lambda steps: {round(share * steps) + i: kind for share in shares for i in range(length)}


def _early(steps: int) -> Schedule:
    return {30: "spike", 50: "spike"}


def _fifth(steps: int) -> Schedule:
    dice = random.Random(1)
    return {step: "nan_loss" for step in range(1, steps + 1) if dice.random() < 0.2}


def _dead(steps: int) -> Schedule:
    return dict.fromkeys(range(steps // 2 + 1, steps + 1), "nan_loss")


INJECTIONS: Mapping[str, Injection] = {
    "clean": Injection("nothing", lambda steps: {}),
    "control": Injection("one healthy step not taken: the noise of a pair", _at("not_taken", [0.24])),
    "spikes": Injection("loss x1000 in 4 single steps", _at("spike", [0.3, 0.46, 0.62, 0.78])),
    "corrupted": Injection("random bytes for 3 steps, 3 times", _at("noise", [0.3, 0.5, 0.7], 3)),
    "early": Injection("loss x1000 in steps 30 and 50", _early),
    "nan": Injection("one gradient element NaN in 4 single steps", _at("nan_element", [0.24, 0.4, 0.56, 0.72])),
    "inf": Injection("one gradient element Inf in 4 single steps", _at("inf_element", [0.24, 0.4, 0.56, 0.72])),
    "lr_glitch": Injection("learning rate x30 for 40 steps", _at("rate", [0.5], 40)),
    "ddp_clean": Injection("2 ranks: nothing", lambda steps: {}, ranks=2),
    "rank_nan": Injection("2 ranks: NaN on rank 1 for 3 steps", _at("nan_loss", [0.3], 3), ranks=2),
    "rank_nan_fifth": Injection("2 ranks: NaN on rank 1 in 20 % of the steps", _fifth, ranks=2),
    "rank_dead": Injection("2 ranks: NaN on rank 1 from mid-run on", _dead, ranks=2),
}


def noise(like: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a corrupted batch; the order of the healthy ones is left alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    inputs, targets = torch.randint(256, (2, *like.shape), generator=generator)
    return inputs, targets


def break_element(model: nn.Module, kind: Kind, place: int) -> None:
    """Make one element of one gradient NaN or Inf.

    Args:
        model: after backward.
        kind: `nan_element` or `inf_element`.
        place: which of `BROKEN`.
    """
    gradient = model.get_parameter(BROKEN[place % len(BROKEN)]).grad
    if gradient is None:
        raise RuntimeError("no gradient to break: call this after backward")
    gradient.view(-1)[gradient.numel() // 3] = float("nan" if kind == "nan_element" else "inf")
