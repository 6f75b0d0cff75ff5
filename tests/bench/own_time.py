"""Times gradmon's code from outside, per part and step: wall clock and this thread's processor time, without children.

Each timed call costs about 2 us itself, which is counted to gradmon.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

WAIT = "waiting for the other ranks' rows"
#: Begins the names of the parts that watch data, loss and weights.
WATCHES = "watches: "
#: (module, class or None, function, part). A part's time is without that of the parts called from it.
ENTRY_POINTS = (
    ("gradmon.monitor", "Monitor", "_before_step", "before the step: the rest"),
    ("gradmon.monitor", "Monitor", "_take_previous", "learn from the step before"),
    ("gradmon.measuring", "Measurer", "measure", "measure: the rest (rows, lists)"),
    ("gradmon.stats", None, "measure", "read the gradients"),
    ("gradmon.measuring", "Measurer", "share", "share at step time"),
    ("gradmon.local", "LocalHook", "take_rows", WAIT),
    ("gradmon.actions", None, "judge", "judge"),
    ("gradmon.actions", "OptimizerActions", "before", "carry the verdict out"),
    ("gradmon.monitor", "Monitor", "_after_step", "after the step: the rest"),
    ("gradmon.actions", "OptimizerActions", "after", "put back what was changed"),
    ("gradmon.landing", "Lander", "land", "describe the step"),
    ("gradmon.landing", None, "pack", "pack the step's numbers"),
    ("gradmon.updates", "UpdateSample", "__init__", "sample of the updates"),
    ("gradmon.updates", "UpdateSample", "ratios", "sample of the updates"),
    ("gradmon.monitor", "Monitor", "observe", "observe the loss"),
    ("gradmon.journal", "JournalWriter", "put", "hand the step to the journal"),
    ("gradmon.local", "LocalHook", "forward", "hook: multiply, start the all-reduce (DDP's work)"),
    ("gradmon.local", "LocalHook", "_measure", "hook: this rank's row"),
    ("gradmon.local", "LocalHook", "_share", "hook: start sharing the rows"),
    ("gradmon.backward", "BackwardWatch", "_ended", "end of backward"),
    ("gradmon.diagnose.capture", "Capture", "_before", f"{WATCHES}keep the batch"),
    ("gradmon.data_watch", "BatchWatch", "seen", f"{WATCHES}look at the batch"),
    ("gradmon.data_watch", "BatchWatch", "observe", f"{WATCHES}look at the batch"),
    ("gradmon.weight_watch", "MomentSample", "norms", f"{WATCHES}moments"),
    ("gradmon.guard", "Guard", "watch_losses", f"{WATCHES}the losses"),
    ("gradmon.watches", "Watches", "learn", f"{WATCHES}the rest"),
    ("gradmon.watches", "Watches", "end_step", f"{WATCHES}the rest"),
)
#: Makes the hooks that run at sentinels of backward.
_MAKER = ("gradmon.backward", "BackwardWatch", "_hook_of", "sentinels in backward")
_WRITER = ("gradmon.journal", "JournalWriter", "_write_batch")

Part = dict[str, tuple[float, float]]


class OwnTime:
    """Wraps the entry points for the life of the process; counts only while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.steps: list[Part] = []
        """For each step (wall, processor) seconds by part."""
        self.puts: list[float] = []
        self.writer_seconds = 0.0
        """Processor time of the journal's own thread, counted at all times."""
        self.missing: list[str] = []
        """Entry points that gradmon no longer has: what they did is not counted."""
        self._now: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._stacks = threading.local()
        for module, owner, name, part in ENTRY_POINTS:
            self._wrap(module, owner, name, lambda original, part=part: self._timed(original, part))
        *maker, part = _MAKER
        self._wrap(*maker, lambda original: lambda *args: self._timed(original(*args), part))
        self._wrap(*_WRITER, self._writer)

    def end_step(self) -> None:
        """What was counted since is one step's."""
        self.steps.append({part: (wall, cpu) for part, (wall, cpu) in self._now.items()})
        self._now.clear()

    def _wrap(self, module: str, owner: str | None, name: str, wrap: Callable[[Any], Any]) -> None:
        try:
            holder = importlib.import_module(module)
            holder = holder if owner is None else getattr(holder, owner)
            original = getattr(holder, name)
        except (ImportError, AttributeError):
            self.missing.append(".".join(filter(None, (module, owner, name))))
            print(f"not timed, no longer there: {self.missing[-1]}", file=sys.stderr)
            return
        wrapped = functools.wraps(original)(wrap(original))
        holders = [holder]
        if owner is None:  # a function that other modules of gradmon have imported by name
            holders = [m for key, m in sys.modules.items() if key.startswith("gradmon") and hasattr(m, name)]
        for each in holders:
            if vars(each)[name] is original:
                setattr(each, name, wrapped)

    def _timed(self, original: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return original(*args, **kwargs)
            stack = self._stacks.__dict__.setdefault("open", [])
            inside = [0.0, 0.0]
            stack.append(inside)
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
                stack.pop()
                if stack:
                    stack[-1][0] += wall
                    stack[-1][1] += cpu
                counted = self._now[part]
                counted[0] += wall - inside[0]
                counted[1] += cpu - inside[1]
                if original.__name__ == "put":
                    self.puts.append(wall)

        return timed

    def _writer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.writer_seconds += time.thread_time() - started

        return timed
