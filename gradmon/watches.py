"""What looks beyond the gradients of a step: at batches on their way in, at time spent waiting for them, and at what an
incident leaves behind."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradmon.data_watch import BatchWatch
from gradmon.diagnose.bundle import Draft
from gradmon.diagnose.capture import Capture
from gradmon.guard import Guard
from gradmon.landing import JudgeWeights, Peeked
from gradmon.measuring import Measurer
from gradmon.plan import Plan
from gradmon.record import Event, Finding, RankIdentity, StepRecord
from gradmon.reporter import Reporter
from gradmon.timing import DataWatch, StepClock
from gradmon.weight_watch import MomentSample, WeightWatch


class Watches:
    """One rank's.

    Args:
        plan: model and settings.
        identity: who this rank is.
        reporter: is told what is found.
        clock: tells of pauses, in which batches are those of an evaluation.
        measurer: knows of backwards and observed losses.
    """

    def __init__(
        self, plan: Plan, identity: RankIdentity, reporter: Reporter, clock: StepClock, measurer: Measurer
    ) -> None:
        self._settings: Mapping[str, Any] = plan.config.to_dict()
        self._identity = identity
        self._reporter = reporter
        self._measurer = measurer
        self._loads = False
        self._batches = BatchWatch(plan.config.data)
        self._waiting = DataWatch(clock, self._loaded)
        self._capture = Capture(plan.topology.model, plan.watched.device, plan.config.incident, reporter.guarded)
        self._capture.loaded = self._batches.loaded
        self._capture.backwards = lambda: measurer.backwards
        self._capture.seen = self._forward
        settings = plan.config.weights
        self._parameters = parameters = plan.watched.parameters
        self._shapes: list[tuple[int, ...]] = []
        self._weights = WeightWatch(settings, plan.watched.names, self._shapes)
        self.judge_weights: JudgeWeights | None = self._judge_weights if identity.rank == 0 else None
        """On rank 0, whose journal holds what is known of each parameter."""
        self._moments: MomentSample | None = None
        one_device = len({p.device for p in parameters}) == 1
        if settings.moments and one_device and identity.rank == 0:
            self._moments = MomentSample(plan.watched.optimizers, parameters)

    def start(self) -> None:
        """Begin to look."""
        self._batches.start()
        self._waiting.start()
        if self._capture.why_nothing and self._settings["incident"]["bundles"]:
            self._reporter.say.once(f"no incident bundles of this model: {self._capture.why_nothing}")

    def stop(self) -> None:
        """Remove every hook and patch."""
        self._batches.stop()
        self._waiting.stop()
        self._capture.stop()

    def waited(self) -> float | None:
        """Seconds this rank has waited for its DataLoader since the last call; None until it has used one."""
        return self._waiting.take()

    def samples(self) -> dict[str, float]:
        """For the metrics."""
        return self._batches.samples() | self._weights.samples()

    def moments(self) -> Tensor | None:
        """[P, 2], see `MomentSample`; None where they are not measured. Nothing is read back."""
        with self._reporter.guarded("moments"):  # the update ratios, which come with them, must not be lost
            return None if self._moments is None else self._moments.norms()
        return None

    def end_step(self, number: int) -> None:
        """Optimizer step `number` has ended; tells what its batches showed."""
        self._capture.step_ended(number)
        self._tell(number)

    def learn(self, peeked: Peeked, events: Sequence[Event], guard: Guard) -> None:
        """A step is known, one step later: tell of it; if it broke, keep what is needed to run it again.

        Args:
            peeked: the step.
            events: what the guard says of it.
            guard: judges the losses.
        """
        for event in events:
            self._reporter.tell(event)
        for event in self._of_losses(peeked, guard):
            self._reporter.tell(event)
            if event.kind in ("loss_nonfinite", "loss_spike"):
                self._look_again(event.step)
        # A GradScaler's skip is no incident, but ten in a row are.
        broken = peeked.record.broken or any(event.kind == "scaler_streak" for event in events)
        if broken and self._identity.rank == (peeked.record.culprit_rank or 0):
            self._keep(peeked.record)

    def _of_losses(self, peeked: Peeked, guard: Guard) -> Sequence[Event]:
        try:  # not `guarded`, which is dearer: in every step
            return guard.watch_losses(peeked, late=self._measurer.observed.late)
        except Exception as error:
            self._reporter.failed("loss_watch", error)
            return ()

    def _keep(self, record: StepRecord) -> None:
        journal = self._reporter.journal
        if journal is None:
            return
        self._look_again(record.step)
        with self._reporter.guarded("capture"):
            draft = self._capture.save(record, identity=self._identity, settings=self._settings, journal=journal.path)
            if draft is not None:
                journal.call("capture", lambda: self._write(draft))

    def _write(self, draft: Draft) -> None:
        """On the journal's thread."""
        path = draft.write()
        self._reporter.say.event(
            "bundle", f"saved what broke; run it again: gradmon replay {path} --model MODULE:FACTORY"
        )

    def _judge_weights(self, step: int, detail: bytes | None, moments_PM: list[list[float]] | None) -> list[Finding]:
        self._shapes += [tuple(p.shape) for p in self._parameters[len(self._shapes) :]]  # an optimizer may get more
        found = self._weights.update(step, detail, moments_PM)
        for finding in found:
            self._reporter.say.event(finding.rule, f"step {step}: {finding.message}")
        return found

    def _look_again(self, step: int) -> None:
        """Whatever the cadence: something broke."""
        with self._reporter.guarded("data_watch"):
            self._batches.look_again()
        self._tell(step)

    def _tell(self, step: int) -> None:
        try:
            found = self._batches.take()
        except Exception as error:
            self._reporter.failed("data_watch", error)
            return
        for finding in found:
            self._reporter.tell(finding.event(step, time.time(), self._identity.rank))

    def _loaded(self, iterator: Any, batch: Any) -> None:
        self._loads = True
        with self._reporter.guarded("data_watch"):
            self._batches.seen(iterator, batch)

    def _forward(self, inputs: Mapping[str, Any]) -> None:
        """A model that is not fed by a DataLoader: look at what it is given."""
        if not self._loads:
            self._batches.observe(inputs)
