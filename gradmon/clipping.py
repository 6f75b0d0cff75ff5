"""Sees the script's own clip before it changes anything.

Most scripts clip to 1.0 before `optimizer.step()`. A monitor that only looks at step time sees norms of at most 1, and
after a NaN every gradient is NaN: the clip has spread it. All of torch's clips (`clip_grad_norm_`, `clip_grad_value_`,
`clip_grads_with_norm_`, which torchtitan calls) group the gradients through one module global before they write to
them; wrapping that one sees them all, under whatever name and however early a script imported them. The clip itself
runs untouched.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.utils.clip_grad as clip_module
from torch import Tensor

_INNER = "_group_tensors_by_device_and_dtype"
#: The functions that write to gradients, and how often at most each writes to every one of them.
_WRITERS = {"_clip_grads_with_norm_": 1, "clip_grad_value_": 2}


class ClipWatch:
    """Calls `before(gradients, writes)` ahead of every clip, from `start` to `stop`.

    `writes` is how often at most the clip will write to each of them, which autograd's version counter shows.
    """

    def __init__(self, before: Callable[[list[Tensor], int], None]) -> None:
        self._before = before
        self._pid = os.getpid()
        self._original: Callable[..., Any] | None = None
        self._wrapper: Callable[..., Any] | None = None

    def start(self, module: ModuleType = clip_module) -> bool:
        """False if this torch has no such function: clips are then seen only at step time."""
        original = getattr(module, _INNER, None)
        if original is None or not all(hasattr(module, name) for name in _WRITERS):
            return False

        @functools.wraps(original)
        def watched(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            # A traced clip can't be watched, and a forked process is not the rank.
            if not torch.compiler.is_compiling() and self._wrapper is not None and os.getpid() == self._pid:
                writes = _WRITERS.get(sys._getframe(1).f_code.co_name)
                if writes is not None:
                    self._before(list(tensors[0]), writes)
            return original(tensors, *args, **kwargs)

        self._original, self._wrapper = original, watched
        setattr(module, _INNER, watched)
        return True

    def stop(self, module: ModuleType = clip_module) -> None:
        """Put torch's own function back, unless somebody has wrapped ours since (then ours only passes through)."""
        if self._wrapper is not None and getattr(module, _INNER) is self._wrapper:
            setattr(module, _INNER, self._original)
        self._wrapper = None
