"""How the process is ending: whether an exception or an exit code other than 0 brought it there."""

from __future__ import annotations

import atexit
import functools
import sys
import time
from collections.abc import Callable
from typing import Any, Literal


class ExitWatch:
    """Remembers the code given to `sys.exit`, from `start` to `stop`; at exit time nothing else knows it any more.

    Args:
        close: called when the process ends in between, with how it ends and what went wrong.
        patient: wait a moment before, for the last callbacks of gloo.
    """

    def __init__(self, close: Callable[[Literal["finished", "exception"], str], None], *, patient: bool) -> None:
        self._close = close
        self._patient = patient
        self._code: Any = 0
        self._original = sys.exit
        self._wrapper: Any = None

    def start(self) -> None:
        """Begin to listen."""
        original = self._original = sys.exit

        @functools.wraps(original)
        def watched(status: Any = None, /) -> Any:
            self._code = status
            return original(status)

        self._wrapper = watched
        sys.exit = watched
        atexit.register(self._at_exit)

    def stop(self) -> None:
        """Put the interpreter's own back, unless somebody has wrapped ours since."""
        if sys.exit is self._wrapper:
            sys.exit = self._original
        self._wrapper = None
        atexit.unregister(self._at_exit)

    def come_first(self) -> None:
        """At exit, before what was registered until now: a library that ends a run there must not be ahead of us."""
        if self._wrapper is not None:
            atexit.unregister(self._at_exit)
            atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        failure = self._failure()
        if self._patient:
            # gloo's threads may still have to drop the hook's last callbacks, for which they need the interpreter's
            # lock; a thread that asks for it while the interpreter is being torn down aborts the process.
            time.sleep(0.05)
        self._close("exception" if failure else "finished", failure)

    def _failure(self) -> str:
        error = getattr(sys, "last_value", None)  # set by the interpreter for an exception that nobody caught
        if error is not None:
            return f"{type(error).__name__}: {error}"
        return "" if self._code in (None, 0) else f"SystemExit: {self._code}"


#: What a process ends with that gradmon has stopped (EX_SOFTWARE of sysexits.h).
STOP_CODE = 70


class TrainingStopped(SystemExit):
    """gradmon's policy has ended training, on every rank before the same step; the exit code is 70.

    No `Exception`, so that a loop that goes on after a bad batch does not swallow it. Catch it by name to save or to
    clean up; whoever goes on training meets it again at the next step.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = STOP_CODE
