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
from gradmon.sharding import Sharding, describe, is_sharded, serves


@dataclass(frozen=True, slots=True)
class Watched:
    """The parameters gradmon measures, in the model's order, and the optimizers that step them."""

    parameters: list[Tensor]
    names: list[str]
    """One for each parameter, without the prefixes that DDP and torch.compile add."""
    optimizers: list[Optimizer]
    """Those whose step hooks fire: taken out of wrappers and containers."""
    engine: str = ""
    """Why the engine that trains them is only watched; empty if there is none that is known."""

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
    """`single`, `ddp`, `fsdp2`, `hsdp` (each also with `+tp`), `tensor_parallel` or `unrecognised`."""
    model: nn.Module
    acts: bool = True
    why: str = ""
    """Why gradmon only watches; empty if it acts."""
    group: dist.ProcessGroup | None = None
    """Ranks that attach together."""
    hook: LocalHook | None = None
    """Where local statistics come from, with DDP."""
    taken: bool = False
    """True if a hook of the script's was registered with DDP before ours could be."""
    averaged: frozenset[int] | None = None
    """Under DDP, ids of the parameters whose gradients it averages; None elsewhere."""
    sharding: Sharding | None = None
    """How the ranks' parts add up, where each rank holds a part."""

    def __str__(self) -> str:
        return self.kind if self.acts else f"{self.kind}: {self.why}"

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The DDP object, if there is one."""
        inner = getattr(self.model, "_orig_mod", self.model)  # torch.compile(DDP(...))
        return inner if isinstance(inner, DistributedDataParallel) else None

    @property
    def whole_rows(self) -> bool:
        """True if a rank's row is of all parameters; with tensor parallelism it is of a part."""
        return not self.kind.endswith(("+tp", "tensor_parallel"))

    def joining(self) -> bool:
        """True inside `model.join()`, where ranks run out of data one by one."""
        return self.ddp is not None and bool(self.ddp._join_config.enable)

    def divides_by_those_left(self) -> bool:
        """True inside `model.join(divide_by_initial_world_size=False)`, which a communication hook can't follow."""
        return self.joining() and not getattr(self.ddp, "_divide_by_initial_world_size", True)


class ModelParts(nn.ModuleList):
    """Modules that are trained together, as torchtitan's model parts and pipeline stages are; never called itself."""


def one_module(model: object) -> nn.Module:
    """What attach was given, as one module.

    Raises:
        TypeError: neither a module nor a list of modules.
        ValueError: an empty list.
    """
    parts: list[nn.Module] = []
    for part in model if isinstance(model, (list, tuple)) else [model]:
        if not isinstance(part, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module or a list of them (got {type(part).__name__}); "
                f"attach(model, optimizer)"
            )
        parts.append(part)
    if not parts:
        raise ValueError("model is an empty list; attach at least one module")
    return _out_of_wrapper(parts[0]) if len(parts) == 1 else ModelParts(parts)


def _out_of_wrapper(model: nn.Module) -> nn.Module:
    """The DDP object that holds all of a wrapper's parameters, as in Lightning Fabric's; else the model as it is."""
    if Topology("", model).ddp is not None:
        return model
    inside = _ddp_objects(model)
    if len(inside) != 1 or not set(model.parameters()) <= set(inside[0].parameters()):
        return model
    return inside[0]


