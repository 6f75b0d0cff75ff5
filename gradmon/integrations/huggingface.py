"""gradmon in Hugging Face's `Trainer`, and in all that are built on it (TRL): one line.

    from gradmon.integrations.huggingface import GradmonCallback
    trainer = transformers.Trainer(..., callbacks=[GradmonCallback()])

A hand-written loop with Accelerate needs no callback: `gradmon.attach(model, optimizer)` after `accelerator.prepare`,
and `accelerator.register_for_checkpointing(monitor)`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor

from gradmon import monitor as monitors
from gradmon.config import Config
from gradmon.log import logger
from gradmon.monitor import Monitor, attach
from gradmon.record import StepRecord, finite

_NEEDS = "gradmon.integrations.huggingface needs transformers 4.46 or newer"
_CURE = "pip install -U 'gradmon[huggingface]'"
try:
    import transformers
    from transformers.trainer import Trainer
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError(f"{_NEEDS} with accelerate ({error}): {_CURE}") from error
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if _VERSION < (4, 46):
    raise ImportError(f"{_NEEDS} (found {transformers.__version__}): {_CURE}")


class GradmonCallback(TrainerCallback, ExportableState):
    """Watches and guards what a `Trainer` trains, from `trainer.train()` to its end.

        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[GradmonCallback()])

    Nothing else changes: `max_grad_norm` clips as before, and gradmon's norms are from before that clip. In every
    training row of the Trainer's log (`state.log_history`, TensorBoard, W&B) are beside its own values:

    - `gradmon/grad_norm`, `gradmon/grad_norm_applied`: of the row's own step, before any clip and as the optimizer
      used it (0: skipped); left out where not finite;
    - `gradmon/grad_norm_limit`: above it the step was a spike; absent until the detector is active;
    - `gradmon/learning_rate_scale`: 1 unless gradmon has backed off;
    - `gradmon/skipped_steps`, `gradmon/rescaled_steps`: how many so far, resumed ones included.

    The detector's state lies in the Trainer's checkpoints, in `trainer_state.json`; `resume_from_checkpoint` goes on
    with it. The validation loss is `eval_loss`; with several evaluation datasets, the mean of theirs.

    Args:
        config: a `gradmon.Config`, a mapping, or the path of a YAML file, for thresholds, the run's name, or
            `{"mode": "observe"}` to only watch; None takes GRADMON_CONFIG or the defaults. With
            `restore_callback_states_from_checkpoint` the checkpoint's counts, as for every callback.

    Raises:
        RuntimeError: when training begins: something else has attached gradmon already, or no Trainer is there.
        ConfigError, AttachError, ...: when training begins: what `gradmon.attach` raises.
    """

    def __init__(self, config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
        self.config = config
        self._watch: _Watch | None = None

    @property
    def monitor(self) -> Monitor | None:
        """Of the training in progress; None outside of it."""
        return None if self._watch is None else self._watch.monitor

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in its checkpoints, as plain JSON."""
        return {
            "args": {"config": _as_json(self.config)},
            "attributes": {"saved": None if self._watch is None else self._watch.state_dict()},
        }

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The Trainer is made: have its `train` tell when it raises, which it tells no callback."""
        trainer = _calling_trainer(self)
        if trainer is not None:
            _wrap(trainer, "train", functools.partial(_train, trainer))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Model and optimizer are what they will be: attach, on every rank."""
        self.end(None)  # a training that has raised, of a Trainer that this callback was added to later
        trainer = _calling_trainer(self)
        if trainer is None:
            raise RuntimeError(
                "GradmonCallback was called by no transformers.Trainer that has it among its callbacks; pass it as "
                "Trainer(callbacks=[GradmonCallback()]), or call gradmon.attach(model, optimizer) instead"
            )
        # A Trainer that resumes from a checkpoint without this callback can't save without this.
        entry = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        monitor = _attach(trainer, self.config)
        if monitor is None:
            return
        self._watch = _Watch(monitor, trainer, self.end)
        try:
            self._watch.begin(_saved(entry))
        except BaseException as error:
            self.end(error)
            raise

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Count what was done to the step before, whose numbers are there by now."""
        if self._watch is not None:
            self._watch.count_newest()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Detach."""
        self.end(None)

    def end(self, error: BaseException | None) -> None:
        """Detach, and leave the Trainer as it was; `error` is what has ended training, None if nothing did."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end(error)


class _Watch:
    """One `train()`: the monitor, and what of the Trainer is wrapped for as long as that lasts."""

    def __init__(self, monitor: Monitor, trainer: Any, raised: Callable[[BaseException], None]) -> None:
        self.monitor = monitor
        self._trainer = trainer
        self._raised = raised
        self._unwrap: list[Callable[[], None]] = []
        self._counted = 0
        """Newest step that is in the counts."""
        self._counts = {"skip": 0, "rescale": 0}
        self._observed = True
        """False from a micro-step's begin until its loss is known."""

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Go on where the checkpoint was taken, if training does; wrap the Trainer's methods, on this instance only."""
        if saved:
            try:
                self.monitor.load_state_dict(saved["monitor"])
                self._counts.update(saved["counts"])
            except (KeyError, TypeError, ValueError) as error:  # the same file on all ranks: all of them begin anew
                logger.warning("gradmon begins anew, the checkpoint's state is of no use: %s", error)
        trainer = self._trainer
        for owner, name, around in (
            (trainer, "training_step", self._training_step),
            (trainer.accelerator, "backward", self._backward),
            (trainer, "log", self._log),
            (trainer, "evaluate", self._evaluate),
            (trainer, "_save_checkpoint", self._save_checkpoint),
        ):
            self._unwrap.append(_wrap(owner, name, around))

    def end(self, error: BaseException | None) -> None:
        """Unwrap and detach."""
        for unwrap in self._unwrap:
            unwrap()
        self._unwrap.clear()
        self.monitor.__exit__(None if error is None else type(error), error, None)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        state = self.monitor.state_dict()
        self.count_newest()
        return {"monitor": state, "counts": dict(self._counts)}

    def count_newest(self) -> StepRecord | None:
        """The newest step whose numbers are there; counted once."""
        record = self.monitor.newest
        if record is not None and record.step > self._counted:
            self._counted = record.step
            if record.applied and record.action in self._counts:
                self._counts[record.action] += 1
        return record

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._observed = False
        try:
            loss = original(*args, **kwargs)
        except BaseException as error:
            if "train" not in vars(self._trainer):  # it was made before the callback was added: nothing else will tell
                self._raised(error)
            raise
        self._observe(loss)
        return loss

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args and _VERSION >= (4, 50):  # before, what is logged was divided only later
            self._observe(args[0])  # now, not later: so it goes out with this step's gradients
        return original(*args, **kwargs)

    def _observe(self, loss: Any) -> None:
        """Of a micro-step: its share of the step's loss, while the monitor takes a mean of what it observes."""
        if self._observed or not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        self._observed = True
        parts = getattr(self._trainer, "current_gradient_accumulation_steps", 0)  # an epoch's last step may have fewer
        parts = parts or self._trainer.args.gradient_accumulation_steps
        self.monitor.observe(loss=loss.detach() * parts)

    def _log(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        logs = args[0] if args else kwargs.get("logs")
        if isinstance(logs, dict) and "loss" in logs:  # not those of evaluation, and not the last, of the whole run
            logs.update(self._values())
        return original(*args, **kwargs)

    def _values(self) -> dict[str, float]:
        """Of the step that is being logged, beside the Trainer's own value of it."""
        self.monitor.is_healthy()  # sync: the Trainer has just waited for this step's loss
        record = self.count_newest()
        if record is None:
            return {}
        values = {
            "grad_norm": finite(record.grad_norm),
            "grad_norm_applied": finite(record.grad_norm_applied),
            "grad_norm_limit": finite(record.grad_norm_limit),
            "learning_rate_scale": record.learning_rate_scale,
            "skipped_steps": self._counts["skip"],
            "rescaled_steps": self._counts["rescale"],
        }
        return {f"gradmon/{name}": value for name, value in values.items() if value is not None}

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.monitor.paused("evaluation"):
            metrics = original(*args, **kwargs)
        if not args and kwargs.keys() <= {"ignore_keys"}:  # the Trainer's own call, not one over other data
            loss = _validation_loss(metrics, self._trainer.eval_dataset)
            if loss is not None:
                self.monitor.observe(validation_loss=loss)
        return metrics

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.monitor.paused("checkpoint"):
            return original(*args, **kwargs)


def _train(trainer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`trainer.train()`; whatever ends it, nothing of ours stays."""
    failure: BaseException | None = None
    try:
        return original(*args, **kwargs)
    except BaseException as error:
        failure = error
        raise
    finally:
        # Not the callback that was there when the Trainer was made: it may have been restored as another object.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, GradmonCallback):
                callback.end(failure)


def _attach(trainer: Any, config: Any) -> Monitor | None:
    """To what the Trainer really trains; None, and a word about it, where an engine leaves nothing to watch."""
    taken = monitors._active is not None and not monitors._active.stands_in
    try:
        return attach(trainer.model_wrapped, trainer.optimizer, config=config)
    except RuntimeError as error:
        if taken:
            raise RuntimeError(
                "gradmon is attached already in this process, and GradmonCallback attaches by itself: leave out the "
                "call of gradmon.attach(), or detach() its monitor before trainer.train()"
            ) from error
        raise
    except (TypeError, ValueError) as error:
        if not getattr(trainer, "is_deepspeed_enabled", False):
            raise
        logger.warning("gradmon does not watch this training, DeepSpeed leaves it nothing to measure: %s", error)
        return None


def _calling_trainer(callback: GradmonCallback) -> Any:
    """The Trainer that is calling its callbacks now; None without one. A callback is given all but that."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owner: Any = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if issubclass(type(owner), Trainer) and any(c is callback for c in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back
    return None


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Have `owner.name(...)` call `around(original, ...)`, on this instance only; what is returned undoes it."""
    before = vars(owner).get(name)
    original = getattr(owner, name)
    active = True

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs) if active else original(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False
        if vars(owner).get(name) is not wrapper:  # somebody has wrapped ours since: it passes through
            return
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, wrapper)
    return undo


def _saved(entry: Any) -> Mapping[str, Any] | None:
    """What `_Watch.state_dict` gave for the checkpoint that is resumed from; None without one.

    Read here, and not restored by the Trainer: that does so only with `restore_callback_states_from_checkpoint`.

    Args:
        entry: what `GradmonCallback.state` gave; several, where a Trainer had several.
    """
    entry = entry[0] if isinstance(entry, list) and entry else entry
    saved: Mapping[str, Any] | None = entry["attributes"]["saved"] if isinstance(entry, dict) else None
    return saved


def _validation_loss(metrics: Any, dataset: Any) -> float | None:
    """`eval_loss`; with several evaluation datasets the mean of theirs."""
    keys = [f"eval_{name}_loss" for name in dataset] if isinstance(dataset, dict) else ["eval_loss"]
    if not keys or not isinstance(metrics, dict) or not all(key in metrics for key in keys):
        return None
    return sum(float(metrics[key]) for key in keys) / len(keys)


def _as_json(config: Any) -> Any:
    """What `GradmonCallback(config=...)` was given, so that JSON can hold it."""
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if isinstance(config, Config):
        return config.to_dict()
    return json.loads(json.dumps(dict(config), default=str)) if isinstance(config, Mapping) else config
