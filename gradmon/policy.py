"""Records -> actions: the ladder. Pure Python, no torch, no clock.

A spike is rescaled and a non-finite step skipped on the spot, by the verdict on the device. What follows from several
steps is decided here, from records that are equal on all ranks, one step later.
"""

from __future__ import annotations

from typing import Any

from gradmon.config import BackoffConfig
from gradmon.record import Event, StepRecord

#: A GradScaler that searches for its scale skips a few steps; so many in a row are a true NaN, which halves the scale
#: for ever.
SCALER_STREAK = 10


class Policy:
    """Learning-rate back-off: lowered after spikes in a row, re-warmed by healthy steps.

    Skips never lower the rate: a skipped step put nothing into the weights.
    """

    def __init__(self, config: BackoffConfig) -> None:
        self._config = config
        self._streak = 0
        self._scaler_skips = 0
        self.scale = 1.0
        """Factor for the learning rate of the next step."""

    def update(self, record: StepRecord) -> list[Event]:
        """Take in a finished step; what is to be told beyond the step itself."""
        self._scaler_skips = self._scaler_skips + 1 if record.reason == "scaler_skip" else 0
        if self._scaler_skips == SCALER_STREAK:
            return [_scaler_streak(record)]
        if record.reason == "spike":
            self._streak += 1
            return self._back_off(record) if self._due() else []
        if record.healthy:
            self._streak = 0
            if self.scale < 1.0:
                self.scale = min(1.0, self.scale * self._config.rewarm)
        return []

    def _due(self) -> bool:
        return 0 < self._config.after_spikes <= self._streak

    def _back_off(self, record: StepRecord) -> list[Event]:
        spikes, self._streak = self._streak, 0
        lowered = max(self._config.floor, self.scale * self._config.factor)
        if lowered >= self.scale:
            return []
        self.scale = lowered
        done = "learning rate lowered to" if record.applied else "learning rate would be lowered to"
        message = (
            f"{spikes} spikes in a row: {done} x{lowered:.3g}, back to x1 by x{self._config.rewarm:g} per healthy step"
        )
        return [
            Event(
                record.step,
                record.wall_seconds,
                "spike_streak",
                "backoff",
                record.applied,
                record.culprit_rank,
                record.parameter,
                message,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes later actions, as plain values."""
        return {"streak": self._streak, "scale": self.scale, "scaler_skips": self._scaler_skips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._streak, self.scale = state["streak"], state["scale"]
        self._scaler_skips = state.get("scaler_skips", 0)


def incident(record: StepRecord) -> Event | None:
    """What to tell of a single step; None if it was healthy. Pure."""
    if record.reason not in ("spike", "nonfinite"):
        return None
    where = "" if record.culprit_rank is None else f" on rank {record.culprit_rank}"
    where += "" if record.parameter is None else f", {record.parameter}"
    where += "" if record.micro_step is None else f", micro-step {record.micro_step}"
    if record.reason == "nonfinite":
        seen = f"{record.nan_count} NaN and {record.inf_count} Inf gradient elements"
        if not record.nan_count and not record.inf_count:
            seen = "a gradient norm that is not finite, of finite gradients (too large, or a rank could not measure)"
    else:
        seen = f"gradient norm {record.grad_norm:.3g} above the limit {record.grad_norm_limit or 0:.3g}"
    done = _DONE[record.action] if record.applied else f"only watched; would have {_DONE[record.action]}"
    if record.action == "rescale" and record.applied:
        done += f" to {record.grad_norm_applied:.3g}"
    message = f"{seen}{where}: {done}"
    return Event(
        record.step,
        record.wall_seconds,
        record.reason,
        record.action,
        record.applied,
        record.culprit_rank,
        record.parameter,
        message,
    )


def _scaler_streak(record: StepRecord) -> Event:
    where = "" if record.culprit_rank is None else f" on rank {record.culprit_rank}"
    where += "" if record.parameter is None else f", {record.parameter}"
    message = (
        f"the GradScaler has skipped {SCALER_STREAK} steps in a row{where}: not an overflow of its scale but NaN or "
        f"Inf in the loss or a gradient; the weights no longer move"
    )
    return Event(
        record.step,
        record.wall_seconds,
        "scaler_streak",
        "none",
        False,
        record.culprit_rank,
        record.parameter,
        message,
    )


_DONE = {"none": "left as it was", "rescale": "rescaled", "skip": "skipped the step", "backoff": "backed off"}
