"""Losses as scripts give them: numbers, tensors on any device, DTensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Losses of one step that are kept; more come where somebody observes without stepping.
MOST_LOSSES = 256


def plain_loss(loss: Tensor | float) -> Tensor | None:
    """As a plain 0-dim float64 tensor; None for a DTensor of which this rank holds a part only.

    Raises:
        ValueError: it has more than one element.
    """
    if not isinstance(loss, Tensor):
        return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
    if loss.numel() != 1:
        raise ValueError(f"loss must hold one element (got shape {tuple(loss.shape)}); pass its mean")
    value: Any = loss
    placements = getattr(loss, "placements", None)
    if placements is not None:
        if not all(placement.is_replicate() for placement in placements):
            return None
        value = value.to_local()
    plain: Tensor = value.detach().reshape(()).to(torch.float64, copy=True)
    return plain


def mean_loss(losses: list[Tensor]) -> Tensor:
    """Of plain losses, on the device of the first that is not on the host; nothing is waited for."""
    device = next((loss.device for loss in losses if loss.device.type != "cpu"), losses[0].device)
    # not loss.to(device) for one that lies on the host: such a copy waits
    there = [
        loss if loss.device == device else torch.full((), float(loss), dtype=loss.dtype, device=device)
        for loss in losses
    ]
    return torch.stack(there).mean()
