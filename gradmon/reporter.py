"""What gradmon tells of a run, on console and in the journal: events, and failures of its own."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch

from gradmon.health import Health, HealthFile
from gradmon.journal import JournalWriter
from gradmon.log import Announcer
from gradmon.record import DataReason, Event, Landing

#: Parts whose failure may have made this rank decide otherwise than the rest: then all ranks only watch.
_DECIDING = frozenset({"local", "before_clip", "before_step", "act", "rollback", "restore", "after_step", "learn"})


class Reporter:
    """One rank's voice and counters.

    Args:
        rank: who speaks.
        undecided: called when a part has failed that decides, so that the other ranks learn of it.
        health: the marker file.
    """

    def __init__(self, rank: int, undecided: Callable[[], None], health: HealthFile) -> None:
        self._rank = rank
        self._undecided = undecided
        self._health = health
        self.ended = False
        """True once the journal has its last row, of a stop."""
        self._incidents = 0
        self.say = Announcer(rank)
        self.journal: JournalWriter | None = None

    def tell(self, event: Event) -> None:
        """The culprit speaks of what is its own, rank 0 of the rest; the journal has its steps' incidents already."""
        of_step = event.kind in ("spike", "nonfinite", "left_out")
        self._incidents += of_step
        of_rank = of_step or event.kind in get_args(DataReason)
        if not of_step and self.journal is not None:
            self.journal.put(event)
        speaker = event.rank if event.rank is not None and of_rank else 0
        last_word = event.action == "stop" and event.applied  # said by `end`
        if self._rank == speaker and not last_word:
            self.say.event(event.kind, f"step {event.step}: {event.message}")

    def put(self, step: Landing) -> None:
        """Into the journal, if there is one."""
        if self.journal is not None:
            self.journal.put(step)

    def tell_health(self, health: Health) -> None:
        """For the marker file and the metrics; told at once where it has turned, else within seconds."""
        if self._health.changed(health) or self.journal is None:
            self._write_health()

    def end(self, message: str) -> None:
        """All ranks are about to be stopped: the journal must be whole before the first of them is gone."""
        if self.ended:
            return
        self.ended = True
        if self._rank == 0:
            self.say.last_word(message)
        self._write_health()
        if self.journal is not None:
            self.journal.close("exception", message)

    def stop(self) -> None:
        """The last lines: what was held back, and where to read on."""
        if self._rank == 0 and self._incidents and self.journal is not None:
            steps = f"{self._incidents} step{'s' * (self._incidents > 1)} broke"
            self.say.once(f"{steps}; what happened, and what to do: gradmon report {self.journal.path.parent.parent}")
        self.say.stop()

    def _write_health(self) -> None:
        if self.journal is not None:
            self.journal.call("health_file", self._health.write)
        else:
            with self.guarded("health_file"):
                self._health.write()

    @contextlib.contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """Promise 7: a failure of ours becomes a counter and one warning, never an exception in training."""
        try:
            with torch.no_grad():  # gradients of backward(create_graph=True) carry a graph of their own
                yield
        except Exception as error:
            self.failed(part, error)

    def failed(self, part: str, error: Exception) -> None:
        """Count it, and say it once."""
        if part in _DECIDING:
            self._undecided()
        if part != "journal" and self.journal is not None:  # the writer counts its own
            self.journal.count("gradmon_errors_total", (part,))
        where = traceback.extract_tb(error.__traceback__)
        at = f" at {Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
        self.say.once(f"gradmon's own {part} failed, training goes on: {type(error).__name__}: {error}{at}")
