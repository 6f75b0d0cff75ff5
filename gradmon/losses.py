"""Losses as scripts give them: numbers, tensors on any device, DTensors; before their step or after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradmon.landing import HostCopy, LandingStep
from gradmon.rows import Observed

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


def joined(losses: list[Tensor], *, sums: bool) -> Tensor:
    """Mean or sum of plain losses, on the device of the first that is not on the host; nothing is waited for."""
    device = next((loss.device for loss in losses if loss.device.type != "cpu"), losses[0].device)
    # not loss.to(device) for one that lies on the host: such a copy waits
    there = [
        loss if loss.device == device else torch.full((), float(loss), dtype=loss.dtype, device=device)
        for loss in losses
    ]
    return torch.stack(there).sum() if sums else torch.stack(there).mean()


class LossBook:
    """Holds the losses of a step until it is written, and the step until its losses have come.

    Args:
        write: takes a step with its losses; for the journal.
        observed: is told of each loss, to go out with this rank's rows.
    """

    def __init__(self, write: Callable[[LandingStep], None], observed: Observed) -> None:
        self._write = write
        self._observed = observed
        self.sums = False
        """True if the losses of a step are to be added up: those on which backward is called are shares of one."""
        self._losses: list[Tensor] = []
        self._follows: bool | None = None
        """True if the script observes after its step, None until it has observed."""
        self._awaiting: LandingStep | None = None

    def add(self, loss: Tensor, *, stepped: bool, sent: bool) -> None:
        """One more; `stepped`: a step has been made since attach; `sent`: this step's rows are on their way."""
        self._observed.loss = loss
        if self._follows is None:
            self._follows = stepped
        self._observed.late = self._follows or sent
        self._losses = [*self._losses[1 - MOST_LOSSES :], loss]
        if self.sums and len(self._losses) > 1:
            self._observed.loss = joined(self._losses, sums=True)
        if self._follows:
            self.flush()

    def add_validation(self, loss: Tensor) -> None:
        """One of the weights as they are now."""
        self._observed.validation_loss = loss
        self._observed.validations += 1

    def end_step(self, step: LandingStep, *, first: bool) -> None:
        """Write it, or keep it for the loss that is yet to come; `first` is the first since attach."""
        self.flush()
        self._awaiting = step
        if not (self._follows or (self._follows is None and first)):  # a loop that observes after its step does so next
            self.flush()

    def flush(self) -> None:
        """Write the step that waits, if one does, with the losses that are there."""
        step, self._awaiting = self._awaiting, None
        if step is None:
            return
        losses, self._losses = self._losses, []
        try:
            if losses:
                step.loss = HostCopy(joined(losses, sums=self.sums))
        finally:
            self._write(step)

    def forget(self) -> None:
        """The losses that are there are of no step to come."""
        self._losses.clear()
