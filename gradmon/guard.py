"""Detector, policy and snapshots as one: what a finished step teaches, and what the next one may be.

All that is decided here is decided by values that are equal on all ranks, at the same step. Only `prepare` speaks to
the other ranks, and only before a rollback: a snapshot may have failed on one of them.
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
from gradmon.policy import Policy, Trend, incident
from gradmon.record import Event, StepRecord
from gradmon.snapshot import GENERATIONS, Snapshots
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
        self._say = say
        group = topology.group
        self._detector = Detector(config.clip, config.trend)
        self._policy = Policy(config, 1 if group is None else dist.get_world_size(group))
        self._newest: StepRecord | None = None
        self._learned = 0
        self.snapshots: Snapshots | None = None
        """None unless rollback is switched on and can be done here."""
        if config.rollback.every_steps and config.mode == "guard" and topology.acts:
            parameters = dict(zip(watched.names, watched.parameters, strict=True))
            self.snapshots = Snapshots(topology.model, parameters, watched.optimizers)
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
    def last_healthy_step(self) -> int:
        """Newest step after which the weights were fit to be kept; 0 before the first."""
        return self._policy.last_healthy_step

    def limits(self) -> Limits:
        """How the next step will be judged."""
        limits = self._detector.limits()
        return dataclasses.replace(limits, skip_above=limits.spike_above) if self._policy.skips_spikes else limits

    def limits_for(self, optimizer: Optimizer) -> Limits:
        """The same, for the optimizer whose step it is."""
        limits = self.limits()
        if not evaluates_repeatedly(optimizer):
            return limits
        # It compares the gradients of one step with each other: skipping the first is exact, rescaling it is not.
        if math.isfinite(limits.max_norm):
            self._say(f"clip.max_norm has no effect on {type(optimizer).__name__}, which compares gradients")
        return Limits(spike_above=limits.spike_above, skip_above=limits.skip_above)

    def learn(self, peeked: Peeked, *, acts: bool) -> list[Event]:
        """Take in a finished step; what is to be told of it. `acts`: whether gradmon does what it decides."""
        record = self._newest = peeked.record
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

    def prepare(self, step: int) -> Event | None:
        """Before step `step`, on all ranks: take the snapshot or do the rollback that is due.

        Returns:
            What was rolled back, if anything was: then the gradients that are there are of weights that are gone.
        """
        snapshots, newest, policy = self.snapshots, self._newest, self._policy
        if snapshots is None or newest is None or self._topology.joining():
            return None
        if policy.snapshot_due:
            policy.snapshot_taken()  # first: a snapshot that fails on one rank must not change when the next is due
            snapshots.take(step - 1)
            self._references = {s: known for s, known in self._references.items() if s in snapshots.steps}
            self._references[step - 1] = self._detector.state_dict()
        if not policy.rollback_due:
            return None
        common = self._held_by_all(snapshots.steps)
        if not common:
            return policy.cannot_roll_back(newest)
        snapshots.restore(common[0])
        # The references of that time, not none: the guard is up at once, and what has grown since is forgotten.
        self._detector.load_state_dict(self._references[common[0]])
        return policy.rolled_back(newest, common[0])

    def rebaseline(self) -> None:
        """Forget every reference: what comes is not to be compared with what was."""
        self._detector.rebaseline()
        self._policy.rebaseline()

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes later decisions, as plain values."""
        return {"detector": self._detector.state_dict(), "policy": self._policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Snapshots are of the weights before and are dropped."""
        self._detector.load_state_dict(state["detector"])
        self._policy.load_state_dict(state["policy"])
        self._newest = None
        self._references.clear()
        if self.snapshots is not None:
            self.snapshots.clear()

    def _held_by_all(self, own: tuple[int, ...]) -> list[int]:
        """Steps, oldest first, of which every rank has a snapshot."""
        group = self._topology.group
        if group is None or dist.get_world_size(group) == 1:
            return list(own)
        held_WG = torch.zeros(dist.get_world_size(group), GENERATIONS, dtype=torch.int64, device=self._device)
        if own:
            held_WG[dist.get_rank(group), : len(own)] = torch.tensor(own, device=self._device)
        dist.all_reduce(held_WG, group=group)
        rows = held_WG.tolist()  # sync: before a rollback only
        return sorted(set.intersection(*(set(row) for row in rows)) - {0})