def _ddp_objects(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def watch(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> Watched:
    """Find the parameters to measure: the trainable ones of `model` that an optimizer steps.

    Where an engine steps copies of its own, as DeepSpeed's ZeRO does, those are measured.

    Args:
        model: from `one_module`.
        optimizer: one or several, also wrapped (Accelerate, torchft) or in a container (torchtitan).

    Raises:
        TypeError: not an optimizer.
        ValueError: nothing to train, or an optimizer over parameters that are not the model's.
    """
    given = _given(optimizer)
    optimizers = _hooked(given)
    engine = _engine(model, [*given, *optimizers])
    # Frozen ones too, where an optimizer holds them: they may be unfrozen later, and until then have no gradient.
    named = _named(model)
    if not any(p.requires_grad for p in named):
        raise ValueError("model has no trainable parameter (requires_grad is False everywhere): nothing to watch")
    stepped = [p for o in optimizers for p in parameters_of(o)]
    foreign = [p for p in stepped if p.requires_grad and p not in named]
    wanted = set(stepped)
    watched = [(p, name) for p, name in named.items() if p in wanted]
    trains = any(p.requires_grad for p, _ in watched)
    if engine and (foreign or not trains):
        own = {p: named.get(p, f"stepped.{number}") for number, p in enumerate(stepped)} or named
        return Watched(list(own), list(own.values()), optimizers, engine)
    if foreign:
        raise ValueError(
            f"optimizer holds {len(foreign)} parameters that are not the model's, the first of shape "
            f"{tuple(foreign[0].shape)}; attach the model whose parameters this optimizer steps"
        )
    if not trains:
        raise ValueError("the optimizer steps none of the model's trainable parameters; attach the one that does")
    return Watched([p for p, _ in watched], [name for _, name in watched], optimizers, engine)


def _named(model: nn.Module) -> dict[Tensor, str]:
    """Parameter -> its name; of several parts with the part's number in front, where two would have one name."""
    parts = list(model) if isinstance(model, ModelParts) else [model]
    found: dict[Tensor, tuple[int, str]] = {}
    for number, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            found.setdefault(parameter, (number, _plain(name)))  # parts may share one
    names = [name for _, name in found.values()]
    if len(parts) == 1 or len(set(names)) == len(names):
        return dict(zip(found, names, strict=True))
    return {parameter: f"{number}.{name}" for parameter, (number, name) in found.items()}


def _given(optimizers: object) -> list[object]:
    if isinstance(optimizers, Optimizer) or not isinstance(optimizers, Iterable):
        return [optimizers]
    listed = list(optimizers)
    if not listed:
        raise ValueError("optimizer is an empty list; attach at least one")
    return listed


def _hooked(given: Sequence[object]) -> list[Optimizer]:
    """The optimizers whose step hooks fire, each once."""
    found: dict[Optimizer, None] = {}
    for candidate in given:
        inner = _inside(candidate, ())
        if not inner and not isinstance(candidate, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer or several of them (got {type(candidate).__name__})"
            )
        if not inner:
            raise TypeError(
                f"{type(candidate).__name__} wraps an optimizer and has no step hooks of its own; "
                f"attach the inner one (often its .optimizer)"
            )
        found.update(dict.fromkeys(inner))
    return list(found)


#: Where wrappers keep the optimizer that they step: Accelerate, Lightning, DeepSpeed; torchft.
_INNER = ("optimizer", "optim")
_HOOKS = "_optimizer_step_pre_hooks"


def _inside(candidate: object, around: tuple[object, ...]) -> list[Optimizer]:
    """Optimizers with step hooks of their own in a wrapper or container; none if there are none.

    Args:
        candidate: what may be one.
        around: wrappers that it came out of.
    """
    if any(candidate is outer for outer in around):
        return []
    around = (*around, candidate)
    several = getattr(candidate, "optimizers", None)
    if isinstance(several, (list, tuple)) and several:  # torchtitan's container steps each of them
        each = [_inside(one, around) for one in several]
        return [inner for found in each for inner in found] if all(each) else []
    held = [h for name in _INNER if (h := getattr(candidate, name, None)) is not None]
    hooks = getattr(candidate, _HOOKS, None)
    # Lightning Fabric's wrapper has its inner optimizer's attributes: hooks registered there fire for the inner one.
    lent = any(getattr(inner, _HOOKS, None) is hooks for inner in held)
    if isinstance(candidate, Optimizer) and hooks is not None and not lent:
        return [candidate]
    return next((found for inner in held if (found := _inside(inner, around))), [])


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")).removeprefix(
        "module."
    )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All it holds, in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that are there, in the order of the groups."""
    return [p.grad for p in parameters_of(optimizer) if p.grad is not None]


def recognise(model: nn.Module, watched: Watched, world_size: int) -> Topology:
    """Tell how `model`'s gradients are averaged.

    Args:
        model: as given to attach.
        watched: from `watch`.
        world_size: as the launcher says; 1 without one.
    """
    joined = dist.is_available() and dist.is_initialized()
    world = dist.group.WORLD if joined else None

    def watching(why: str, kind: str = "unrecognised") -> Topology:
        return Topology(kind, model, acts=False, why=why, group=world)

    plain = Topology("single", model)
    if watched.engine:
        return watching(watched.engine, "ddp" if plain.ddp is not None else "unrecognised")
    if len(watched.optimizers) == len(watched.parameters) > 2:
        return watching("every parameter has an optimizer of its own, stepping inside backward?")
    if plain.ddp is not None:
        why = _why_not(plain.ddp, watched)
        if why:
            return watching(why, "ddp")
        if getattr(plain.ddp, "_use_python_reducer", False):
            return watching("compiled autograd averages the gradients (optimize_ddp='python_reducer')", "ddp")
        averaged = _averaged(plain.ddp, watched)
        group = plain.ddp.process_group
        try:
            return Topology("ddp", model, group=group, hook=local_hook(plain.ddp), averaged=averaged)
        except HookTakenError:
            return Topology("ddp", model, group=group, taken=True, averaged=averaged)
    several_ranks = joined and dist.get_world_size() > 1
    if several_ranks and (inside := _ddp_objects(model)):
        if {p for p in watched.parameters if p.requires_grad} <= {p for ddp in inside for p in ddp.parameters()}:
            return watching(_SEVERAL_DDP, "ddp")
        return watching(_DDP_INSIDE)
    if len({p.device for p in watched.parameters}) > 1:
        return watching("parameters lie on several devices")
    if any(map(is_sharded, watched.parameters)):
        kind, why = describe(model, watched.parameters, dist.get_world_size())
        if not why and world is not None and not serves(world, watched.device):
            why = (
                f"the process group has no backend for {watched.device.type}; init_process_group('cpu:gloo,cuda:nccl')"
            )
        if why or world is None:
            return watching(f"{kind}: {why}")
        return Topology(kind, model, group=world, sharding=Sharding(world))
    if several_ranks:
        return watching(
            "several ranks, but the model is no DistributedDataParallel; attach the DDP object, not what it wraps"
        )
    if world_size > 1:
        return watching(
            f"WORLD_SIZE is {world_size} but there is no process group; attach after init_process_group and DDP(...)"
        )
    return plain


_SEVERAL_DDP = (
    "several DistributedDataParallel objects, each of which averages its gradients in a backward of its own; attach "
    "one of them with its optimizer to have gradmon act on it"
)
_DDP_INSIDE = (
    "a part of the model is no DistributedDataParallel, and nobody averages its gradients; attach the "
    "DistributedDataParallel alone to have gradmon act on it"
)


def _averaged(model: DistributedDataParallel, watched: Watched) -> frozenset[int]:
    """Ids of DDP's parameters. Others (frozen when it was made) have gradients that differ by rank: not watched."""
    held = getattr(model, "_module_parameters", model.module.parameters())
    averaged = frozenset(id(p) for p in held if p.requires_grad)
    kept = [(p, name) for p, name in zip(watched.parameters, watched.names, strict=True) if id(p) in averaged]
    watched.parameters[:] = [p for p, _ in kept]
    watched.names[:] = [name for _, name in kept]
    return averaged


#: Engines that average, clip and step by rules of their own, by the package their classes come from.
_ENGINES = {
    "deepspeed": "DeepSpeed clips and steps by itself; for norms before its clip set its gradient_clipping to 0",
    "megatron": "Megatron clips in its own optimizer; for norms before its clip pass --clip-grad 0",
    "colossalai": "ColossalAI clips in its own optimizer; for norms before its clip leave max_norm out of boost()",
}


def _engine(model: nn.Module, optimizers: Sequence[object]) -> str:
    """Why this engine is only watched; empty if there is none that is known."""
    parts = model if isinstance(model, ModelParts) else (model,)
    for owner in (*parts, *optimizers):
        for kind in type(owner).__mro__:
            package = kind.__module__.partition(".")[0]
            if package in _ENGINES:
                return _ENGINES[package]
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            return (
                "FSDP1 keeps flat shards, whose norms are no global ones; use fully_shard (FSDP2), or its own "
                "model.clip_grad_norm_ for a clip"
            )
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for o in optimizers for kind in type(o).__mro__):
        return "ZeroRedundancyOptimizer steps only a part of the parameters on each rank"
    return ""


def _why_not(model: DistributedDataParallel, watched: Watched) -> str:
    """Why gradmon can't act on this DDP object; empty if it can."""
    ranks = dist.get_world_size(model.process_group)
    if ranks != dist.get_world_size():
        return f"DDP averages over {ranks} of {dist.get_world_size()} ranks, and the others would decide differently"
    ignored = {_plain(name) for name in model.parameters_to_ignore} & set(watched.names)
    if ignored:
        return f"DDP is told to ignore {len(ignored)} of the parameters, which then differ between ranks"
    return ""
