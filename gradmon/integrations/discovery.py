"""What this process trains: models and optimizers, found among its living objects.

torch tells of optimizers only when they step, and of finished modules not at all. So where gradmon has to find them,
it looks once through what the garbage collector tracks (0.15 s for 350,000 objects, measured on a slow core), and takes
of it what belongs together.

Words used here: a *root* is a module that no other module holds.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradmon.topology import ModelParts


@dataclass(frozen=True, slots=True)
class Found:
    """What is trained together, in the order in which its optimizers were made."""

    models: list[nn.Module]
    """The fewest roots that hold the optimizers' parameters; a DistributedDataParallel object before what it wraps.
    Parameters that no module holds are in one of their own, at the end."""
    optimizers: list[Optimizer]
    side_by_side: bool
    """True for several models, each of which may have gradients of its own."""

    @property
    def distributed(self) -> bool:
        """True if the ranks train it together, as far as can be told from it: then every rank will come by here."""
        return any(ddp_of(model) is not None for model in self.models) or any(
            hasattr(p, "device_mesh") for model in self.models for p in model.parameters()
        )


def discover(
    wanted: Callable[[Optimizer], bool],
    order: Callable[[Optimizer], int] = lambda _optimizer: 0,
    bare: Optimizer | None = None,
) -> Found:
    """Look for what is trained.

    Args:
        wanted: asked of every optimizer. With one come all others of its models.
        order: which were made before which; what the garbage collector lists has none.
        bare: an optimizer that is stepped itself although another one holds it.
    """
    modules, optimizers = _living()
    optimizers = sorted(_outermost(optimizers, bare), key=order)
    chosen = [o for o in optimizers if wanted(o)]
    models = _covering(_roots(modules), _ids(chosen))
    held = {id(p) for m in models for p in m.parameters()}
    optimizers = [o for o in optimizers if o in chosen or (held and held.issuperset(_ids([o])))]
    places = {id(p): n for n, p in enumerate(p for o in optimizers for p in _trained(o))}
    models.sort(key=lambda model: min(places.get(id(p), len(places)) for p in model.parameters()))
    homeless = [p for o in chosen for p in _trained(o) if id(p) not in held]
    return Found([*models, _home(homeless)] if homeless else models, optimizers, len(models) > 1)


def remember() -> None:
    """What is there now is found also after `gc.freeze()`, which takes it off the garbage collector's list."""
    _remembered.extend(weakref.ref(thing) for things in _living() for thing in things)


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP object that a model is, compiled or not."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Those that an optimizer holds and steps itself, as ZeRO's does and containers of several do."""
    for value in vars(optimizer).values():
        parts: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        yield from (part for part in parts if isinstance(part, Optimizer))


_remembered: list[weakref.ref[Any]] = []


def _living() -> tuple[list[nn.Module], list[Optimizer]]:
    """Never by `isinstance`, which asks a lazy object for its class and so wakes it up."""
    found: tuple[list[nn.Module], list[Optimizer]] = ([], [])
    places: dict[type, int | None] = {}
    seen: set[int] = set()
    for thing in itertools.chain(gc.get_objects(), (reference() for reference in _remembered)):
        kind = type(thing)
        if kind not in places:
            places[kind] = 0 if issubclass(kind, nn.Module) else 1 if issubclass(kind, Optimizer) else None
            if kind in (_Home, ModelParts):  # gradmon's own
                places[kind] = None
        place = places[kind]
        if place is not None and id(thing) not in seen:
            seen.add(id(thing))
            found[place].append(thing)
    # One whose __init__ has not come through yet has nothing in it.
    return [m for m in found[0] if "_modules" in vars(m)], [o for o in found[1] if "param_groups" in vars(o)]


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _ids(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for o in optimizers for p in _trained(o)}


class _Home(nn.Module):
    """Holds parameters that are in no module: a learnt temperature is often a bare tensor."""


def _home(tensors: list[Tensor]) -> nn.Module:
    home = _Home()
    home._parameters.update({f"tensor_{n}": t for n, t in enumerate(dict.fromkeys(tensors))})  # type: ignore[misc]
    return home


def _outermost(optimizers: list[Optimizer], bare: Optimizer | None) -> list[Optimizer]:
    """Without those that another steps (but with the parts of a container), and without those that do nothing."""
    hidden: set[int] = set()
    for optimizer in optimizers:
        inner = [o for o in inner_optimizers(optimizer) if o is not optimizer]
        if len(inner) == 1 and inner[0] is not bare and "_optimizer_step_pre_hooks" in vars(optimizer):
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
