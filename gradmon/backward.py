"""What happens in backward outside of communication hooks: how often it ran in a step, and which run broke first.

With gradient accumulation a NaN of the second micro-step is still there at the fourth. `BackwardWatch` sees the end of
every backward and measures what has come together so far, so that the micro-step can be named; it is also where local
statistics come from beside a DDP communication hook that is not ours.

The end of backward is a callback of autograd's engine, queued by the `register_post_accumulate_grad_hook` of whichever
watched parameter gets its gradient first. DDP queues its own callback, which copies averaged gradients back, after
that: in ours gradients are still this rank's own. (With `gradient_as_bucket_view` they may be overwritten by then:
there each is measured as it arrives.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable, graph

from gradmon import stats
from gradmon.rows import ROW_MICRO_STEP, ROW_PARAMETER, first_broken, rank_row

#: Micro-steps of one step that are remembered.
_MOST_ROWS = 64


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
        self._complete = True

    def start(self) -> None:
        """Listen from the next backward on."""
        for number, parameter in enumerate(self._parameters, start=1):
            if parameter.is_leaf and parameter.requires_grad:
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
            self._complete = len(self._rows) >= self.taken - 1
            self._row = None
            if self._rows:
                self._row = self._blamed(self._rows[:-1], self._rows[-1].clone(), self._complete)
            self._rows = []

    def forget(self) -> None:
        """The step of the gradients taken is over."""
        self._row = None

    def row(self) -> Tensor | None:
        """Of the gradients taken: this rank's row_R of the newest measured backward, blaming the first that broke."""
        return self._row

    @property
    def last_micro_step(self) -> int:
        """Number of the last backward of the gradients taken; 0 unless all before it were measured."""
        return self.taken if self._complete else 0

    def blame(self, row: Tensor, elsewhere: int) -> Tensor:
        """`row` of the backward in progress, with parameter and micro-step of the first that was broken.

        `elsewhere` is how many earlier backwards of this step somebody else has measured.
        """
        return self._blamed(self._rows, row, len(self._rows) + elsewhere >= self.count)

    @staticmethod
    def _blamed(earlier: list[Tensor], row: Tensor, complete: bool) -> Tensor:
        if earlier:
            first = first_broken(torch.stack([*earlier, row]), lasting=True)
            row[ROW_PARAMETER : ROW_MICRO_STEP + 1] = first[ROW_PARAMETER : ROW_MICRO_STEP + 1]
        if not complete:  # one that was not measured may have been the first
            row[ROW_MICRO_STEP].fill_(0)
        return row

    def _hook_of(self, number: int) -> Callable[[Tensor], None]:
        current, at_arrival = torch._C._current_graph_task_id, self._at_arrival

        def arrived(parameter: Tensor) -> None:
            task = current()
            if task == self._task and not at_arrival:  # the usual case: this runs for every parameter
                return
            try:
                if task != self._task and not _inside_another(parameter):
                    self._begin(task, parameter)
                if at_arrival and parameter.grad is not None:
                    with torch.no_grad():
                        self._arrived.append((number, stats.measure([parameter.grad], extremes=False, zeros=False)))
            except Exception as error:
                self._on_error(error)

        return arrived

    def _begin(self, task: int, parameter: Tensor) -> None:
        self._task = task
        self._arrived.clear()
        if self.count and all(p.grad is None for p in self._parameters if p is not parameter):
            self.count = 0  # the script has thrown the gradients of those backwards away
            self._rows = []
        Variable._execution_engine.queue_callback(self._ended)

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
            order_P = stats.numbers(tuple(numbers), stats_PK.device)
            self._rows = [*self._rows[-_MOST_ROWS:], rank_row(stats_PK, order_P, micro_step=self.count)]


_ENGINE = graph._engine_run_backward.__code__


def _inside_another(parameter: Tensor) -> bool:
    """True in a backward that runs inside a backward, as reentrant activation checkpointing does for every block.

    Gradients on a GPU arrive on a thread of autograd's own, where the outer call is not on the stack.
    """
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        depth += frame.f_code is _ENGINE
    elsewhere = parameter.device.type != "cpu" and torch._C._is_multithreading_enabled()
    return depth > (0 if elsewhere else 1)
