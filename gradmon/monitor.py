"""`attach()` and the Monitor: one optimizer step, read top to bottom.

    before optimizer.step()   take the record of the step before, one step old: detector and policy learn from it
                              measure this step's gradients, judge them on the device, carry the verdict out
    after optimizer.step()    put back what was changed for the step, send the step's numbers to host and journal

The host never waits for the step in progress (except in the general skip, see `actions`): limits come from older
records, the verdict is reached on the device, and its numbers are read exactly one step later on every rank.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon import actions
from gradmon.actions import OptimizerActions
from gradmon.agent.start import start_agent
from gradmon.clipping import ClipWatch
from gradmon.config import Config
from gradmon.detector import Detector, Limits
from gradmon.exits import ExitWatch
from gradmon.handshake import Agreement, AttachError
from gradmon.landing import HostCopy, LandingStep, land
from gradmon.log import Announcer
from gradmon.losses import MOST_LOSSES, mean_loss, plain_loss
from gradmon.measuring import Measured, Measurer
from gradmon.noise import NoiseScale
from gradmon.plan import Plan, agree_on, identity_of, make_plan, open_journal
from gradmon.policy import Policy, incident
from gradmon.record import Event
from gradmon.scaler import ScalerWatch
from gradmon.stepping import (
    Marks,
    Nesting,
    StepInProgress,
    has_closure,
    is_due,
    marks_after,
    marks_of,
    same_tensors,
    unchanged,
    with_closure,
)
from gradmon.topology import gradients_of
from gradmon.updates import UpdateSample

#: Parts whose failure may have made this rank decide otherwise than the rest: then all ranks only watch.
_DECIDING = frozenset({"local", "before_clip", "before_step", "act", "restore", "after_step"})
_active: Monitor | None = None


def attach(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Monitor:
    """Watch and guard the training of `model`. Call it on every rank, after `DistributedDataParallel(model)`.

    Args:
        model: the module that is trained; with DDP the DDP object itself.
        optimizer: the optimizer that steps its parameters, or several.
        config: a `Config`, a mapping, or the path of a YAML file; None takes GRADMON_CONFIG or the defaults.

    Returns:
        The monitor, already at work; also a context manager that detaches at its end.

    Raises:
        ConfigError, EnvironmentVariableError, DirectoryError: a setting, torchrun's environment or the journal's
            directory is no good (all are ValueErrors).
        TypeError, ValueError: model and optimizer do not belong together.
        AttachError: the ranks do not fit together, or one is missing; the same text on every rank that came.
        RuntimeError: a monitor is attached already.
    """
    global _active
    problem: Exception | None = None
    plan: Plan | None = None
    try:
        if _active is not None:
            raise RuntimeError("gradmon is attached already in this process; call monitor.detach() first")
        plan = make_plan(model, optimizer, config)
    except Exception as error:
        problem = error
    agreement = agree_on(plan, problem)
    if problem is not None or plan is None:
        raise problem or AttachError("nothing to attach")
    _active = Monitor(plan, agreement)
    return _active


class Monitor:
    """A training run under watch. Made by `attach`.

    Attributes:
        run: name of the run in metrics and page.
        journal_path: this rank's journal, None if it could not be opened.
    """

    def __init__(self, plan: Plan, agreement: Agreement) -> None:
        self._watched = plan.watched
        self._topology = plan.topology
        self._config = plan.config
        self._measurer = Measurer(
            plan.watched,
            plan.topology,
            plan.config.measure,
            agree=not agreement.equal_arithmetic,
            say=lambda message: self._say.once(message),
            failed=lambda error: self._failed("local", error),
        )
        self._noise = NoiseScale()
        self._pid = os.getpid()
        self._detector = Detector(self._config.clip)
        self._policy = Policy(self._config.backoff)
        self._actions = {o: OptimizerActions(o) for o in self._watched.optimizers}
        self._handles: list[Any] = []
        self._stepped: list[Optimizer] = []
        self._nesting = Nesting()
        self._marks: dict[Optimizer, Marks] = {}
        self._clip_marks: Marks = []
        self._measured: Measured | None = None
        self._step: StepInProgress | None = None
        self._previous: LandingStep | None = None
        self._awaiting_loss: LandingStep | None = None
        self._losses: list[Tensor] = []
        self._loss_follows: bool | None = None
        self._closure: Optimizer | None = None
        self._one_device = len({p.device for p in self._watched.parameters}) == 1
        self._count = 0
        self._made = 0
        self._errors_seen = 0
        self._last_end: float | None = None
        self._withdrawn = False
        self._attached = True
        self._identity = identity_of(plan, agreement)
        self.run = self._identity.run
        self._say = Announcer(self._identity.rank)
        self._say.start()
        self._journal = open_journal(plan, self._identity, self._failed, self._say.once)
        self.journal_path = None if self._journal is None else self._journal.path
        self._clip_watch = ClipWatch(self._before_clip)
        self._scaler_watch = ScalerWatch(lambda optimizer: optimizer in self._actions, self._left_out)
        self._exit_watch = ExitWatch()
        try:
            self._start_hooks()
            self._say_start(agreement)
            if self._identity.local_rank == 0 and self._config.agent.start == "auto":
                with self._guarded("agent"):
                    start_agent(plan.directory, self._config, self._say)
        except Exception as error:
            self._close("exception", f"{type(error).__name__}: {error}")
            raise
        atexit.register(self._at_exit)

    # --- what the user calls ---------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._count

    @property
    def learning_rate_scale(self) -> float:
        """Factor that the next step's learning rate will be multiplied by."""
        return self._policy.scale if self._acts else 1.0

    def observe(self, *, loss: Tensor | float) -> None:
        """Tell the loss; never synchronises. Call it once per backward, before the step or after it, but always alike.

        Args:
            loss: a scalar tensor on any device, or a number. The mean over a step's calls is recorded.

        Raises:
            ValueError: the tensor has more than one element.
        """
        value = plain_loss(loss)
        if not self._attached:
            return
        if value is None:
            self._say.once(
                "the loss observed is a DTensor that no rank holds whole: it is left out; pass its full value"
            )
            return
        if self._loss_follows is None:
            self._loss_follows = self._made > 0
        self._losses = [*self._losses[1 - MOST_LOSSES :], value]
        self._measurer.observe(value)
        if self._loss_follows and self._awaiting_loss is not None:
            self._write_step(self._awaiting_loss)

    def detach(self) -> None:
        """Remove every hook and patch, finish the journal. On several ranks: after the same step on all of them.

        DDP has no removal for its communication hook: that one passes gradients through from then on.
        """
        self._close("finished", "")

    def state_dict(self) -> dict[str, Any]:
        """Detector, policy and step count, to be saved with a checkpoint; equal on all ranks."""
        self._take_previous()
        return {
            "version": 1,
            "step": self._count,
            "detector": self._detector.state_dict(),
            "policy": self._policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. To be called on every rank with the same state.

        Raises:
            ValueError: not such a state.
        """
        if state.get("version") != 1 or {"step", "detector", "policy"} - state.keys():
            raise ValueError(
                f"gradmon state must have version 1 (got {state.get('version')!r}), step, detector and policy; "
                f"pass what Monitor.state_dict() returned"
            )
        if self._awaiting_loss is not None:
            self._write_step(self._awaiting_loss)
        self._previous = None
        self._losses.clear()
        self._count = int(state["step"])
        self._detector.load_state_dict(state["detector"])
        self._policy.load_state_dict(state["policy"])

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close("finished", "")
        else:
            self._close("exception", f"{type(error).__name__}: {error}")

    # --- one step --------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._nesting.enters(optimizer):
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
        with self._guarded("before_step"):  # the gradients of this step do not exist yet
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
        if self._nesting.leaves(optimizer):
            return
        with self._guarded("restore"):
            self._actions[optimizer].after()
        with self._guarded("after_step"):
            if self._closure is optimizer:  # it never called the closure
                self._closure = None
                self._begin_step(optimizer, judged=False)
            self._finish(optimizer)

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
            waiting = [(o, gradients_of(o)) for o in self._waiting()]
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

    def _waiting(self) -> list[Optimizer]:
        return [o for o in self._actions if o not in self._stepped]

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
        with self._guarded("before_step"):
            self._take_previous()
            limits = self._limits(optimizer)
        measured, left = self._measure_for(optimizer)
        due = is_due(self._config.measure.detail_every, self._count)
        left = self._measurer.share(measured, left, extremes=due, errors=self._errors_seen)
        if not measured.synced and self._topology.acts:
            self._say.once(
                "gradients were not averaged over the ranks in this step (no_sync?): such steps are left alone"
            )
        judged = judged and measured.synced and self._may_judge()
        if measured.failed:  # what the others see as not finite is skipped here too; all else is left alone
            judged, limits = judged and self._topology.group is not None, Limits()
        verdict = actions.unjudged(measured.norm)
        if judged:
            verdict = actions.judge(measured.norm, left, limits, measured.ok)
        acting = self._acts and judged
        loss_scale = self._scaler_watch.scale_of(optimizer)
        self._step = StepInProgress(
            self._count,
            measured,
            verdict,
            limits,
            judged and not measured.failed,
            acting,
            self._policy.scale if acting else 1.0,
            actions.learning_rate(self._watched.optimizers[0]),
            None if loss_scale is None else loss_scale.clone(),  # the scaler writes to it before we read
            left_out,
            due,
            None,
        )
        self._marks = {o: marks_of(gradients_of(o)) for o in self._actions} if len(self._actions) > 1 else {}
        with self._guarded("updates"):
            if self._one_device and is_due(self._config.measure.updates_every, self._count):
                self._step.updates = UpdateSample(self._watched.parameters)

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

    def _limits(self, optimizer: Optimizer) -> Limits:
        limits = self._detector.limits()
        if not actions.evaluates_repeatedly(optimizer):
            return limits
        # It compares the gradients of one step with each other: skipping the first is exact, rescaling it is not.
        if math.isfinite(limits.max_norm):
            self._say.once(f"clip.max_norm has no effect on {type(optimizer).__name__}, which compares gradients")
        return Limits(spike_above=limits.spike_above)

    def _measure(self, number: int) -> Measured:
        """The gradients of step `number`; what `Measurer.broken` says where that fails."""
        every = self._config.measure
        try:
            return self._measurer.measure(
                extremes=is_due(every.detail_every, number),
                zeros=is_due(every.zeros_every, number),
                alarm=self._detector.limits().spike_above,
            )
        except Exception as error:
            self._failed("before_step", error)
            return self._measurer.broken()

    def _may_judge(self) -> bool:
        """False inside `Join` where it makes a difference."""
        if self._topology.hook is not None and self._topology.divides_by_those_left():
            self._say.once(
                "model.join(divide_by_initial_world_size=False) has no effect while gradmon is attached: gradients are "
                "divided by the initial world size"
            )
        return self._measurer.may_judge

    def _end_step(self) -> None:
        step, self._step = self._step, None
        self._stepped.clear()
        self._measurer.forget()
        if step is None:
            return
        now = time.monotonic()
        updates = None
        with self._guarded("updates"):
            updates = None if step.updates is None else step.updates.ratios()
        landing = land(
            step,
            step_seconds=None if self._last_end is None else now - self._last_end,
            rank=self._identity.rank,
            world_size=self._identity.world_size,
            names=self._watched.names,
            comparable=self._topology.whole_rows,
            noise=self._noise,
            updates=updates,
            with_details=self._journal is not None and not self._journal.behind,
        )
        self._last_end = now
        if self._awaiting_loss is not None:
            self._write_step(self._awaiting_loss)
        self._previous = landing
        if self._loss_follows or (self._loss_follows is None and self._made == 1):
            self._awaiting_loss = self._previous  # a loop that observes after its step does so next
        else:
            self._write_step(self._previous)

    def _write_step(self, landing: LandingStep) -> None:
        losses, self._losses = self._losses, []
        self._awaiting_loss = None
        if losses:
            with self._guarded("loss"):
                landing.loss = HostCopy(mean_loss(losses))
        if self._journal is not None:
            self._journal.put(landing)

    def _take_previous(self) -> None:
        """Learn from the step before: the only wait, for an event that is one step old."""
        previous, self._previous = self._previous, None
        if previous is None:
            return
        record, self._errors_seen = previous.peek()
        if record.reason not in ("unsynced", "scaler_skip"):
            self._detector.update(record.grad_norm)
        for event in filter(None, (incident(record), *self._policy.update(record))):
            self._tell(event)
        if self._errors_seen and not self._withdrawn:
            self._withdrawn = True
            self._say.once(
                "gradmon failed on one of the ranks; from here on all ranks only watch, so that they stay equal"
            )

    # --- life ------------------------------------------------------------------------------------------------------

    @property
    def _acts(self) -> bool:
        return self._config.mode == "guard" and self._topology.acts and not self._withdrawn

    def _start_hooks(self) -> None:
        self._measurer.start()
        self._scaler_watch.start()
        for optimizer in self._actions:
            # A hook traced into a compiled step would be silently ignored.
            for register, hook in (
                (optimizer.register_step_pre_hook, self._before_step),
                (optimizer.register_step_post_hook, self._after_step),
                (optimizer.register_state_dict_pre_hook, self._before_state_dict),
            ):
                self._handles.append(register(torch.compiler.disable(hook)))  # type: ignore[no-untyped-call]
        if not self._clip_watch.start():
            self._say.once(
                "this torch has no clip function that can be watched: a clip by the script is seen afterwards"
            )
        self._exit_watch.start()

    def _say_start(self, agreement: Agreement) -> None:
        if self._identity.rank != 0:
            return
        mode = "guarding" if self._acts else "watching"
        self._say.once(f"{mode} run {self.run} ({self._identity.world_size} ranks)", logging.INFO)
        if "~" in self.run:
            self._say.once(f"another run of that name is alive: this one is called {self.run} in metrics and page")
        if not self._topology.acts:
            self._say.once(f"only watching, not acting: {self._topology.why}")
        elif not agreement.equal_arithmetic:
            self._say.once("devices, thread counts or torch differ between ranks: one more small all-reduce per step")

    def _tell(self, event: Event) -> None:
        """The culprit speaks of what is its own, rank 0 of the rest."""
        of_streak = event.kind in ("spike_streak", "scaler_streak")
        if of_streak and self._journal is not None:
            self._journal.put(event)
        speaker = event.rank if event.rank is not None and not of_streak else 0
        if self._identity.rank == speaker:
            self._say.event(event.kind, f"step {event.step}: {event.message}")

    @contextlib.contextmanager
    def _guarded(self, part: str) -> Iterator[None]:
        """Promise 7: a failure of ours becomes a counter and one warning, never an exception in training."""
        try:
            with torch.no_grad():  # gradients of backward(create_graph=True) carry a graph of their own
                yield
        except Exception as error:
            self._failed(part, error)

    def _failed(self, part: str, error: Exception) -> None:
        if part in _DECIDING:
            self._measurer.count_error()
        if part != "journal" and self._journal is not None:  # the writer counts its own
            self._journal.count("gradmon_errors_total", (part,))
        where = traceback.extract_tb(error.__traceback__)
        at = f" at {Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
        self._say.once(f"gradmon's own {part} failed, training goes on: {type(error).__name__}: {error}{at}")

    def _at_exit(self) -> None:
        failure = self._exit_watch.failure()
        if self._topology.hook is not None:
            # gloo's threads may still have to drop the hook's last callbacks, for which they need the interpreter's
            # lock; a thread that asks for it while the interpreter is being torn down aborts the process.
            time.sleep(0.05)
        self._close("exception" if failure else "finished", failure)

    def _close(self, end: Literal["finished", "exception"], detail: str) -> None:
        global _active
        if not self._attached or os.getpid() != self._pid:  # a forked DataLoader worker is not the rank
            return
        self._attached = False
        if _active is self:
            _active = None
        with self._guarded("detach"):
            if self._step is not None and self._stepped:
                self._end_step()
            if self._awaiting_loss is not None:
                self._write_step(self._awaiting_loss)
            if self._previous is not None and self._previous.landed():  # a hung device must not hold the end
                self._take_previous()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clip_watch.stop()
        self._scaler_watch.stop()
        self._exit_watch.stop()
        self._measurer.stop()
        for doer in self._actions.values():
            with self._guarded("detach"):
                doer.restore()
        if self._journal is not None:
            self._journal.close(end, detail)
        self._say.stop()
        atexit.unregister(self._at_exit)
