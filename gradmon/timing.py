"""Where a rank's time goes in a step: waiting for data, busy until its gradients meet the others', paused."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.data.dataloader as dataloader


class Stamp:
    """A moment of a rank's work: by the host's clock on CPU; by an event on CUDA, where the host runs ahead."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def seconds_until(self, later: Stamp) -> float:
        """Time between the two; on CUDA to be asked only once both have passed."""
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        return float(self._event.elapsed_time(later._event)) / 1000


class StepClock:
    """Time of the step in progress, without what the script spends inside `monitor.paused()`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._end: float | None = None
        self._stamp: Stamp | None = None
        self._paused = 0.0
        self._pause_began: float | None = None

    @contextlib.contextmanager
    def pausing(self, what: str, keep: Callable[..., None] | None) -> Iterator[None]:
        """A pause for its body, told to `keep`; one inside another does nothing."""
        if self.paused:
            yield
            return
        keep = keep or (lambda **_told: None)
        self._pause_began = began = time.monotonic()
        keep(paused=1.0, paused_for=what)
        try:
            yield
        finally:
            self._paused += time.monotonic() - began
            self._pause_began = None
            keep(paused=0.0, paused_for="")

    @property
    def paused(self) -> bool:
        """True inside a pause."""
        return self._pause_began is not None

    def end_step(self, ready: Stamp | None) -> tuple[float | None, Busy | None]:
        """A step has ended: (its duration in seconds, what it was busy), each None where it is not known.

        Args:
            ready: when this rank's gradients were ready to meet the others'.
        """
        now = time.monotonic()
        duration = None if self._end is None else max(0.0, now - self._end - self._paused)
        busy = None
        # Events of two devices can't be compared.
        if self._stamp is not None and ready is not None and ready.device == self._stamp.device:
            busy = Busy(self._stamp, ready, self._paused)
        self._end, self._stamp, self._paused = now, Stamp(self._device), 0.0
        return duration, busy


class Busy:
    """The time from the end of the step before until the gradients were ready; to be read once both have passed."""

    def __init__(self, begin: Stamp, ready: Stamp, paused: float) -> None:
        self._begin = begin
        self._ready = ready
        self._paused = paused

    def seconds(self) -> float:
        """Never below 0: a pause may lie partly behind the moment in which they were ready."""
        return max(0.0, self._begin.seconds_until(self._ready) - self._paused)


class DataWatch:
    """Adds up the time that this thread waits for batches of any `torch.utils.data.DataLoader`, from start to stop.

    What other threads wait for is prefetching: training does not wait with them.

    Args:
        clock: tells of pauses, in which nothing is added up.
        seen: is given each batch that training gets, with the loader's iterator.
    """

    def __init__(self, clock: StepClock, seen: Callable[[Any, Any], None] = lambda _iterator, _batch: None) -> None:
        self._clock = clock
        self._seen = seen
        self._thread = threading.get_ident()
        self._waited: float | None = None
        self._waiting = False
        self._original: Any = None
        self._wrapper: Any = None

    def start(self) -> None:
        """Begin to listen."""
        kind = dataloader._BaseDataLoaderIter
        original = self._original = kind.__next__

        @functools.wraps(original)
        def watched(iterator: Any) -> Any:
            elsewhere = threading.get_ident() != self._thread
            # One that is waited for inside another's wait is part of it.
            if self._wrapper is None or elsewhere or self._waiting or self._clock.paused:
                return original(iterator)
            self._waiting, began = True, time.perf_counter()
            try:
                batch = original(iterator)
            finally:
                self._waiting = False
                self._waited = (self._waited or 0.0) + time.perf_counter() - began
            self._seen(iterator, batch)
            return batch

        self._wrapper = watched
        kind.__next__ = watched  # type: ignore[method-assign, assignment]

    def stop(self) -> None:
        """Put torch's own back, unless somebody has wrapped ours since (then ours only passes through)."""
        kind = dataloader._BaseDataLoaderIter
        if self._wrapper is not None and kind.__next__ is self._wrapper:
            kind.__next__ = self._original  # type: ignore[method-assign]
        self._wrapper = None

    def take(self) -> float | None:
        """Seconds waited since the last call; None until a DataLoader was used."""
        waited = self._waited
        if waited is not None:
            self._waited = 0.0
        return waited
