"""What gradmon says on the console: each thing once, one line per kind per minute, then "and 37 more"."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger("gradmon")
QUIET_SECONDS = 60.0


class Announcer:
    """One rank's voice. Shows its lines on stderr while attached, unless the script has set up logging itself."""

    def __init__(self, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rank = rank
        self._clock = clock
        self._once: set[str] = set()
        self._last: dict[str, float] = {}
        self._held: Counter[str] = Counter()
        self._handler: logging.Handler | None = None

    def start(self) -> None:
        """Make lines visible."""
        if logger.hasHandlers():
            return
        self._handler = logging.StreamHandler()
        self._handler.setFormatter(logging.Formatter(f"gradmon[rank {self._rank}] %(message)s"))
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def stop(self) -> None:
        """Say what was held back, and leave the logger as it was found."""
        for kind, count in self._held.items():
            self._log(logging.WARNING, f"{count} more of the kind {kind.replace('_', ' ')}")
        self._held.clear()
        if self._handler is not None:
            logger.removeHandler(self._handler)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
            self._handler = None

    def last_word(self, message: str) -> None:
        """Say it where a person sees it, also if the script's logging goes to a file only."""
        self._log(logging.ERROR, message)
        current: logging.Logger | None = logger
        handlers: list[logging.Handler] = []
        while current is not None:
            handlers += current.handlers
            current = current.parent if current.propagate else None
        on_console = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
        if not any(getattr(handler, "stream", None) in on_console for handler in handlers):
            print(f"gradmon[rank {self._rank}] {message}", file=sys.stderr)

    def once(self, message: str, level: int = logging.WARNING) -> None:
        """Say this once per attachment."""
        if message not in self._once:
            self._once.add(message)
            self._log(level, message)

    def event(self, kind: str, message: str) -> None:
        """Say it, unless this kind was heard less than a minute ago: then count it."""
        now = self._clock()
        if now - self._last.get(kind, -QUIET_SECONDS) < QUIET_SECONDS:
            self._held[kind] += 1
            return
        more = self._held.pop(kind, 0)
        self._last[kind] = now
        self._log(logging.WARNING, message + (f" (and {more} more since)" if more else ""))

    @staticmethod
    def _log(level: int, message: str) -> None:
        """A filter or handler of the script's that raises must not decide what this rank does next."""
        with contextlib.suppress(Exception):
            logger.log(level, "%s", message)
