"""What happens in backward outside of communication hooks: how often it ran in a step, and which run broke first.

With gradient accumulation a NaN of the second micro-step is still there at the fourth. `BackwardWatch` sees the end of
every backward and measures what has come together so far, so that the micro-step can be named; it is also where local
statistics come from beside a DDP communication hook that is not ours.

The end of backward is a callback of autograd's engine, queued by a `register_post_accumulate_grad_hook` of whatever
watched parameter gets its gradient first. DDP queues its own callback, which copies averaged gradients back, after
that: in ours gradients are still this rank's own. (With `gradient_as_bucket_view` they may be overwritten by then:
there each is measured as it arrives.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable, graph

from gradmon import stats
from gradmon.rows import ROW_MICRO_STEP, ROW_PARAMETER, first_broken, rank_row

#: So many parameters, evenly spread, are enough to notice that backward runs.
_SENTINELS = 8


class BackwardWatch:
    """Counts the backwards since the last step, and measures those that are asked for.

    Args:
        parameters: the watched ones, in the model's order.
        when: asked at the end of every backward whether to measure it.
        at_arrival: measure each gradient when it arrives, not all at the end.
        on_error: told of failures; backward goes on.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        when: Callable[[], bool],
        *,
        at_arrival: bool,
        on_error: Callable[[Exception], None],
    ) -> None:
        self.count = 0
        """Backwards ended since gradients were taken."""
        self.taken = 0
        """Backwards of the gradients taken last."""
        self._parameters = parameters
        self._when = when
        self._at_arrival = at_arrival
        self._on_error = on_error
        self._handles: list[Any] = []
        self._task = -1
        self._arrived: list[tuple[int, Tensor]] = []
        self._rows: list[Tensor] = []
        self._row: Tensor | None = None

    def start(self) -> None:
        """Listen from the next backward on."""
        leaves = [(n, p) for n, p in enumerate(self._parameters, start=1) if p.is_leaf and p.requires_grad]
        every = 1 if self._at_arrival else max(1, len(leaves) // _SENTINELS)
        for number, parameter in {*leaves[::every], *leaves[-1:]}:
            hook = self._hook_of(number)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> None:
        """The gradients that are there are measured now: later backwards are of the next step."""
        if self.count:
            self.taken, self.count = self.count, 0
            self._row = self.blame(self._rows[-1].clone()) if self._rows else None
            self._rows = []

    def forget(self) -> None:
        """The step of the gradients taken is over."""
        self._row = None

    def row(self) -> Tensor | None:
        """Of the gradients taken: this rank's row_R of the newest measured backward, blaming the first that broke."""
        return self._row

    def blame(self, row: Tensor) -> Tensor:
        """`row` of the backward in progress, with parameter and micro-step of the first that was broken."""
        if self._rows:
            earlier = first_broken(torch.stack([*self._rows, row]))
            row[ROW_PARAMETER : ROW_MICRO_STEP + 1] = earlier[ROW_PARAMETER : ROW_MICRO_STEP + 1]
        return row

    def _hook_of(self, number: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            try:
                task = torch._C._current_graph_task_id()
                if task != self._task and not _inside_another():
                    self._task = task
                    self._arrived.clear()
                    Variable._execution_engine.queue_callback(self._ended)
                if self._at_arrival and parameter.grad is not None:
                    with torch.no_grad():
                        self._arrived.append((number, stats.measure([parameter.grad], extremes=False, zeros=False)))
            except Exception as error:
                self._on_error(error)

        return arrived

    def _ended(self) -> None:
        """Called by autograd's engine when all of backward has run."""
        self.count += 1
        try:
            if self._when():
                with torch.no_grad():
                    self._measure()
        except Exception as error:
            self._on_error(error)

    def _measure(self) -> None:
        if self._at_arrival:
            found = self._arrived
            numbers, stats_PK = [n for n, _ in found], torch.cat([part for _, part in found]) if found else None
        else:  # backward goes through the model from its end
            present = [(n, p.grad) for n, p in enumerate(self._parameters, start=1) if p.grad is not None][::-1]
            numbers = [n for n, _ in present]
            stats_PK = stats.measure([g for _, g in present], extremes=False, zeros=False) if present else None
        if stats_PK is not None:
            self._rows.append(rank_row(stats_PK, stats.numbers(tuple(numbers), stats_PK.device), micro_step=self.count))


_ENGINE = graph._engine_run_backward.__code__


def _inside_another() -> bool:
    """True in a backward that runs inside a backward, as reentrant activation checkpointing does for every block.

    On a thread of autograd's own (one per GPU) the outer call is not on the stack.
    """
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        depth += frame.f_code is _ENGINE
    own = isinstance(threading.current_thread(), threading._DummyThread)
    return depth > (0 if own else 1)
