"""What is trained here: which parameters are watched, and whether gradmon knows how their gradients are averaged.

gradmon acts only where it positively recognises the topology. Anywhere else ranks could decide differently, so it
watches, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradmon.local import HookTakenError, LocalHook, local_hook


@dataclass(frozen=True, slots=True)
class Watched:
    """The parameters gradmon measures, in the model's order, and the optimizers that step them."""

    parameters: list[Tensor]
    names: list[str]
    """One for each parameter, without the prefixes that DDP and torch.compile add."""
    optimizers: list[Optimizer]

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return self.parameters[0].device

    def digest(self) -> str:
        """Equal for models with equal names, shapes and types."""
        described = [f"{n} {tuple(p.shape)} {p.dtype}" for n, p in zip(self.names, self.parameters, strict=True)]
        digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
        return f"{len(described)} parameter tensors (digest {digest})"


@dataclass(frozen=True, slots=True)
class Topology:
    """How gradients become global."""

    kind: str
    """`single`, `ddp`, or `unrecognised`."""
    acts: bool
    why: str
    """Why gradmon only watches; empty if it acts."""
    group: dist.ProcessGroup | None
    """Ranks that attach together."""
    hook: LocalHook | None
    """Where local statistics come from, with DDP."""

    def __str__(self) -> str:
        return self.kind if self.acts else f"{self.kind}: {self.why}"


def watch(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> Watched:
    """Find the parameters to measure: the trainable ones of `model` that an optimizer steps.

    Raises:
        TypeError: not a module, or not an optimizer.
        ValueError: nothing to train, or an optimizer over parameters that are not the model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (got {type(model).__name__}); attach(model, optimizer)")
    optimizers = _listed([optimizer] if isinstance(optimizer, Optimizer) else optimizer)
    # Frozen ones too, where an optimizer holds them: they may be unfrozen later, and until then have no gradient.
    named = {p: _plain(name) for name, p in model.named_parameters()}
    if not any(p.requires_grad for p in named):
        raise ValueError("model has no trainable parameter (requires_grad is False everywhere): nothing to watch")
    stepped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    foreign = [p for p in stepped if p.requires_grad and p not in named]
    if foreign:
        raise ValueError(
            f"optimizer holds {len(foreign)} parameters that are not the model's, the first of shape "
            f"{tuple(foreign[0].shape)}; attach the model whose parameters this optimizer steps"
        )
    wanted = set(stepped)
    watched = [(p, name) for p, name in named.items() if p in wanted]
    if not any(p.requires_grad for p, _ in watched):
        raise ValueError("the optimizer steps none of the model's trainable parameters; attach the one that does")
    return Watched([p for p, _ in watched], [name for _, name in watched], optimizers)


def _listed(optimizers: object) -> list[Optimizer]:
    listed: list[Optimizer] = []
    for candidate in optimizers if isinstance(optimizers, Iterable) else [optimizers]:
        if not isinstance(candidate, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer or several of them (got {type(candidate).__name__})"
            )
        if not hasattr(candidate, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"{type(candidate).__name__} wraps an optimizer and has no step hooks of its own; "
                f"attach the inner one (often its .optimizer)"
            )
        listed.append(candidate)
    if not listed:
        raise ValueError("optimizer is an empty list; attach at least one")
    return listed


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")).removeprefix(
        "module."
    )


def recognise(model: nn.Module, watched: Watched, world_size: int) -> Topology:
    """Tell how `model`'s gradients are averaged.

    Args:
        model: as given to attach.
        watched: from `watch`.
        world_size: as the launcher says; 1 without one.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile(DDP(...))
    joined = dist.is_available() and dist.is_initialized()
    world = dist.group.WORLD if joined else None
    if isinstance(inner, DistributedDataParallel):
        why = _why_not(inner, watched)
        if not why:
            try:
                return Topology("ddp", True, "", inner.process_group, local_hook(inner))
            except HookTakenError:
                why = "DDP has a communication hook of its own, so ranks can't be told apart"
        return Topology("ddp", False, why, world, None)
    if len({p.device for p in watched.parameters}) > 1:
        return Topology("unrecognised", False, "parameters lie on several devices", world, None)
    if _sharded(watched.parameters):
        return Topology("unrecognised", False, "parameters are sharded (DTensor)", world, None)
    if joined and dist.get_world_size() > 1:
        why = "several ranks, but the model is no DistributedDataParallel; attach the DDP object, not what it wraps"
        return Topology("unrecognised", False, why, world, None)
    if world_size > 1:
        why = f"WORLD_SIZE is {world_size} but there is no process group; attach after init_process_group and DDP(...)"
        return Topology("unrecognised", False, why, None, None)
    return Topology("single", True, "", None, None)


def _why_not(model: DistributedDataParallel, watched: Watched) -> str:
    """Why gradmon can't act on this DDP object; empty if it can."""
    ranks = dist.get_world_size(model.process_group)
    if ranks != dist.get_world_size():
        return f"DDP averages over {ranks} of {dist.get_world_size()} ranks, and the others would decide differently"
    ignored = {_plain(name) for name in model.parameters_to_ignore} & set(watched.names)
    if ignored:
        return f"DDP is told to ignore {len(ignored)} of the parameters, which then differ between ranks"
    if model.gradient_as_bucket_view and ranks & (ranks - 1):
        # There DDP divides by the world size where it else multiplies, and a hook can't tell which it would have done.
        return f"gradient_as_bucket_view on {ranks} ranks, no power of two: a hook would change the last bits"
    return ""


def _sharded(parameters: Sequence[Tensor]) -> bool:
    return any(hasattr(p, "to_local") for p in parameters)
