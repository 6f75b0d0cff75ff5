"""A marker file that tells whoever rotates checkpoints whether the newest one may push out an older one.

    {"run": "llama", "step": 4000, "healthy": false, "why": "the loss is not finite", "last_healthy_step": 3990, ...}

It is replaced atomically, by a thread that may wait for a slow disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the weights are fit to be kept, after a step."""

    step: int = 0
    why_unfit: str = ""
    """Empty if they are."""
    last_healthy_step: int = 0


class HealthFile:
    """Writes the newest `Health` it was given. `path` None: none is wanted of this rank."""

    def __init__(self, path: Path | None, run: str) -> None:
        self.path = path
        self.newest = Health()
        self._run = run
        self._written: Health | None = None

    def changed(self, health: Health) -> bool:
        """Take in the newest; True if it has turned from fit to unfit or back, which should be told at once."""
        turned = bool(health.why_unfit) != bool(self.newest.why_unfit)
        self.newest = health
        return turned

    def write(self) -> None:
        """Write what is new.

        Raises:
            OSError: the file can't be written.
        """
        health = self.newest
        if self.path is None or health == self._written or not health.step:  # nothing is known yet: leave what is there
            return
        content = {
            "run": self._run,
            "step": health.step,
            "healthy": not health.why_unfit,
            "why": health.why_unfit,
            "last_healthy_step": health.last_healthy_step,
            "wall_seconds": time.time(),
        }
        draft = self.path.with_name(f".{self.path.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
            draft.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        self._written = health

    def sample(self) -> Mapping[str, float]:
        """For the metrics; nothing before the first step."""
        if not self.newest.step:
            return {}
        return {
            "healthy": float(not self.newest.why_unfit),
            "last_healthy_step": float(self.newest.last_healthy_step),
        }
