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

import functools
import gc
import os
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
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradmon.config import Config
from gradmon.integrations.discovery import Found, discover, inner_optimizers


class Finder:
    """From `start` on looks for what is trained.

    Args:
        config: the settings in force.
        say: tells the user something.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.attached = False
        """True once something was watched, or the script has attached by itself."""
        self._config = config
        self._say = say
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._monitor: Any = None
        self._loss: Tensor | None = None
        """Of the newest backward."""
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers that were met so far, whatever was done about them."""
        self._watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that need no look: the ones watched now, what they hold, and what can't be watched."""
        self._news = True
        """True if something may have been made since the last look."""
        self._ended = False
        self._scaler: weakref.ref[GradScaler] | None = None
        self._undo: list[Callable[[], None]] = []
        self._hook: Any = None
        self._compiler_asked = False
        self._optimizers: list[Optimizer] = []

    def start(self) -> None:
        """Begin; torch has just been imported."""
        self._wrap(torch.autograd, "backward", self._before_backward)
        self._wrap(GradScaler, "scale", self._before_scale)
        self._wrap(DistributedDataParallel, "__init__", self._before_making)
        self._wrap(Optimizer, "__init__", self._before_making)
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def stop(self) -> None:
        """Take no further part; what is attached stays."""
        self._ended = True
        for undo in self._undo:
            undo()
        self._undo.clear()
        if self._hook is not None:
            self._hook.remove()

    def _wrap(self, owner: Any, name: str, before: Callable[..., None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._ended:
                before(*args, **kwargs)
            return original(*args, **kwargs)

        # What torch.compiler.disable sets; to call that would import the compiler, which takes seconds.
        watched._torchdynamo_disable = True  # type: ignore[attr-defined]
        setattr(owner, name, watched)

        def undo() -> None:
            if getattr(owner, name) is watched:  # else somebody has wrapped it since: then it only passes through
                setattr(owner, name, original)

        self._undo.append(undo)

    @property
    def _elsewhere(self) -> bool:
        """True in a forked process, which is not the rank, and in threads that do not train."""
        return os.getpid() != self._pid or threading.get_ident() != self._thread

    # --- what happens in the script --------------------------------------------------------------------------------

    def _before_making(self, *_args: Any, **_kwargs: Any) -> None:
        self._news, self._loss = True, None

    def _before_scale(self, scaler: GradScaler, *_args: Any, **_kwargs: Any) -> None:
        self._scaler = weakref.ref(scaler)

    def _before_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._elsewhere or torch._C._current_graph_task_id() != -1:
            return
        try:
            if self._news:
                self._news = False
                found = _found(lambda optimizer: optimizer not in self._seen)
                if found.models and (found.distributed or not _several_ranks()):
                    self._attach(found)
            self._loss = self._loss_in(tensors, args, kwargs)
            if self._monitor is not None and self._loss is not None:
                self._monitor.end_turn()
                self._monitor.observe(loss=self._loss)
        except Exception as error:
            self._failed(error)

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
            if not inside:
                self._meet(optimizer)
            elif os.getpid() == self._pid:
                self._give_up("optimizers that step inside of backward have no step that could be judged as a whole")
        except Exception as error:
            self._failed(error)

    def _meet(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step that is not watched."""
        self._watched.add(optimizer)
        # One that was replaced and steps again takes turns with what replaced it: a critic, say.
        together = [optimizer, *(self._optimizers if optimizer in self._seen else ())]
        found = _found(lambda candidate: candidate in together)
        if found.models:
            self._attach(found)
            if self._monitor is not None and self._loss is not None:  # of the backward before this step
                self._monitor.observe(loss=self._loss)
        elif self._monitor is None:
            self._say("the optimizer's parameters belong to no torch.nn.Module: nothing is watched of them")

    # --- what is done about it -------------------------------------------------------------------------------------

    def _attach(self, found: Found) -> None:
        """Watch what was found; together with what is watched already, if they share weights."""
        from gradmon import monitor as gradmon_monitor

        active = gradmon_monitor._active
        if active is not None and active is not self._monitor:
            self.attached = True
            self._give_up("")  # the script does it by itself
            return
        self._watched.clear()
        for optimizer in found.optimizers:
            self._watched.update((optimizer, *inner_optimizers(optimizer)))
        self._seen.update(self._watched)
        if found.homeless:
            self._say(f"{found.homeless} of the optimizers' parameters belong to no torch.nn.Module: not watched")
        state = self._end(found)
        self._monitor = gradmon_monitor.attach(found.models, found.optimizers, config=self._config)
        self._monitor.stands_in = True
        self._optimizers = found.optimizers
        self.attached = True
        if state is not None:
            self._monitor.load_state_dict(state)
        if not self._compiler_asked:
            self._compiler_asked = True
            self._hook.remove()  # in a compiled step a hook that is traced would be ignored
            self._hook = register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step))

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

    def _give_up(self, why: str) -> None:
        self.stop()
        if why:
            if self._monitor is not None:
                self._monitor.detach()
            self.attached = True  # it is said once, and not again at the end
            self._say(f"not watching: {why}. The script goes on without gradmon")


def _found(wanted: Callable[[Optimizer], bool]) -> Found:
    """Of several, garbage is no candidate: a model that was wrapped anew is still there until it is collected."""
    found = discover(wanted)
    if len(found.models) > 1 or len(found.optimizers) > 1:
        gc.collect()
        found = discover(wanted)
    return found


def _several_ranks() -> bool:
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE") or 1)) > 1
