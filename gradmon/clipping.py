"""Sees the script's own `clip_grad_norm_` before it changes anything.

Most scripts clip to 1.0 before `optimizer.step()`. A monitor that only looks at step time sees norms of at most 1, and
after a NaN every gradient is NaN: the clip has spread it. `torch.nn.utils.clip_grad_norm_` calls
`_clip_grads_with_norm_` through a module global; wrapping that one sees attribute calls and names imported early alike.
The script's clip itself runs untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
import torch.nn.utils.clip_grad as clip_module
from torch import Tensor

_INNER = "_clip_grads_with_norm_"


class ClipWatch:
    """Calls `before(parameters)` ahead of every clip and `after(parameters)` behind it, from `start` to `stop`."""

    def __init__(self, before: Callable[[list[Tensor]], None], after: Callable[[list[Tensor]], None]) -> None:
        self._before = before
        self._after = after
        self._original: Callable[..., Any] | None = None
        self._wrapper: Callable[..., Any] | None = None

    def start(self, module: ModuleType = clip_module) -> bool:
        """False if this torch has no such function: clips are then seen only at step time."""
        original = getattr(module, _INNER, None)
        if original is None:
            return False

        @functools.wraps(original)
        def watched(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._wrapper is None:  # a traced clip can't be watched
                return original(parameters, *args, **kwargs)
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            self._before(listed)
            result = original(listed, *args, **kwargs)
            self._after(listed)
            return result

        self._original, self._wrapper = original, watched
        setattr(module, _INNER, watched)
        return True

    def stop(self, module: ModuleType = clip_module) -> None:
        """Put torch's own function back, unless somebody has wrapped ours since (then ours only passes through)."""
        if self._wrapper is not None and getattr(module, _INNER) is self._wrapper:
            setattr(module, _INNER, self._original)
        self._wrapper = None
