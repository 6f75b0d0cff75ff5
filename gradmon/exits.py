"""How the process is ending: whether an exception or an exit code other than 0 brought it there."""

from __future__ import annotations

import functools
import sys
from typing import Any


class ExitWatch:
    """Remembers the code given to `sys.exit`, from `start` to `stop`; at exit time nothing else knows it any more."""

    def __init__(self) -> None:
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

    def stop(self) -> None:
        """Put the interpreter's own back, unless somebody has wrapped ours since."""
        if sys.exit is self._wrapper:
            sys.exit = self._original

    def failure(self) -> str:
        """What went wrong, empty if nothing did. For use at exit."""
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
