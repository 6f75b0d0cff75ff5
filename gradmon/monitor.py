"""`attach()` and the Monitor: one optimizer step, read top to bottom.

    before optimizer.step()   take the record of the step before, one step old: detector and policy learn from it
                              measure this step's gradients, judge them on the device, carry the verdict out
    after optimizer.step()    put back what was changed for the step, send the step's numbers to host and journal

The host never waits for the step in progress (except in the general skip, see `actions`): limits come from older
records, the verdict is reached on the device, and its numbers are read exactly one step later on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon import actions
from gradmon.actions import OptimizerActions
from gradmon.clipping import ClipWatch
from gradmon.config import Config
from gradmon.detector import Limits
from gradmon.exits import ExitWatch, TrainingStopped
from gradmon.guard import Guard
from gradmon.handshake import Agreement, AttachError
from gradmon.health import Health, HealthFile
from gradmon.landing import HostCopy, Lander, LandingStep
from gradmon.losses import LossBook, plain_loss
from gradmon.measuring import Measured, Measurer
from gradmon.plan import Plan, agree_on, begin_run, health_path, identity_of, make_plan, open_journal
from gradmon.record import StepRecord
from gradmon.reporter import Reporter
from gradmon.scaler import ScalerWatch
from gradmon.sinks import Outlets, Sink, all_sinks
from gradmon.stepping import (
    Marks,
    Nesting,
    StepInProgress,
    has_closure,
    hooks_on,
    is_due,
    marks_after,
    marks_of,
    same_tensors,
    unchanged,
    with_closure,
)
from gradmon.timing import StepClock
from gradmon.topology import gradients_of
from gradmon.updates import UpdateSample
from gradmon.watches import Watches

_active: Monitor | None = None


def attach(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    sinks: Iterable[Sink] = (),
) -> Monitor:
    """Watch and guard the training of `model`. Call it on every rank, after `DistributedDataParallel(model)`.

    Args:
        model: the module that is trained, with DDP the DDP object itself; or its parts (torchtitan's, pipeline stages).
        optimizer: the optimizer that steps its parameters, or several; also wrapped (Accelerate) or in a container.
        config: a `Config`, a mapping, or the path of a YAML file; None takes GRADMON_CONFIG or the defaults.
        sinks: where rank 0 also writes steps and events, with those of the config; see `gradmon.sinks`.

    Returns:
        The monitor, already at work; also a context manager that detaches at its end.

    Raises:
        ConfigError, EnvironmentVariableError, DirectoryError: a setting, torchrun's environment or the journal's
            directory is no good (all are ValueErrors).
        TypeError, ValueError: model and optimizer do not belong together, or a sink is none.
        AttachError: the ranks do not fit together, or one is missing; the same text on every rank that came.
        RuntimeError: a monitor is attached already.
    """
    global _active
    problem: Exception | None = None
    plan: Plan | None = None
    try:
        if _active is not None and _active.stands_in:
            _active.detach()
        if _active is not None:
            raise RuntimeError("gradmon is attached already in this process; call monitor.detach() first")
        plan = make_plan(model, optimizer, config)
        sinks = all_sinks(plan.config.sinks, sinks)
    except Exception as error:
        problem = error
    agreement = agree_on(plan, problem)
    if problem is not None or plan is None:
        raise problem or AttachError("nothing to attach")
    _active = Monitor(plan, agreement, sinks)
    return _active


class Monitor:
    """A training run under watch. Made by `attach`.

    Attributes:
        run: name of the run in metrics and page.
        journal_path: this rank's journal, None if it could not be opened.
        health_path: marker file that says whether the weights are fit to be kept, None if this rank writes none.
    """

    stands_in = False
    """True if nobody asked for it by name (`gradmon run`): the script's own `attach` replaces it."""

    def __init__(self, plan: Plan, agreement: Agreement, sinks: Iterable[Sink] = ()) -> None:
        self._watched = plan.watched
        self._topology = plan.topology
        self._config = plan.config
        self._measurer = Measurer(
            plan.watched,
            plan.topology,
            plan.config.measure,
            agree=not agreement.equal_arithmetic,
            leave_out=plan.config.leave_out.bad_rank and plan.config.mode == "guard",
            say=lambda message: self._say.once(message),
            failed=lambda error: self._failed("local", error),
        )
        self._pid = os.getpid()
        self._actions = {o: OptimizerActions(o) for o in self._watched.optimizers}
        self._handles: list[Any] = []
        self._stepped: list[Optimizer] = []
        self._nesting = Nesting()
        self._marks: dict[Optimizer, Marks] = {}
        self._clip_marks: Marks = []
        self._measured: Measured | None = None
        self._step: StepInProgress | None = None
        self._previous: LandingStep | None = None
        self._clock = StepClock(self._watched.device)
        self._closure: Optimizer | None = None
        self._one_device = len({p.device for p in self._watched.parameters}) == 1
        self._count = self._made = self._errors_seen = 0
        self._withdrawn, self._attached = False, True
        self._identity = identity_of(plan, agreement)
        self.run = self._identity.run
        self._health = HealthFile(health_path(plan, self._identity), self.run)
        self._reporter = Reporter(self._identity.rank, self._measurer.count_error, self._health)
        self._say, self._guarded, self._failed = self._reporter.say, self._reporter.guarded, self._reporter.failed
        self._losses = LossBook(self._reporter.put, self._measurer.observed)
        self._say.start()
        self._guard = Guard(self._config, self._watched, self._topology, self._say.once)
        self.health_path = self._health.path
        self._watches = Watches(plan, self._identity, self._reporter, self._clock, self._measurer)
        self._lander = Lander(
            self._identity, self._watched.names, self._watches.judge_weights, comparable=self._topology.whole_rows
        )
        self._exit_watch = ExitWatch(self._close, patient=self._topology.hook is not None)
        self._outlets = Outlets(sinks, self._identity, self._failed, self._say.once, self._exit_watch.come_first)
        samples = (self._guard.sample, self._watches.samples)
        self._journal = self._reporter.journal = open_journal(
            plan, self._identity, self._failed, self._say.once, self._health, samples, self._outlets.put
        )
        self.journal_path = self._journal and self._journal.path
        self._clip_watch = ClipWatch(self._before_clip)
        self._scaler_watch = ScalerWatch(lambda o: o in self._actions and os.getpid() == self._pid, self._left_out)
        try:
            self._start_hooks()
            with self._guarded("agent"):
                begin_run(plan, agreement, self._identity, self._guard.snapshots, self._say, acts=self._acts)
        except Exception as error:
            self._close("exception", f"{type(error).__name__}: {error}")
            raise

    # --- what the user calls ---------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._count

    @property
    def newest(self) -> StepRecord | None:
        """The newest step that is known: the one before the last, as nothing is waited for. Equal on all ranks."""
        return self._guard.newest

    @property
    def learning_rate_scale(self) -> float:
        """Factor that the next step's learning rate will be multiplied by."""
        return self._guard.scale if self._acts else 1.0

    def observe(self, *, loss: Tensor | float | None = None, validation_loss: Tensor | float | None = None) -> None:
        """Tell a loss; never synchronises. Each is a scalar tensor on any device, or a number.

        Args:
            loss: of training. Call it once per backward, before the step or after it, but always alike; the mean over
                a step's calls is recorded.
            validation_loss: of the weights as they are, whenever it was computed. Rank 0's is shown.

        Raises:
            ValueError: a tensor has more than one element.
        """
        training, validation = (None if x is None else plain_loss(x) for x in (loss, validation_loss))
        if not self._attached:
            return
        if (training, validation).count(None) > (loss, validation_loss).count(None):
            self._say.once("the loss observed is a DTensor, whole on no rank: it is left out; pass its full value")
        with self._guarded("loss"):
            if training is not None:
                if self._closure is not None:  # it is of the step that the closure is to make
                    self.end_turn()
                self._losses.add(training, stepped=self._made > 0, sent=self._measurer.sent)
            if validation is not None:
                self._losses.add_validation(validation)
                if self._journal is not None:
                    self._journal.keep_copy("validation_loss", HostCopy(validation))

    def paused(self, what: str = "evaluation") -> AbstractContextManager[None]:
        """`with monitor.paused("checkpoint"):` no step is expected and no time counted; `what` is shown."""
        return self._clock.pausing(what, self._journal.keep if self._journal is not None and self._attached else None)

    @property
    def should_stop(self) -> bool:
        """True once the validation loss has stopped improving (`loss.overtraining_patience`): to train on is a waste.

        Equal on all ranks between the same two steps; a loss observed counts from the second step after it.
        """
        return bool(self._guard.should_stop)

    def detach(self) -> None:
        """Remove every hook and patch, finish the journal. On several ranks: after the same step on all of them.

        DDP has no removal for its communication hook: that one passes gradients through from then on.
        """
        self._close("finished", "")

    def register(self, **things: Any) -> None:
        """What else a rollback is to bring back: weights averaged over steps, a GradScaler.

        Args:
            things: anything with `state_dict` and `load_state_dict`, by a name of your choice.

        Raises:
            TypeError, ValueError: a thing has not both, or its name is taken.
        """
        for name, thing in things.items():
            self._guard.register(name, thing)

    def rebaseline(self) -> None:
        """Forget what was normal: call it after a deliberate change (batch size, data mix), on all ranks alike."""
        self._take_previous()
        self._guard.rebaseline()

    def is_healthy(self) -> bool:
        """True if a checkpoint of the weights as they are now may push out an older one. Equal on all ranks.

        Waits for the newest step's numbers, as saving its weights does.
        """
        self._take_previous()
        return not self._guard.why_unfit

    def state_dict(self) -> dict[str, Any]:
        """Detector, policy and step count, to be saved with a checkpoint; equal on all ranks."""
        self._take_previous()
        return self._guard.state_dict(self._count)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. To be called on every rank with the same state.

        Raises:
            ValueError: not such a state.
        """
        self._count = self._guard.load_state_dict(state)
        with self._guarded("loss"):
            self._losses.flush()
        self._previous = None
        self._losses.forget()
        if self._reporter.ended:
            self._say.once("the journal has ended with the stop; detach and attach again to have steps written down")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = "" if error is None else f"{type(error).__name__}: {error}"
        self._close("exception" if failure else "finished", failure)

    # --- one step --------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if os.getpid() != self._pid or self._nesting.enters(optimizer):  # a forked process is not the rank
            return None
        if self._watched.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._say.once("this step is captured in a CUDA graph, whose replays call no hooks: it is not watched")
            return None
        self._scaler_watch.came(optimizer)
        with self._guarded("restore"):  # of a step that raised; before its gradients are taken for new ones
            self._actions[optimizer].restore()
        if not has_closure(args, kwargs):
            self._judge_and_act(optimizer)
            return None
        with self._guarded("before_step"):  # the gradients of this step may not exist yet
            if self._begins(optimizer):  # not so where Lightning gives each of several an empty closure
                self._end_step()
            self._closure = optimizer
            return with_closure(args, kwargs, lambda closure: self._watched_closure(optimizer, closure))
        return None

    def _watched_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            loss = closure()
            if self._closure is optimizer:  # LBFGS evaluates several times; only the first is a whole step's gradient
                self._closure = None
                self._judge_and_act(optimizer)
            return loss

        return watched

    def _judge_and_act(self, optimizer: Optimizer) -> None:
        with self._guarded("before_step"):
            if self._begins(optimizer):
                self._begin_step(optimizer)
        with self._guarded("act"):
            step = self._step
            if step is not None and step.acting:
                self._actions[optimizer].before(step.verdict, step.scale)

    def _after_step(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if os.getpid() != self._pid or self._nesting.leaves(optimizer):
            return
        with self._guarded("restore"):
            self._actions[optimizer].after()
        with self._guarded("after_step"):
            if self._closure is optimizer:  # it never called the closure
                self._closure = None
                self._begin_step(optimizer, judged=False)
            self._finish(optimizer)

    def end_turn(self) -> bool:
        """New gradients are about to come: what was stepped so far is a whole step. True if optimizers take turns."""
        ended = self._step is not None and bool(self._stepped)
        if ended:
            self._end_step()
        return ended

    def steps_now(self, optimizer: Optimizer) -> bool:
        """True inside of its step."""
        return self._nesting.depth(optimizer) > 0

    def stand_in(self, *, sums: bool) -> None:
        """Make way for the script's own `attach`. `sums`: the losses observed in a step are added up, not averaged."""
        self.stands_in, self._losses.sums = True, sums

    def _left_out(self, optimizer: Optimizer) -> None:
        """A GradScaler has found Inf and not called `optimizer.step()`: a step all the same, and not gradmon's skip."""
        with self._guarded("before_step"):
            if self._begins(optimizer):
                self._begin_step(optimizer, judged=False, left_out=True)
        with self._guarded("after_step"):
            self._finish(optimizer)

    def _finish(self, optimizer: Optimizer) -> None:
        self._stepped.append(optimizer)
        if len(self._stepped) == len(self._actions):
            self._end_step()

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        """A checkpoint taken after a step that raised must not save what was for that step only."""
        with self._guarded("restore"):
            self._actions[optimizer].restore()

    def _before_clip(self, gradients: list[Tensor], writes: int) -> None:
        """The script is about to clip: measure now, what comes later is not what backward left."""
        with self._guarded("before_clip"):
            present = self._measurer.gradients()
            if {id(g) for g in present}.isdisjoint(map(id, gradients)):
                return
            waiting = [(o, gradients_of(o)) for o in self._actions if o not in self._stepped]
            if self._step is not None and not all(self._of_this_step(o) for o, _ in waiting):
                self._end_step()
            if self._step is None and not self._measured_still():
                self._measured = self._measure(self._count + 1)
            # What the marks will be once the clip is through.
            self._clip_marks = marks_after(present, gradients, writes)
            if self._step is not None:  # a later optimizer of the step in progress clips its own
                self._marks.update({o: marks_after(g, gradients, writes) for o, g in waiting})

    def _measured_still(self) -> bool:
        """True if what was measured at the script's clip is of the gradients that are there now."""
        return self._measured is not None and unchanged(self._clip_marks, self._measurer.gradients())

    def _begins(self, optimizer: Optimizer) -> bool:
        """True for a step's first optimizer. One verdict serves all optimizers, unless new gradients came since."""
        if self._step is None:
            return True
        if optimizer in self._stepped or not self._of_this_step(optimizer):
            self._end_step()
            return True
        return False

    def _of_this_step(self, optimizer: Optimizer) -> bool:
        """True if the optimizer's gradients are those of the step in progress, also if the script has scaled them."""
        marks, gradients = self._marks.get(optimizer, []), gradients_of(optimizer)
        return unchanged(marks, gradients) or (same_tensors(marks, gradients) and not self._measurer.backward_came)

    def _begin_step(self, optimizer: Optimizer, *, judged: bool = True, left_out: bool = False) -> None:
        """Nothing here may keep this rank from `share`, where the others wait: each part fails by itself."""
        self._count += 1
        self._made += 1
        limits = Limits()
        self._take_previous()
        self._stop_if_due()
        with self._guarded("before_step"):
            limits = self._guard.limits_for(optimizer)
        rolled_back = self._prepare()
        measured, left = self._measure_for(optimizer)
        due = is_due(self._config.measure.detail_every, self._count)
        left = self._measurer.share(measured, left, extremes=due, errors=self._errors_seen)
        if not measured.synced and self._topology.acts:
            self._say.once("gradients were not averaged over the ranks here (no_sync?): such steps are left alone")
        judged = judged and measured.synced and self._measurer.may_judge()
        if measured.failed:  # what the others see as not finite is skipped here too; all else is left alone
            judged, limits = judged and self._topology.group is not None, Limits()
        verdict = actions.unjudged(measured.norm)
        if judged:
            verdict = actions.judge(measured.norm, left, limits, measured.ok)
        acting = self._acts and (judged or rolled_back)
        if rolled_back:
            verdict = actions.thrown_away(measured.norm)
        loss_scale = self._scaler_watch.scale_of(optimizer)
        self._step = StepInProgress(
            number=self._count,
            measured=measured,
            verdict=verdict,
            limits=limits,
            judged=judged and not measured.failed,
            acting=acting,
            scale=self._guard.scale if acting else 1.0,
            rate=actions.learning_rate(self._watched.optimizers[0]),
            loss_scale=None if loss_scale is None else loss_scale.clone(),  # the scaler writes to it before we read
            left_out=left_out,
            detail_due=due,
            rolled_back=rolled_back,
        )
        self._marks = {o: marks_of(gradients_of(o)) for o in self._actions} if len(self._actions) > 1 else {}
        with self._guarded("updates"):
            if self._one_device and is_due(self._config.measure.updates_every, self._count):
                self._step.updates = UpdateSample(self._watched.parameters)

    def _prepare(self) -> bool:
        """The snapshot or rollback that is due; True if the weights were replaced."""
        if not self._acts:
            return False
        event = None
        with self._guarded("snapshot"):
            if self._guard.snapshot_due:
                self._restore_all()
                self._guard.take(self._count - 1)
        with self._guarded("rollback"):
            self._restore_all()
            event = self._guard.roll_back()
        if event is not None:
            self._reporter.tell(event)
            self._stop_if_due()
        return event is not None and event.action == "rollback"

    def _restore_all(self) -> None:
        for doer in self._actions.values():  # of a step that raised
            doer.restore()

    def _stop_if_due(self) -> None:
        """Raise on every rank, before the same step: nobody is left waiting in a collective."""
        stop = self._guard.stop
        if stop is not None:
            message = f"gradmon stopped training at step {stop.step}: {stop.message}"
            self._reporter.end(message)
            raise TrainingStopped(message)

    def _measure_for(self, optimizer: Optimizer) -> tuple[Measured, Tensor | None]:
        """Of this rank, unscaled; the second is what the script's own clip has left, None if it has not clipped."""
        left: Tensor | None = None
        measured = self._measured if self._measured_still() else None
        self._measured, clipped = None, measured is not None
        if measured is None:
            measured = self._measure(self._count)
        try:
            if clipped:
                left = self._measurer.measure_left()
            scale, scaled = self._scaler_watch.scale_left(optimizer, self._actions)
            if scale is not None:
                self._measurer.unscale(measured, left, scale, scaled)
        except Exception as error:
            self._failed("before_step", error)
            measured, left = self._measurer.broken(), None
        return measured, left

    def _measure(self, number: int) -> Measured:
        """The gradients of step `number`; what `Measurer.broken` says where that fails."""
        every = self._config.measure
        try:
            return self._measurer.measure(
                extremes=is_due(every.detail_every, number),
                zeros=is_due(every.zeros_every, number),
                alarm=self._guard.limits().spike_above,
            )
        except Exception as error:
            self._failed("before_step", error)
            return self._measurer.broken()

    def _end_step(self) -> None:
        step, self._step = self._step, None
        ready = self._measurer.ready
        self._stepped.clear()
        self._measurer.forget()
        if step is None:
            return
        with self._guarded("replicas"):
            self._measurer.compare_weights(due=is_due(self._config.replicas.check_every, self._count + 1))
        updates = moments_PM = None
        with self._guarded("updates"):
            if step.updates is not None:
                updates, moments_PM = step.updates.ratios(), self._watches.moments()
        step_seconds, busy = self._clock.end_step(ready)
        self._previous = self._lander.land(
            step,
            step_seconds=step_seconds,
            busy=busy,
            data_wait_seconds=self._watches.waited(),
            updates=updates,
            moments_PM=moments_PM,
            with_details=self._journal is not None and not self._journal.behind,
        )
        with self._guarded("loss"):
            self._losses.end_step(self._previous, first=self._made == 1)
        self._watches.end_step(step.number)

    def _take_previous(self) -> None:
        """Learn from the step before: the only wait, for an event that is one step old."""
        previous, self._previous = self._previous, None
        if previous is not None:
            with self._guarded("learn"):
                self._learn(previous)

    def _learn(self, previous: LandingStep) -> None:
        peeked = previous.peek()
        self._errors_seen = peeked.errors
        self._watches.learn(peeked, self._guard.learn(peeked, acts=self._acts), self._guard)
        self._reporter.tell_health(Health(peeked.record.step, self._guard.why_unfit, self._guard.last_healthy_step))
        if self._errors_seen and not self._withdrawn:
            self._withdrawn = True
            self._say.once("gradmon failed on one of the ranks; from here on all only watch, so that they stay equal")

    # --- life ------------------------------------------------------------------------------------------------------

    @property
    def _acts(self) -> bool:
        return self._config.mode == "guard" and self._topology.acts and not self._withdrawn

    def _start_hooks(self) -> None:
        self._measurer.start()
        self._scaler_watch.start()
        self._handles = hooks_on(self._actions, self._before_step, self._after_step, self._before_state_dict)
        if not self._clip_watch.start():
            self._say.once("this torch has no clip function to be watched: a clip by the script is seen afterwards")
        self._exit_watch.start()
        self._watches.start()

    def _close(self, end: Literal["finished", "exception"], detail: str) -> None:
        global _active
        if not self._attached or os.getpid() != self._pid:  # a forked DataLoader worker is not the rank
            return
        self._attached = False
        if _active is self:
            _active = None
        with self._guarded("detach"):
            self.end_turn()
            self._losses.flush()
            if self._previous is not None and self._previous.landed():  # a hung device must not hold the end
                self._take_previous()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for part in (self._clip_watch, self._scaler_watch, self._exit_watch, self._watches, self._measurer):
            part.stop()
        with self._guarded("detach"):
            self._restore_all()
        if self._journal is not None:
            self._journal.close(end, detail)
        self._outlets.close()
        self._reporter.stop()
