"""What this process trains: models and optimizers, found among its living objects.

torch tells of optimizers only when they step, and of finished modules not at all. So where gradmon has to find them,
it looks once through what the garbage collector tracks (some 50 ms), and takes of it what belongs together.

Words used here: a *root* is a module that no other module holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Found:
    """What is trained together."""

    models: list[nn.Module]
    """The fewest roots that hold the optimizers' parameters; a DistributedDataParallel object before what it wraps."""
    optimizers: list[Optimizer]
    homeless: int
    """Parameters of optimizers that no module holds."""

    @property
    def distributed(self) -> bool:
        """True if the ranks train it together, as far as can be told from it: then every rank will come by here."""
        return any(ddp_of(model) is not None for model in self.models) or any(
            hasattr(p, "device_mesh") for model in self.models for p in model.parameters()
        )


def discover(wanted: Callable[[Optimizer], bool]) -> Found:
    """Look for what is trained.

    Args:
        wanted: asked of every optimizer. With one come all others of its models.
    """
    modules, optimizers = _living()
    optimizers = _outermost(optimizers)
    chosen = [o for o in optimizers if wanted(o)]
    roots = _roots(modules)
    models = _covering(roots, _ids(chosen))
    held = {id(p) for m in models for p in m.parameters()}
    optimizers = [o for o in optimizers if o in chosen or held.issuperset(_ids([o]))]
    return Found(models, optimizers if chosen else [], len(_ids(chosen) - held))


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP object that a model is, compiled or not."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Those that an optimizer holds and steps itself, as ZeRO's does and containers of several do."""
    for value in vars(optimizer).values():
        parts: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        yield from (part for part in parts if isinstance(part, Optimizer))


def _living() -> tuple[list[nn.Module], list[Optimizer]]:
    """Never by `isinstance`, which asks a lazy object for its class and so wakes it up."""
    found: tuple[list[nn.Module], list[Optimizer]] = ([], [])
    places: dict[type, int | None] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in places:
            places[kind] = 0 if issubclass(kind, nn.Module) else 1 if issubclass(kind, Optimizer) else None
        place = places[kind]
        if place is not None:
            found[place].append(thing)
    # One whose __init__ has not come through yet has nothing in it.
    return [m for m in found[0] if "_modules" in vars(m)], [o for o in found[1] if "param_groups" in vars(o)]


def _ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Of the parameters they train."""
    groups = (group for o in optimizers for group in o.param_groups)
    return {id(p) for group in groups for p in group["params"] if p.requires_grad}


def _outermost(optimizers: list[Optimizer]) -> list[Optimizer]:
    """Without those that another steps (but with the parts of a container), and without those that do nothing."""
    hidden: set[int] = set()
    for optimizer in optimizers:
        inner = [o for o in inner_optimizers(optimizer) if o is not optimizer]
        if inner and "_optimizer_step_pre_hooks" in vars(optimizer) and len(inner) == 1:
            hidden.add(id(inner[0]))
        elif inner:
            hidden.add(id(optimizer))
    return [o for o in optimizers if id(o) not in hidden and "_optimizer_step_pre_hooks" in vars(o) and _ids([o])]


def _roots(modules: list[nn.Module]) -> list[nn.Module]:
    held = {id(child) for module in modules for child in module._modules.values()}
    return [module for module in modules if id(module) not in held]


def _covering(roots: list[nn.Module], wanted: set[int]) -> list[nn.Module]:
    """The roots that hold the wanted parameters: DDP objects first, the newest first, then the smallest."""
    holding = [(m, {id(p) for p in m.parameters()}) for m in reversed(roots)]
    holding = [(m, held) for m, held in holding if not wanted.isdisjoint(held)]
    holding.sort(key=lambda found: (ddp_of(found[0]) is None, len(found[1])))
    taken: list[nn.Module] = []
    missing = set(wanted)
    for module, held in holding:
        if not missing.isdisjoint(held):
            taken.append(module)
            missing -= held
    return taken
