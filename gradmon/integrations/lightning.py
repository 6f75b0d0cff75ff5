"""gradmon in Lightning's Trainer, with one line:

    trainer = lightning.Trainer(..., callbacks=[GradmonCallback()])

It attaches when training starts, after the strategy has wrapped the model and after the checkpoint's weights are back,
and leaves when training ends, also by an exception. It acts on one device, under DDP, and under FSDP2 and tensor
parallelism by ModelParallelStrategy; under Lightning's `fsdp`, which is FSDP1, it watches and says why.
"""

# ruff: noqa: ARG002  # what a hook is given is Lightning's choice

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradmon
from gradmon.config import Config
from gradmon.log import logger
from gradmon.monitor import Monitor
from gradmon.record import StepRecord
from gradmon.sinks import values_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:  # the same library under its older name, for a script that imports only that
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError(
                "gradmon.integrations.lightning needs Lightning 2.4 or newer; pip install 'gradmon[lightning]'"
            ) from error


class GradmonCallback(Callback):
    """Watches and guards what `Trainer.fit` trains, under automatic and manual optimization.

    Loss and validation loss are observed without waiting for them. Every `log_every_n_steps` batches the newest
    finished step, which is the one before, goes into the module's own log as `gradmon/...`, and so to every logger and
    into `trainer.callback_metrics`. What gradmon has learnt goes into the Trainer's checkpoints and comes back with
    them.

    Args:
        config: as for `gradmon.attach`.
        validation_loss: name under which the module logs its validation loss.

    Attributes:
        monitor: of the newest `fit`, None before the first.
    """

    monitor: Monitor | None = None

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        validation_loss: str = "val_loss",
    ) -> None:
        super().__init__()
        self._config = config
        self._validation_loss = validation_loss
        self._loaded: dict[str, Any] = {}
        """State that waits for the next fit."""
        self._attached = False
        self._undo = ExitStack()
        """What is wrapped while attached."""
        self._pause = ExitStack()
        """Of the validation in progress."""
        self._seen = self._logged = 0
        """Newest step counted, and newest logged."""
        self._skipped = 0

    # --- life --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; raises what `gradmon.attach` raises, on all ranks alike."""
        model = trainer.strategy.model
        if model is None or not _trains(trainer.optimizers):
            logger.warning("gradmon watches nothing: configure_optimizers() has returned no optimizer")
            return
        # A Trainer that has not stepped yet begins anew, whatever this callback has seen before.
        state = self.state_dict() if trainer.global_step else {}
        self._loaded = {}
        self.monitor = gradmon.attach(model, trainer.optimizers, config=self._config)
        self._attached = True
        self._seen = self._logged = self._skipped = 0
        self._undo.callback(_pausing_while_it_saves(trainer, self.monitor))
        if state:
            self._restore(state)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._detach(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, the journal says why."""
        self._detach(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach where a fit has ended in neither of the two ways."""
        self._detach(None)

    def _detach(self, error: BaseException | None) -> None:
        if not self._attached or self.monitor is None:
            return
        self._attached = False
        self._pause.close()
        self._undo.close()
        self.monitor.__exit__(type(error) if error else None, error, None)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What `Monitor.state_dict` says; Lightning puts it into every checkpoint."""
        return self._loaded if self._loaded or self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint; Lightning does so before training starts, so it waits until then."""
        if self._attached:
            self._restore(state_dict)
        else:
            self._loaded = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        if self.monitor is None:
            return
        try:
            self.monitor.load_state_dict(state)
        except ValueError as error:  # the same file on all ranks, so all of them begin anew
            logger.warning("gradmon begins anew, the checkpoint's state is of no use: %s", error)

    # --- losses ------------------------------------------------------------------------------------------------------

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Observe the loss that `training_step` has returned, or that is given to `manual_backward`."""
        if not self._attached or self.monitor is None or loss.numel() != 1:
            return
        loss = loss.detach()
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        if scale is not None:  # a GradScaler's; `get_scale()` would wait for the device
            loss = loss / scale
        if pl_module.automatic_optimization:  # where Lightning has divided it
            loss = loss * trainer.accumulate_grad_batches
        self.monitor.observe(loss=loss)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No step is expected until it ends. The check before training comes before gradmon attaches."""
        if self._attached and self.monitor is not None:
            self._pause.enter_context(self.monitor.paused("evaluation"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe what it has found, if the module has logged it."""
        if not self._attached or self.monitor is None:
            return
        self._pause.close()
        loss = trainer.callback_metrics.get(self._validation_loss)
        if loss is not None:
            self.monitor.observe(validation_loss=loss)

    # --- the Trainer's log -------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count: a batch may hold several steps."""
        self._newest()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the newest finished step where Lightning is about to write."""
        record = self._newest()
        if record is None or record.step == self._logged or not trainer._logger_connector.should_update_logs:
            return
        self._logged = record.step
        for name, value in {**values_of(record), "gradmon/skipped_steps": float(self._skipped)}.items():
            # A tensor on the host: of a number Lightning makes one on the device, by a copy that waits.
            pl_module.log(name, torch.tensor(value, dtype=torch.float64), on_step=True, on_epoch=False)

    def _newest(self) -> StepRecord | None:
        """The newest finished step, equal on all ranks; counts it if it was skipped."""
        record = self.monitor.newest if self._attached and self.monitor is not None else None
        if record is not None and record.step != self._seen:
            self._seen = record.step
            self._skipped += record.applied and record.action == "skip"
        return record


def _trains(optimizers: Iterable[Optimizer]) -> bool:
    """False for the stand-in that Lightning makes where a module configures none."""
    return any(p.requires_grad for o in optimizers for group in o.param_groups for p in group["params"])


def _pausing_while_it_saves(trainer: Trainer, monitor: Monitor) -> Any:
    """Callbacks are told only of a save's beginning: wrap it for this trainer alone. Returns what undoes it."""
    original = trainer.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        with monitor.paused("checkpoint"):
            original(*args, **kwargs)

    def undo() -> None:
        if trainer.__dict__.get("save_checkpoint") is save_checkpoint:
            del trainer.__dict__["save_checkpoint"]

    trainer.__dict__["save_checkpoint"] = save_checkpoint
    return undo
