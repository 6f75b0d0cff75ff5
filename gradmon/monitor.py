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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon import actions, stats
from gradmon.actions import OptimizerActions
from gradmon.agent.start import start_agent
from gradmon.clipping import ClipWatch
from gradmon.config import Config
from gradmon.detector import Detector
from gradmon.exits import ExitWatch
from gradmon.handshake import Agreement, AttachError
from gradmon.journal import JournalWriter, journal_path
from gradmon.landing import HostCopy, LandingStep, StepContext, pack
from gradmon.local import ROW_SUM_OF_SQUARES, rank_row
from gradmon.log import Announcer
from gradmon.plan import Plan, agree_on, identity_of, make_plan
from gradmon.policy import Policy, incident
from gradmon.record import Event
from gradmon.resources import Sampler
from gradmon.stepping import (
    Marks,
    Measured,
    StepInProgress,
    gradients_of,
    has_closure,
    inside_own_step,
    marks_of,
    unchanged,
)

#: Parts whose failure may have made this rank decide otherwise than the rest: then all ranks only watch.
_DECIDING = frozenset({"local", "before_clip", "after_clip", "before_step", "act", "restore", "after_step"})


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
        self._group = plan.topology.group if not agreement.equal_arithmetic else None
        self._pid = os.getpid()
        self._detector = Detector(self._config.clip)
        self._policy = Policy(self._config.backoff)
        self._actions = {o: OptimizerActions(o) for o in self._watched.optimizers}
        self._watched_set = set(self._watched.parameters)
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._handles: list[Any] = []
        self._stepped: list[Optimizer] = []
        self._depth: Counter[Optimizer] = Counter()
        self._held = len([p for o in self._actions for group in o.param_groups for p in group["params"]])
        self._marks: dict[Optimizer, Marks] = {}
        self._clip_marks: Marks = []
        self._measured: Measured | None = None
        self._step: StepInProgress | None = None
        self._previous: LandingStep | None = None
        self._awaiting_loss: LandingStep | None = None
        self._losses: list[Tensor] = []
        self._loss_follows: bool | None = None
        self._judge_late = False
        self._count = 0
        self._last_end: float | None = None
        self._errors = 0
        self._withdrawn = False
        self._attached = True
        self._identity = identity_of(plan, agreement)
        self.run = self._identity.run
        self._say = Announcer(self._identity.rank)
        self._say.start()
        self._journal = self._open_journal(plan)
        self.journal_path = None if self._journal is None else self._journal.path
        self._clip_watch = ClipWatch(self._before_clip, self._after_clip)
        self._exit_watch = ExitWatch()
        try:
            self._start_hooks()
            self._tell_start(plan)
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
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss must hold one element (got shape {tuple(loss.shape)}); pass its mean")
            value = loss.detach().reshape(()).to(torch.float64, copy=True)
        else:
            value = torch.tensor(float(loss), dtype=torch.float64)
        if not self._attached:
            return
        if self._loss_follows is None:
            self._loss_follows = self._count > 0
        self._losses.append(value)
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
        self._previous = None
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

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._nested(optimizer):
            return
        with self._guarded("restore"):  # of a step that raised; before its gradients are taken for new ones
            self._actions[optimizer].restore()
        with self._guarded("before_step"):
            if has_closure(args, kwargs):  # the gradients of this step do not exist yet: see _after_step
                self._end_step()
                self._judge_late = True
            elif self._begins(optimizer):
                self._begin_step(optimizer)
        with self._guarded("act"):
            step = self._step
            if step is not None and step.acting:
                self._actions[optimizer].before(step.verdict, step.scale)

    def _after_step(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self._depth[optimizer] -= 1
        if self._depth[optimizer] > 0:
            return
        with self._guarded("restore"):
            self._actions[optimizer].after()
        with self._guarded("after_step"):
            if self._judge_late:
                self._judge_late = False
                self._say.once("optimizer.step(closure) computes its gradients inside the step: only watching")
                self._begin_step(optimizer, judged=False)
            self._stepped.append(optimizer)
            if len(self._stepped) == len(self._actions):
                self._end_step()

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        """A checkpoint taken after a step that raised must not save what was for that step only."""
        with self._guarded("restore"):
            self._actions[optimizer].restore()

    def _nested(self, optimizer: Optimizer) -> bool:
        """True if this is a base class's `step`, called by the optimizer's own: torch's hooks fire for both."""
        if self._depth[optimizer] > 0 and not inside_own_step(optimizer):
            self._depth[optimizer] = 0  # the step before raised, and never came to its post hook
        self._depth[optimizer] += 1
        return self._depth[optimizer] > 1

    def _before_clip(self, parameters: list[Tensor]) -> None:
        """The script is about to clip: measure now, what comes later is not what backward left."""
        with self._guarded("before_clip"):
            if self._watched_set.isdisjoint(parameters):
                return
            if self._step is not None:
                if all(unchanged(self._marks.get(o, []), gradients_of(o)) for o in self._waiting()):
                    return  # a later optimizer of the step in progress clips its own
                self._end_step()
            if not self._measured_still():
                self._measured = self._measure(None)

    def _after_clip(self, parameters: list[Tensor]) -> None:
        with self._guarded("after_clip"):
            if self._watched_set.isdisjoint(parameters):
                return
            self._clip_marks = marks_of(self._present())
            self._marks.update(
                {o: marks_of(gradients_of(o)) for o in self._waiting()} if self._step is not None else {}
            )

    def _measured_still(self) -> bool:
        """True if what was measured at the script's clip is of the gradients that are there now."""
        return self._measured is not None and unchanged(self._clip_marks, self._present())

    def _waiting(self) -> list[Optimizer]:
        return [o for o in self._actions if o not in self._stepped]

    def _begins(self, optimizer: Optimizer) -> bool:
        """True for a step's first optimizer. One verdict serves all optimizers, unless new gradients came since."""
        if self._step is None:
            return True
        if optimizer in self._stepped or not unchanged(self._marks.get(optimizer, []), gradients_of(optimizer)):
            self._end_step()
            return True
        return False

    def _begin_step(self, optimizer: Optimizer, *, judged: bool = True) -> None:
        self._take_previous()
        limits = self._detector.limits()
        try:
            measured = self._measured if self._measured_still() else None
            self._measured, clipped = None, measured is not None
            if measured is None:
                measured = self._measure(optimizer)
        except Exception:
            self._abstain()
            raise
        if not measured.synced and self._topology.acts:
            self._say.once(
                "gradients were not averaged over the ranks in this step (no_sync?): such steps are left alone"
            )
        judged = judged and measured.synced and self._may_judge()
        if judged:
            left = stats.total_norm(self._stats()[0]) if clipped else measured.norm
            verdict = actions.judge(*self._agreed(measured.norm, left), limits)
        else:
            verdict = actions.unjudged(measured.norm)
        acting = self._acts and judged
        scale = self._policy.scale if acting else 1.0
        rate = actions.learning_rate(self._watched.optimizers[0])
        self._step = StepInProgress(measured, verdict, limits, judged, acting, scale, rate)
        if len(self._actions) > 1:
            self._marks = {o: marks_of(gradients_of(o)) for o in self._actions}

    def _may_judge(self) -> bool:
        """False inside `Join` where it makes a difference."""
        hook = self._topology.hook
        if hook is None or not hook.joining():
            return True
        if hook.divides_by_those_left():
            self._say.once(
                "model.join(divide_by_initial_world_size=False) has no effect while gradmon is attached: gradients are "
                "divided by the initial world size"
            )
        return self._group is None  # a rank that has run out of data would miss the all-reduce at step time

    def _end_step(self) -> None:
        step, self._step = self._step, None
        self._stepped.clear()
        if self._topology.hook is not None:
            self._topology.hook.forget()
        if step is None:
            return
        self._count += 1
        now = time.monotonic()
        tensor_rate = step.rate if isinstance(step.rate, Tensor) else None
        vector = pack(step.verdict, step.measured.sums, step.measured.rows, tensor_rate)
        context = StepContext(
            step=self._count,
            wall_seconds=time.time(),
            step_seconds=None if self._last_end is None else now - self._last_end,
            limits=step.limits,
            judged=step.judged,
            synced=step.measured.synced,
            applied=step.acting,
            learning_rate=None if isinstance(step.rate, Tensor) else step.rate,
            learning_rate_scale=step.scale,
            rank=self._identity.rank,
            names=self._watched.names,
        )
        self._last_end = now
        if self._awaiting_loss is not None:
            self._write_step(self._awaiting_loss)
        self._previous = LandingStep(HostCopy(vector), context)
        if self._loss_follows or (self._loss_follows is None and self._count == 1):
            self._awaiting_loss = self._previous  # a loop that observes after its step does so next
        else:
            self._write_step(self._previous)

    def _write_step(self, landing: LandingStep) -> None:
        losses, self._losses = self._losses, []
        self._awaiting_loss = None
        if losses:
            with self._guarded("loss"):
                device = losses[0].device
                landing.loss = HostCopy(torch.stack([loss.to(device, non_blocking=True) for loss in losses]).mean())
        if self._journal is not None:
            self._journal.put(landing)

    def _take_previous(self) -> None:
        """Learn from the step before: the only wait, for an event that is one step old."""
        previous, self._previous = self._previous, None
        if previous is None:
            return
        record, errors = previous.peek()
        if record.reason != "unsynced":
            self._detector.update(record.grad_norm)
        for event in filter(None, (incident(record), *self._policy.update(record))):
            self._tell(event)
        if errors and not self._withdrawn:
            self._withdrawn = True
            self._say.once(
                "gradmon failed on one of the ranks; from here on all ranks only watch, so that they stay equal"
            )

    # --- measuring -------------------------------------------------------------------------------------------------

    def _stats(self) -> tuple[Tensor, list[int]]:
        """stats_PK of the gradients that are there now, and the numbers (from 1) of their parameters."""
        self._watch_new_parameters()
        present = [(p.grad, n) for n, p in enumerate(self._watched.parameters, start=1) if p.grad is not None]
        if not present:
            return torch.zeros(1, len(stats.STATISTICS), dtype=torch.float64, device=self._watched.device), [0]
        return stats.measure([g for g, _ in present]), [n for _, n in present]

    def _present(self) -> list[Tensor]:
        return [p.grad for p in self._watched.parameters if p.grad is not None]

    def _watch_new_parameters(self) -> None:
        """An optimizer may be given parameters later (`add_param_group`): a NaN there counts like any other."""
        held = [p for o in self._actions for group in o.param_groups for p in group["params"]]
        if len(held) == self._held:
            return
        self._held = len(held)
        for parameter in held:
            if parameter not in self._watched_set:
                self._watched_set.add(parameter)
                self._watched.parameters.append(parameter)
                self._watched.names.append(f"added[{len(self._watched.names)}]")
        if self._topology.hook is not None:
            self._topology.hook.number(self._watched.parameters)

    def _measure(self, optimizer: Optimizer | None) -> Measured:
        stats_PK, numbers = self._stats()
        norm = stats.total_norm(stats_PK)
        hook = self._topology.hook
        rows_WR = hook.take_rows() if hook is not None else None
        synced = rows_WR is not None or (hook is None and self._topology.kind != "unrecognised")
        if rows_WR is None:
            # Backward goes through the model from its end, so the first to break is the last in the model's order.
            order_P = self._order(tuple(reversed(numbers)), stats_PK.device)
            # A row that was not shared carries no errors: ranks would withdraw at different steps.
            rows_WR = rank_row(stats_PK.flip(0), order_P, self._errors if hook is None else 0).unsqueeze(0)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:  # GradScaler leaves the unscaling to a fused optimizer
            norm = norm / scale.to(norm)
            rows_WR = rows_WR.clone()
            rows_WR[:, ROW_SUM_OF_SQUARES] /= scale.to(norm).square()
        return Measured(stats_PK.sum(0), norm, rows_WR, synced)

    def _order(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        if self._orders.get(numbers) is None:
            self._orders = {numbers: torch.tensor(numbers, device=device)}
        return self._orders[numbers]

    def _agreed(self, norm: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """With unequal devices or thread counts norms differ in their last digits: take the largest of all ranks.

        At step time and nowhere else: that is where every rank comes, whatever one of them clips or logs besides.
        """
        if self._group is None or not self._topology.acts:
            return norm, left
        shared = torch.nan_to_num(torch.stack((norm, left)), nan=math.inf, posinf=math.inf)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return shared[0], shared[1]

    def _abstain(self) -> None:
        """This rank can't judge; the others must not wait for its norm. They will see a step to be skipped."""
        broken = torch.full((), math.inf, dtype=torch.float64, device=self._watched.device)
        if self._may_judge():
            self._agreed(broken, broken)

    # --- life ------------------------------------------------------------------------------------------------------

    @property
    def _acts(self) -> bool:
        return self._config.mode == "guard" and self._topology.acts and not self._withdrawn

    def _start_hooks(self) -> None:
        if self._topology.hook is not None:
            self._topology.hook.start(self._watched.parameters, lambda error: self._failed("local", error))
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

    def _open_journal(self, plan: Plan) -> JournalWriter | None:
        try:
            return JournalWriter(
                journal_path(plan.directory, self._identity),
                self._identity,
                parameters=self._watched.names,
                config=self._config.to_dict(),
                sample=Sampler(self._watched.device),
                max_bytes=self._config.journal_mib << 20,
                on_error=self._failed,
            )
        except Exception as error:
            self._say.once(f"no journal for this rank, training goes on without it: {error}")
            return None

    def _tell_start(self, plan: Plan) -> None:
        if self._identity.rank == 0:
            mode = "guarding" if self._acts else "watching"
            self._say.once(f"{mode} run {self.run} ({self._identity.world_size} ranks)", logging.INFO)
            if "~" in self.run:
                self._say.once(f"another run of that name is alive: this one is called {self.run} in metrics and page")
            if not self._topology.acts:
                self._say.once(f"only watching, not acting: {self._topology.why}")
        if self._group is not None and self._topology.acts and self._identity.rank == 0:
            self._say.once("devices or thread counts differ between ranks: one more small all-reduce per step")
        if self._identity.local_rank == 0 and self._config.agent.start == "auto":
            with self._guarded("agent"):
                start_agent(plan.directory, self._config, self._say)

    def _tell(self, event: Event) -> None:
        """The culprit speaks of what is its own, rank 0 of the rest."""
        if event.action == "backoff" and self._journal is not None:
            self._journal.put(event)
        speaker = event.rank if event.rank is not None and event.action != "backoff" else 0
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
            self._errors += 1
            if self._topology.hook is not None:
                self._topology.hook.errors = self._errors
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
        self._exit_watch.stop()
        if self._topology.hook is not None:
            self._topology.hook.stop()
        for doer in self._actions.values():
            with self._guarded("detach"):
                doer.restore()
        if self._journal is not None:
            self._journal.close(end, detail)
        self._say.stop()
        atexit.unregister(self._at_exit)
