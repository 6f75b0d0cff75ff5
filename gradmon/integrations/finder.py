"""Attaches to what a script trains, without a word of the script's: for `gradmon run`.

While it works a few functions of torch are wrapped: `torch.autograd.backward`, which `loss.backward()` calls and where
the loss is; `GradScaler.scale`, so that the loss is told without the scale; `__init__` of Optimizer and of
DistributedDataParallel, after which there is something new to be found. One global hook sees every optimizer step.

It attaches in front of a backward where ranks train together or only one does, so that local statistics, and norms
before the script's clip, are there from the first step on; else in front of an optimizer step. What is found later
joins what is watched if they share weights, and replaces it if not, as a second training does. Whatever fails here,
the script goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from gradmon.actions import evaluates_repeatedly
from gradmon.config import Config
from gradmon.integrations.discovery import Found, discover, inner_optimizers, remember

#: Trainings of one process that are followed: where optimizers are made anew all the time, each would cost a while.
MOST_ATTACHMENTS = 16


class Finder:
    """From `start` on looks for what is trained.

    Args:
        config: the settings in force.
        say: tells the user something.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.attached = False
        """True once something was watched, or the script has attached by itself."""
        self.stepped = False
        """True once an optimizer was about to step."""
        self._config = config
        self._say = say
        self._pid = os.getpid()
        self._thread: int | None = None
        """Of training, once it is known."""
        self._monitor: Any = None
        self._loss: Tensor | None = None
        """Of the newest backward."""
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers that were met so far, whatever was done about them."""
        self._watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that need no look: the ones watched now, what they hold, and what can't be watched."""
        self._made: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        """Optimizer -> its number, in the order in which they were made."""
        self._optimizers: list[Optimizer] = []
        self._news = True
        """True if something may have been made since the last look."""
        self._attachments = self._turns = 0
        self._ended = False
        self._scaler: weakref.ref[GradScaler] | None = None
        self._undo: list[Callable[[], None]] = []
        self._hook: Any = None

    def start(self) -> None:
        """Begin; torch has just been imported."""
        self._wrap(torch.autograd, "backward", self._before_backward)
        self._wrap(GradScaler, "scale", self._before_scale)
        self._wrap(DistributedDataParallel, "__init__", self._before_making)
        self._wrap(Optimizer, "__init__", self._before_making)
        self._wrap(gc, "freeze", remember)
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def stop(self) -> None:
        """Take no further part; what is attached stays. (The step hook, which may be running, passes through.)"""
        self._ended = True
        for undo in self._undo:
            undo()
        self._undo.clear()

    def compiler_came(self) -> None:
        """torch's compiler has been imported: what is wrapped must stay out of what it traces."""
        if self._ended:
            return
        for owner, name in ((torch.autograd, "backward"), (GradScaler, "scale")):
            setattr(owner, name, torch.compiler.disable(getattr(owner, name)))
        # Put in place of the other, as it may be running: torch goes through these hooks at this moment.
        _global_optimizer_pre_hooks[self._hook.id] = torch.compiler.disable(self._before_step)

    def _wrap(self, owner: Any, name: str, before: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._ended:
                before(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

        def undo() -> None:
            ours = getattr(owner, name)
            if watched in (ours, getattr(ours, "_torchdynamo_orig_callable", None)):  # else it only passes through
                setattr(owner, name, original)

        self._undo.append(undo)

    @property
    def _elsewhere(self) -> bool:
        """True in a forked process, which is not the rank, and in threads that do not train."""
        return os.getpid() != self._pid or self._thread not in (None, threading.get_ident())

    # --- what happens in the script --------------------------------------------------------------------------------

    def _before_making(self, made: Any, *_args: Any, **_kwargs: Any) -> None:
        self._news, self._loss = True, None
        if isinstance(made, Optimizer):
            self._made.setdefault(made, len(self._made))

    def _before_scale(self, scaler: GradScaler, *_args: Any, **_kwargs: Any) -> None:
        self._scaler = weakref.ref(scaler)

    def _before_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._elsewhere or torch._C._current_graph_task_id() != -1:
            return
        try:
            if self._news:
                self._news = False
                found = self._found(lambda optimizer: optimizer not in self._seen)
                if found.models and (found.distributed or not _several_ranks()):
                    self._attach(found)
            self._loss = self._loss_in(tensors, args, kwargs)
            if self._monitor is not None:
                self._end_turn()
                if self._loss is not None:
                    self._monitor.observe(loss=self._loss)
        except Exception as error:
            self._failed(error)

    def _end_turn(self) -> None:
        """Optimizers that take turns have norms of their own; one verdict for all would be wrong for each."""
        if not self._monitor.end_turn() or self._turns < 0:
            return
        self._turns += 1
        if self._turns == 2:
            self._attach(self._found(lambda optimizer: optimizer in self._optimizers), turns=True)

    def _loss_in(self, tensors: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The loss that backward is called on, without a scaler's factor; None for gradients from somewhere else."""
        scaler, self._scaler = self._scaler, None
        loss = tensors[0] if isinstance(tensors, list | tuple) and len(tensors) == 1 else tensors
        given = args[0] if args else kwargs.get("grad_tensors")
        if any(g is not None for g in (given if isinstance(given, list | tuple) else [given])):
            return None
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            return None
        used: Any = None if scaler is None else scaler()
        scale: Tensor | None = used._scale if used is not None and used.is_enabled() else None
        return loss.detach() if scale is None else loss.detach() / scale.to(loss.device)

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        inside = torch._C._current_graph_task_id() != -1
        if self._ended or (not inside and (optimizer in self._watched or self._elsewhere)):
            return
        try:
            self.stepped = True
            if not inside:
                self._meet(optimizer)
            elif os.getpid() == self._pid:
                self._give_up("optimizers that step inside of backward have no step that could be judged as a whole")
        except Exception as error:
            self._failed(error)

    def _meet(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step that is not watched."""
        if _only_initialises():
            return
        self._watched.add(optimizer)
        owners = [o for o in self._optimizers if optimizer in inner_optimizers(o)]
        if owners and any(self._monitor.steps_now(o) for o in owners):
            return
        # One that was replaced and steps again takes turns with what replaced it: a critic, say.
        together = [optimizer, *(o for o in self._optimizers if optimizer in self._seen and o not in owners)]
        found = self._found(lambda candidate: candidate in together, optimizer if owners else None)
        if not found.models:
            return
        self._attach(found)
        if self._monitor is not None and self._loss is not None:  # of the backward before this step
            self._monitor.observe(loss=self._loss)

    def _found(self, wanted: Callable[[Optimizer], bool], bare: Optimizer | None = None) -> Found:
        """Of several, garbage is no candidate: a model that was wrapped anew is there until it is collected."""
        found = discover(wanted, self._number, bare)
        if len(found.models) > 1 or len(found.optimizers) > 1:
            gc.collect()
            found = discover(wanted, self._number, bare)
        return found

    def _number(self, optimizer: Optimizer) -> int:
        return self._made.get(optimizer, len(self._made))

    # --- what is done about it -------------------------------------------------------------------------------------

    def _attach(self, found: Found, *, turns: bool = False) -> None:
        """Watch what was found; together with what is watched already, if they share weights."""
        from gradmon import monitor as gradmon_monitor

        active = gradmon_monitor._active
        if active is not None and active is not self._monitor:
            self.attached = True
            self._give_up("")  # the script does it by itself
            return
        alone = _several_ranks() and not found.distributed
        if any(map(_is_fake, found.models)) or (alone and self._monitor is not None):
            # A rehearsal without numbers; or what one rank does by itself while it trains with the others.
            self._watched.update(found.optimizers)
            self._seen.update(found.optimizers)
            return
        self._attachments += 1
        if self._attachments > MOST_ATTACHMENTS:
            self._give_up("optimizers are made anew all the time; those that were found last stay watched", stay=True)
            return
        self._watched.clear()
        self._watched.update(found.optimizers)
        self._seen.update(found.optimizers)
        for optimizer in found.optimizers:
            self._seen.update(inner_optimizers(optimizer))
        state = self._end(found)
        observe = found.side_by_side or turns
        if observe and self._config.mode == "guard":
            self._say(
                "only watching, not acting: several optimizers take turns, or train models of their own; call "
                "gradmon.attach(model, optimizer) for the one that is to be guarded"
            )
        self._turns = -1 if observe else 0
        # Ranks that do not train together may never come.
        patience = min(10.0, self._config.attach_timeout_seconds) if alone else self._config.attach_timeout_seconds
        config = dataclasses.replace(self._config, attach_timeout_seconds=patience)
        config = dataclasses.replace(config, mode="observe") if observe else config
        self._monitor = gradmon_monitor.attach(found.models, found.optimizers, config=config)
        # Scripts divide the loss of a micro-step by their number; a closure is evaluated again and again.
        self._monitor.stand_in(sums=not any(map(evaluates_repeatedly, found.optimizers)))
        self._optimizers = found.optimizers
        self._thread = threading.get_ident()
        self.attached = True
        if state is not None:
            self._monitor.load_state_dict(state)

    def _end(self, found: Found) -> dict[str, Any] | None:
        """End what is watched; its state, if it is of the same weights."""
        old, self._monitor = self._monitor, None
        if old is None:
            return None
        held = {id(p) for model in found.models for p in model.parameters()}
        same = any(id(p) in held for o in self._optimizers for group in o.param_groups for p in group["params"])
        state: dict[str, Any] | None = old.state_dict() if same else None
        old.detach()
        return state

    def _failed(self, error: Exception) -> None:
        self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str, *, stay: bool = False) -> None:
        """Several ranks: what is attached stays, as the others count on its collectives."""
        self.stop()
        if not why:
            return
        self.attached = True  # it is said once, and not again at the end
        if self._monitor is not None and not stay and not _several_ranks():
            self._monitor.detach()
        self._say(f"not watching: {why}" if stay else f"not watching: {why}. The script goes on without gradmon")


def _several_ranks() -> bool:
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE") or 1)) > 1


def _only_initialises() -> bool:
    """True for the step with gradients of zero by which a distributed checkpoint makes an optimizer's state."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_init_optim_state":
            return True
    return False


def _is_fake(model: torch.nn.Module) -> bool:
    """True where parameters have no numbers: on the meta device, or under FakeTensorMode."""
    return any(p.is_meta or type(p.data).__name__ == "FakeTensor" for p in model.parameters())
