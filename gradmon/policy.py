"""Records -> actions: the ladder. Pure Python, no torch, no clock.

A spike is rescaled and a non-finite step skipped on the spot, by the verdict on the device. What follows from several
steps is decided here, from records that are equal on all ranks, one step later:

- spikes in a row: the first is rescaled, the next ones are skipped (`skips_spikes`);
- many spikes within a few steps: learning rate down, back up with every healthy step;
- gradients drift up or spike again and again, *and* the loss has risen: back to a healthy snapshot, learning rate
  down; at last, stop;
- skips in a row: stop;
- ranks whose weights differ, or that are left out again and again: tell.

Steps that are not finite never lower the rate: nothing of them is in the weights, and where a fifth of all steps is
skipped the run would starve. Spikes lower it whether they were skipped or not, but only once there are more of them
than a bad stretch of data has: what is left to blame is the rate itself. Drift alone is an event: a level shift must
never stop a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradmon.config import Config
from gradmon.record import Action, Event, StepRecord, StreakReason

#: A GradScaler that searches for its scale skips a few steps; so many in a row are a true NaN, which halves the scale
#: for ever. Told where it does not stop the run.
SCALER_STREAK = 10


@dataclass(frozen=True, slots=True)
class Trend:
    """What the detector sees after a step, beyond the step itself."""

    drifting: bool = False
    vanished: bool = False
    loss_over_best: float | None = None
    """Running median of the loss over its best; None where no loss is observed, or too few are."""
    loss: float | None = None
    """Of this step, mean over the ranks; None where none was observed."""


class Policy:
    """The state of the ladder. After each `update` its attributes say what the next step will be like."""

    def __init__(self, config: Config, world_size: int = 1) -> None:
        self._config = config
        self._world_size = world_size
        self._spikes = 0
        """In a row, however each was treated."""
        self._recent: list[int] = []
        """Steps that were spikes, of the last few."""
        self._skips = 0
        self._scaler_skips = 0
        self._left_out: dict[int, int] = {}
        """Rank -> steps in a row in which it was left out."""
        self._differing: tuple[int, ...] = ()
        self._healthy_steps = 0
        """Since the last snapshot."""
        self._near_best = False
        self._cooldown = 0
        self._told: set[str] = set()
        self._acts = True
        self.rollbacks = 0
        """Done so far."""
        self.scale = 1.0
        """Factor for the learning rate of the next step."""
        self.rollback_due = False
        """True if the next step is to begin with the weights of a snapshot; `rolled_back` follows."""
        self.stop: Event | None = None
        """Set once training is to end on all ranks before the next step."""
        self.why_unfit = ""
        """Why a checkpoint of the weights as they are now must not push out an older one; empty if it may."""
        self.last_healthy_step = 0

    @property
    def skips_spikes(self) -> bool:
        """True if a spike in the next step is to be skipped, not rescaled.

        A lone spike is often a good direction of a wrong length (a loss scaled by mistake, a rare batch), and rescaled
        it still helps. Spikes in a row come from bad data, of which nothing is wanted. Skipping ends, too: without it
        the weights would never leave a place where gradients are large.
        """
        clip = self._config.clip
        return clip.rescale_first <= self._spikes < clip.rescale_first + clip.skip_next

    @property
    def snapshot_due(self) -> bool:
        """True if the weights after the newest step are worth keeping; `snapshot_taken` follows."""
        every = self._config.rollback.every_steps
        return 0 < every <= self._healthy_steps and self._near_best and not self.why_unfit

    def update(
        self,
        record: StepRecord,
        trend: Trend,
        *,
        acts: bool = True,
        left_out: Sequence[int] = (),
        differing: Sequence[int] | None = None,
    ) -> list[Event]:
        """Take in a finished step; what is to be told beyond the step itself.

        Args:
            record: of the step; equal on all ranks in all that is read here.
            trend: from the detector, which has taken in the step already.
            acts: whether what is decided will be done; False where gradmon only watches.
            left_out: ranks that counted for nothing in the step's average.
            differing: ranks whose weights differ from those of most; None where they were not compared.
        """
        self.rollback_due, self._acts = False, acts
        self._cooldown = max(0, self._cooldown - 1)
        self._count(record, trend)
        events = [
            self._back_off(record),  # first: what follows asks for the spikes it has counted
            self._skipped_too_often(record),
            *self._of_trend(record, trend),
            *self._of_ranks(record, left_out),
            None if differing is None else self._of_replicas(record, tuple(differing)),
        ]
        self.why_unfit = self._unfit(trend)
        if not self.why_unfit and record.reason != "unsynced":
            self.last_healthy_step = record.step
        return [event for event in events if event is not None]

    def snapshot_taken(self) -> None:
        """The next one is due so many healthy steps from here."""
        self._healthy_steps = 0

    def rolled_back(self, record: StepRecord, to_step: int) -> Event:
        """The weights of `to_step` are back; `record` is of the newest step, whose weights are gone."""
        self.rollbacks += 1
        self.rollback_due = False
        self._cooldown = self._config.rollback.cooldown_steps
        self._spikes = self._healthy_steps = 0
        self._recent.clear()
        self.scale = max(self._config.backoff.floor, self.scale * self._config.backoff.factor)
        self.why_unfit, self.last_healthy_step = "", to_step
        left = self._config.rollback.max - self.rollbacks
        return self._event(
            record,
            "diverging",
            "rollback",
            f"gradients and loss have grown: rolled back to the weights of step {to_step}, learning rate lowered to "
            f"x{self.scale:.3g}; {left} more rollback{'s' * (left != 1)} before the run is stopped",
        )

    def cannot_roll_back(self, record: StepRecord) -> Event:
        """No snapshot is held by all ranks; asked again after the cooldown."""
        self.rollback_due = False
        self._cooldown = self._config.rollback.cooldown_steps
        why = (
            "gradients and loss have grown, and there is no snapshot to roll back to (rollback.every_steps too large?)"
        )
        return self._event(record, "diverging", "none", why)

    def rollback_failed(self, record: StepRecord, why: str) -> Event:
        """Ranks may hold different weights now: there is no going on."""
        return self._end(record, "diverging", f"a rollback failed{why}, and ranks may hold different weights")

    def rebaseline(self) -> None:
        """The script has changed something on purpose: what was counted so far says nothing of what comes."""
        self._spikes = self._healthy_steps = 0
        self._recent.clear()
        self._near_best, self.why_unfit, self.rollback_due = False, "", False
        self._told -= {"drift", "vanish"}

    # --- parts -----------------------------------------------------------------------------------------------------

    def _count(self, record: StepRecord, trend: Trend) -> None:
        self._scaler_skips = self._scaler_skips + 1 if record.reason == "scaler_skip" else 0
        self._near_best = trend.loss_over_best is not None and trend.loss_over_best <= self._config.rollback.near_best
        if record.reason == "spike":
            self._spikes += 1
            self._skips = 0
        elif record.reason == "nonfinite":
            self._skips += 1
        elif record.healthy or record.reason == "left_out":
            self._spikes = self._skips = 0
            self._healthy_steps += 1
            if self.scale < 1.0:
                self.scale = min(1.0, self.scale * self._config.backoff.rewarm)

    def _back_off(self, record: StepRecord) -> Event | None:
        backoff = self._config.backoff
        self._recent = [step for step in self._recent if step > record.step - backoff.within_steps]
        if record.reason != "spike":
            return None
        self._recent.append(record.step)
        lowered = max(backoff.floor, self.scale * backoff.factor)
        if not 0 < backoff.after_spikes <= len(self._recent) or lowered >= self.scale:
            return None
        self.scale = lowered
        done = "learning rate lowered to" if self._acts else "learning rate would be lowered to"
        message = (
            f"{len(self._recent)} spikes within {backoff.within_steps} steps: {done} x{lowered:.3g}, "
            f"back to x1 by x{backoff.rewarm:g} per healthy step"
        )
        return self._event(record, "spike_streak", "backoff", message)

    def _skipped_too_often(self, record: StepRecord) -> Event | None:
        stop = self._config.stop
        where = _place(record)
        many = record.reason == "nonfinite" and 0 < stop.after_skips <= self._skips
        if self._begins("skip_streak", many):
            return self._end(
                record,
                "skip_streak",
                f"{self._skips} steps in a row were not finite{where}: "
                + ("the weights no longer move" if self._acts else "they are not fit to be trained on"),
            )
        limit = stop.after_scaler_skips or SCALER_STREAK
        if not self._begins("scaler_streak", record.reason == "scaler_skip" and self._scaler_skips >= limit):
            return None
        why = (
            f"the GradScaler has skipped {self._scaler_skips} steps in a row{where}: not an overflow of its scale but "
            f"NaN or Inf in the loss or a gradient; the weights no longer move"
        )
        if stop.after_scaler_skips:
            return self._end(record, "scaler_streak", why)
        return self._event(record, "scaler_streak", "none", why)

    def _of_trend(self, record: StepRecord, trend: Trend) -> list[Event | None]:
        config = self._config
        drifting, risen = trend.drifting, (trend.loss_over_best or 0.0) > config.trend.loss_ratio
        events = [
            self._once_while(
                drifting,
                record,
                "drift",
                f"gradient norms are {config.trend.drift_ratio:g} times their lowest level of the last "
                f"{config.trend.drift_steps} steps",
            ),
            self._once_while(trend.vanished, record, "vanish", "the gradients have vanished"),
        ]
        grown = drifting or 0 < config.backoff.after_spikes <= len(self._recent)
        if not (config.rollback.every_steps and grown and risen and self._cooldown == 0):
            self._begins("diverging", grown and risen and "diverging" in self._told)
            return events
        if self.rollbacks >= config.rollback.max:
            again = f"gradients and loss have grown again after {self.rollbacks} rollbacks"
            return [*events, self._end(record, "diverging", again) if self._begins("diverging", True) else None]
        if self._acts:
            self.rollback_due = True
            return events
        self.rollbacks, self._cooldown = self.rollbacks + 1, config.rollback.cooldown_steps
        would = "gradients and loss have grown: would have rolled back to the weights of the oldest snapshot"
        return [*events, self._event(record, "diverging", "rollback", would)]

    def _of_ranks(self, record: StepRecord, left_out: Sequence[int]) -> list[Event | None]:
        self._left_out = {rank: self._left_out.get(rank, 0) + 1 for rank in left_out}
        limit = self._config.leave_out.report_after
        return [
            self._event(
                record,
                "left_out_streak",
                "none",
                f"rank {rank} was left out of the average in {limit} steps in a row: bad data in its shard, or a "
                f"broken GPU; without it the batch is smaller by its share",
                rank=rank,
            )
            for rank, steps in self._left_out.items()
            if steps == limit
        ]

    def _of_replicas(self, record: StepRecord, differing: tuple[int, ...]) -> Event | None:
        new, self._differing = differing != self._differing, differing
        if not (new and differing):
            return None
        who = _ranks(differing)
        message = f"the weights of {who} are no longer those of the other ranks"
        if len(differing) == self._world_size:
            message = f"{who} no longer hold the same weights, and no majority agrees"
        if self._config.stop.on_divergence:
            return self._end(record, "replicas", message, rank=differing[0])
        return self._event(record, "replicas", "none", message, rank=differing[0])

    def _once_while(self, on: bool, record: StepRecord, kind: StreakReason, message: str) -> Event | None:
        """Told when it begins, and again only after it has ended."""
        return self._event(record, kind, "none", message) if self._begins(kind, on) else None

    def _begins(self, kind: str, on: bool) -> bool:
        """True in the first step of a stretch in which something is so."""
        told = kind in self._told
        (self._told.add if on else self._told.discard)(kind)
        return on and not told

    def _end(self, record: StepRecord, kind: StreakReason, why: str, rank: int | None = None) -> Event:
        done = "stopping" if self._acts else "would have stopped"
        done += " all ranks" if self._world_size > 1 else ""
        event = self._event(record, kind, "stop", f"{why}: {done}", rank=rank)
        if self._acts:
            self.stop = event
        return event

    def _unfit(self, trend: Trend) -> str:
        """A lone incident that gradmon has dealt with leaves the weights fit."""
        harmless = 1 if self._acts else 0
        if self._differing:
            return f"the weights of {_ranks(self._differing)} differ"
        if trend.loss is not None and not math.isfinite(trend.loss):
            return "the loss is not finite"
        if self._skips > harmless:
            return f"gradients were not finite in {self._skips} steps in a row"
        if self._spikes > harmless:
            return f"{self._spikes} spikes in a row"
        if trend.loss_over_best is not None and trend.loss_over_best > self._config.trend.loss_ratio:
            return f"the running loss is {trend.loss_over_best - 1:.0%} above its best"
        return ""

    def _event(
        self, record: StepRecord, kind: StreakReason, action: Action, message: str, rank: int | None = None
    ) -> Event:
        found = _event(record, kind, action, message, rank)
        return dataclasses.replace(found, applied=self._acts and action != "none")

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes later actions, as plain values."""
        return {
            "spikes": self._spikes,
            "recent": list(self._recent),
            "skips": self._skips,
            "scaler_skips": self._scaler_skips,
            "left_out": {str(rank): steps for rank, steps in self._left_out.items()},
            "healthy_steps": self._healthy_steps,
            "near_best": self._near_best,
            "cooldown": self._cooldown,
            "told": sorted(self._told),
            "rollbacks": self.rollbacks,
            "scale": self.scale,
            "rollback_due": self.rollback_due,
            "why_unfit": self.why_unfit,
            "last_healthy_step": self.last_healthy_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; what an older version did not save starts anew."""
        self.scale = float(state["scale"])
        self._spikes = int(state.get("spikes", state.get("streak", 0)))
        self._recent = [int(step) for step in state.get("recent", ())]
        self._skips, self._scaler_skips = int(state.get("skips", 0)), int(state.get("scaler_skips", 0))
        self._left_out = {int(rank): int(steps) for rank, steps in state.get("left_out", {}).items()}
        self._differing = ()  # of ranks that are no more
        self._healthy_steps, self._near_best = int(state.get("healthy_steps", 0)), bool(state.get("near_best", False))
        self._cooldown, self.rollbacks = int(state.get("cooldown", 0)), int(state.get("rollbacks", 0))
        self._told = set(state.get("told", ())) & {"drift", "vanish"}  # whoever goes on after a stop is stopped again
        self.rollback_due = bool(state.get("rollback_due", False))
        self.why_unfit = str(state.get("why_unfit", ""))
        self.last_healthy_step = int(state.get("last_healthy_step", 0))
        self.stop = None


def incident(record: StepRecord) -> Event | None:
    """What to tell of a single step; None if it was healthy. Pure."""
    if not record.broken:
        return None
    if record.reason == "spike":
        seen = f"gradient norm {record.grad_norm:.3g} above the limit {record.grad_norm_limit or 0:.3g}"
    elif record.reason == "left_out":
        seen = "gradients not finite before they were averaged"
    elif record.nan_count or record.inf_count:
        seen = f"{record.nan_count} NaN and {record.inf_count} Inf gradient elements"
    else:
        seen = "a gradient norm that is not finite, of finite gradients (too large, or a rank could not measure)"
    done = _DONE[record.action] if record.applied else f"only watched; would have {_DONE[record.action]}"
    if record.action == "rescale" and record.applied:
        done += f" to {record.grad_norm_applied:.3g}"
    return _event(record, record.reason, record.action, f"{seen}{_place(record)}: {done}")


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"


def _place(record: StepRecord) -> str:
    where = "" if record.culprit_rank is None else f" on rank {record.culprit_rank}"
    where += "" if record.parameter is None else f", {record.parameter}"
    return where + ("" if record.micro_step is None else f", micro-step {record.micro_step}")


def _event(record: StepRecord, kind: Any, action: Action, message: str, rank: int | None = None) -> Event:
    return Event(
        step=record.step,
        wall_seconds=record.wall_seconds,
        kind=kind,
        action=action,
        applied=record.applied,
        rank=record.culprit_rank if rank is None else rank,
        parameter=record.parameter,
        message=message,
    )


_DONE = {
    "none": "left as it was",
    "rescale": "rescaled",
    "skip": "skipped the step",
    "leave_out": "left the rank out of the average",
}
