"""Detector, policy and snapshots as one: what a finished step teaches, and what the next one may be.

All that is decided here is decided by values that are equal on all ranks, at the same step. Only `roll_back` speaks
to the other ranks: a snapshot may have failed on one of them, or may not fit there any more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from gradmon.actions import evaluates_repeatedly
from gradmon.config import Config
from gradmon.detector import Detector, Limits
from gradmon.landing import Peeked
from gradmon.loss_watch import LossWatch
from gradmon.policy import Policy, Trend, incident
from gradmon.record import Event, StepRecord
from gradmon.snapshot import GENERATIONS, Snapshots, check_registrable
from gradmon.topology import Topology, Watched

#: Steps whose gradients teach nothing: of other weights, not averaged, or not finite by a GradScaler's choice.
_NOT_LEARNED = frozenset({"unsynced", "scaler_skip", "diverging"})
#: Steps after which a rollback without an observed loss is pointed out.
_LOSS_BY = 64


class Guard:
    """What one rank knows of the run so far, equal on all ranks.

    Args:
        config: thresholds.
        watched: whose state snapshots hold.
        topology: how the ranks reach each other.
        say: tells the user something once.
    """

    def __init__(self, config: Config, watched: Watched, topology: Topology, say: Callable[[str], None]) -> None:
        self._topology = topology
        self._device = watched.device
        self._config = config
        self._say = say
        self._world_size = 1 if topology.group is None else dist.get_world_size(topology.group)
        self._detector = Detector(config.clip, config.trend)
        self._policy = Policy(config, self._world_size)
        self._loss_watch = LossWatch(config.loss)
        self._why_stop = ""
        self._validations = 0
        self._was_healthy = True
        self.newest: StepRecord | None = None
        """The newest step that is known."""
        self._learned = 0
        self.snapshots: Snapshots | None = None
        """None unless rollback is switched on and can be done here."""
        if config.rollback.every_steps and config.mode == "guard" and topology.acts:
            self.snapshots = Snapshots(
                topology.model,
                lambda: {n: p for n, p in zip(watched.names, watched.parameters, strict=True) if p.requires_grad},
                watched.optimizers,
            )
        self._references: dict[int, dict[str, Any]] = {}
        """Step of a snapshot -> the detector's state at that time."""

    @property
    def scale(self) -> float:
        """Factor for the next step's learning rate."""
        return self._policy.scale

    @property
    def stop(self) -> Event | None:
        """Set once training is to end on all ranks before the next step."""
        return self._policy.stop

    @property
    def why_unfit(self) -> str:
        """Why a checkpoint of the weights as they are now must not push out an older one; empty if it may."""
        return self._policy.why_unfit

    @property
    def should_stop(self) -> str:
        """Why training on is a waste; empty if it is not. Equal on all ranks from one step's begin to the next's."""
        return self._why_stop

    @property
    def last_healthy_step(self) -> int:
        """Newest step after which the weights were fit to be kept; 0 before the first."""
        return self._policy.last_healthy_step

    def limits(self) -> Limits:
        """How the next step will be judged."""
        limits = self._detector.limits()
        return dataclasses.replace(limits, skip_above=limits.spike_above) if self._policy.skips_spikes else limits

    def limits_for(self, optimizer: Optimizer) -> Limits:
        """The same, for the optimizer whose step begins."""
        # Not as soon as it is known: a rank that saves `state_dict()` alone knows it one step earlier than the others.
        self._why_stop = self._loss_watch.why_stop
        limits = self.limits()
        if not evaluates_repeatedly(optimizer):
            return limits
        # It compares the gradients of one step with each other: skipping the first is exact, rescaling it is not.
        if math.isfinite(limits.max_norm):
            self._say(f"clip.max_norm has no effect on {type(optimizer).__name__}, which compares gradients")
        return Limits(spike_above=limits.spike_above, skip_above=limits.skip_above)

    def learn(self, peeked: Peeked, *, acts: bool) -> list[Event]:
        """Take in a finished step; what is to be told of it. `acts`: whether gradmon does what it decides."""
        record = self.newest = peeked.record
        if peeked.alone:  # the others do not know this step: what was learnt from it would differ between ranks
            return [event for event in (incident(record),) if event is not None]
        self._learned += 1
        if record.reason not in _NOT_LEARNED:
            self._detector.update(record.grad_norm, peeked.mean_loss)
        detector = self._detector
        trend = Trend(detector.drifting, detector.vanished, detector.loss_over_best, peeked.mean_loss)
        if self.snapshots is not None and self._learned == _LOSS_BY and trend.loss_over_best is None:
            self._say(
                "rollback has no effect without a loss above 0: call monitor.observe(loss=loss) once per backward, on "
                "every rank"
            )
        events = self._policy.update(record, trend, acts=acts, left_out=peeked.left_out, differing=peeked.differing)
        return [event for event in (incident(record), *events) if event is not None]

    def watch_losses(self, peeked: Peeked, *, late: bool) -> list[Event]:
        """What the losses of a finished step tell, beyond the step itself. `late`: they are of the one before it."""
        if peeked.alone:
            return []
        record = peeked.record
        new, self._validations = peeked.validations != self._validations, peeked.validations
        # Ranks may differ in when they observe; what the watch is told must not.
        healthy, self._was_healthy = record.healthy and self._was_healthy, record.healthy
        step = record.step - late
        found = self._loss_watch.update(
            record.step,
            peeked.mean_loss,
            peeked.losses or None,
            peeked.validation_loss if new else None,
            healthy=healthy,
        )
        return [finding.event(step, record.wall_seconds) for finding in found]

    def sample(self) -> dict[str, float]:
        """For the metrics."""
        told = {"early_stop": float(bool(self.should_stop))} if self._validations else {}
        held = {} if self.snapshots is None else {"snapshot_memory_bytes": float(self.snapshots.bytes_held())}
        return told | held

    def register(self, name: str, thing: Any) -> None:
        """See `Monitor.register`."""
        check_registrable(name, thing)
        if self.snapshots is None:
            self._say(
                "monitor.register has no effect: there is no rollback here (rollback.every_steps, mode, topology)"
            )
        else:
            self.snapshots.register(name, thing)

    @property
    def snapshot_due(self) -> bool:
        """True if the weights as they are now are to be kept; `take` follows."""
        return self.snapshots is not None and self._policy.snapshot_due and not self._paused()

    def take(self, step: int) -> None:
        """Keep the weights after `step`. If that fails on one rank the others have theirs, and the next comes."""
        self._policy.snapshot_taken()
        if self.snapshots is not None:
            self.snapshots.take(step)
            self._references = {s: known for s, known in self._references.items() if s in self.snapshots.steps}
            self._references[step] = self._detector.state_dict()

    def roll_back(self) -> Event | None:
        """The rollback that is due, if one is: on all ranks, or on none.

        Returns:
            What was done. After an action `rollback` the gradients that are there are of weights that are gone.
        """
        snapshots, newest, policy = self.snapshots, self.newest, self._policy
        if snapshots is None or newest is None or not policy.rollback_due or self._paused():
            return None
        own: tuple[int, ...] = ()
        try:
            own = snapshots.restorable()
        except Exception as error:  # the others wait for this rank's answer
            self._say(f"gradmon's snapshots can't be put back: {type(error).__name__}: {error}")
        common = self._held_by_all(own)
        if not common:
            return policy.cannot_roll_back(newest)
        failed: Exception | None = None
        try:
            snapshots.restore(common[0])
        except Exception as error:  # of a registered thing, most likely
            failed = error
        event = policy.rolled_back(newest, common[0])
        # The references of that time, not none: the guard is up at once, and what has grown since is forgotten.
        references = self._references.get(common[0])
        if references is None:
            self._detector.rebaseline()
        else:
            self._detector.load_state_dict(references)
        if self._on_any(failed is not None):
            return policy.rollback_failed(newest, f": {failed}" if failed else " on another rank")
        return event

    def _paused(self) -> bool:
        """Inside `Join` a rank that has run out of data would not come to the collective."""
        joining = self._topology.joining()
        if joining:
            self._say("rollback pauses from the first model.join() on, in which ranks run out of data one by one")
        return joining

    def rebaseline(self) -> None:
        """Forget every reference: what comes is not to be compared with what was."""
        self._detector.rebaseline()
        self._policy.rebaseline()
        self._loss_watch.rebaseline()
        self._why_stop = ""
        self._references.clear()

    def state_dict(self, step: int) -> dict[str, Any]:
        """Everything that shapes later decisions, as plain values."""
        return {
            "version": 1,
            "step": step,
            "detector": self._detector.state_dict(),
            "policy": self._policy.state_dict(),
            "loss_watch": self._loss_watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Go on where `state_dict` was taken; its step. Snapshots, which are of other weights, are dropped.

        Raises:
            ValueError: not such a state; nothing has changed.
        """
        if state.get("version") != 1 or {"step", "detector", "policy"} - state.keys():
            raise ValueError(
                f"gradmon state must have version 1 (got {state.get('version')!r}), step, detector and policy; "
                f"pass what Monitor.state_dict() returned"
            )
        detector, policy = Detector(self._config.clip, self._config.trend), Policy(self._config, self._world_size)
        losses = LossWatch(self._config.loss)
        try:
            detector.load_state_dict(state["detector"])
            policy.load_state_dict(state["policy"])
            if "loss_watch" in state:  # an older version had none
                losses.load_state_dict(state["loss_watch"])
            step = int(state["step"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"gradmon state is damaged ({error!r}); pass what Monitor.state_dict() returned") from None
        self._detector, self._policy, self.newest = detector, policy, None
        self._loss_watch, self._validations, self._why_stop = losses, 0, losses.why_stop
        self._references.clear()
        if self.snapshots is not None:
            self.snapshots.clear()
        return step

    def _held_by_all(self, own: tuple[int, ...]) -> list[int]:
        """Steps, oldest first, of which every rank has a snapshot."""
        group = self._topology.group
        if group is None or self._world_size == 1:
            return list(own)
        held_WG = torch.zeros(self._world_size, GENERATIONS, dtype=torch.int64, device=self._device)
        if own:
            held_WG[dist.get_rank(group), : len(own)] = torch.tensor(own, device=self._device)
        dist.all_reduce(held_WG, group=group)
        rows = held_WG.tolist()  # sync: before a rollback only
        return sorted(set.intersection(*(set(row) for row in rows)) - {0})

    def _on_any(self, here: bool) -> bool:
        """True if it is so on one of the ranks."""
        group = self._topology.group
        if group is None or self._world_size == 1:
            return here
        count = torch.full((), float(here), device=self._device)
        dist.all_reduce(count, group=group)
        return float(count) > 0  # sync: after a rollback only
