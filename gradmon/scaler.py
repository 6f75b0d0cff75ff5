"""Sees the script's GradScaler: the scale that local gradients carry, and the steps it leaves out.

When a GradScaler finds Inf, a non-fused optimizer's `step()` is never called and no hook fires; after `unscale_`
nothing shows the scale any more. So `GradScaler.step` is wrapped while gradmon is attached. It still does what it did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from gradmon.topology import parameters_of


class ScalerWatch:
    """From `start` to `stop` knows which scaler is stepping which optimizer.

    Args:
        ours: whether an optimizer is watched.
        left_out: called after a step that the scaler left out, while `scale_of` still answers.
    """

    def __init__(self, ours: Callable[[Optimizer], bool], left_out: Callable[[Optimizer], None]) -> None:
        self._ours = ours
        self._left_out = left_out
        self._original: Any = None
        self._wrapper: Any = None
        self._scaler: GradScaler | None = None
        self._scale: Tensor | None = None
        self._stepping: Optimizer | None = None
        self._came = False

    def scale_of(self, optimizer: Optimizer) -> Tensor | None:
        """The loss scale, if a scaler is stepping this optimizer now; 0-dim or of one element, on its device."""
        return self._scale if optimizer is self._stepping else None

    def scale_left(self, optimizer: Optimizer, all_of_them: Iterable[Optimizer]) -> tuple[Tensor | None, set[int]]:
        """What the gradients must still be divided by, and the ids of the parameters whose gradients carry it.

        A GradScaler leaves the unscaling to a fused optimizer, and unscales others one after the other, each at its own
        step. The factor is None where nothing is scaled; local gradients carried it in any case.
        """
        if self._scaler is None or optimizer is not self._stepping:  # another scaler, that only speaks to the kernel
            return getattr(optimizer, "grad_scale", None), set(map(id, parameters_of(optimizer)))
        states = self._scaler._per_optimizer_states
        scaled = [o for o in all_of_them if states.get(id(o), {}).get("stage", OptState.READY) is OptState.READY]
        return self._scale, {id(p) for o in scaled for p in parameters_of(o)}

    def came(self, optimizer: Optimizer) -> None:
        """The optimizer's own step has been called."""
        if optimizer is self._stepping:
            self._came = True

    def start(self) -> None:
        """Begin to listen."""
        original = self._original = GradScaler.step

        @functools.wraps(original)
        def watched(scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._wrapper is None or not scaler.is_enabled() or not self._ours(optimizer):
                return original(scaler, optimizer, *args, **kwargs)
            self._scaler, self._stepping, self._scale, self._came = scaler, optimizer, scaler._scale, False
            try:
                result = original(scaler, optimizer, *args, **kwargs)
                if not self._came:
                    self._left_out(optimizer)
                return result
            finally:
                self._scaler = self._stepping = self._scale = None

        self._wrapper = watched
        GradScaler.step = watched  # type: ignore[method-assign, assignment]

    def stop(self) -> None:
        """Put torch's own method back, unless somebody has wrapped ours since (then ours only passes through)."""
        if self._wrapper is not None and GradScaler.step is self._wrapper:
            GradScaler.step = self._original  # type: ignore[method-assign]
        self._wrapper = None
