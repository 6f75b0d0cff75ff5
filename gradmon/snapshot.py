"""Generations of training state in host memory, for rollback: parameters, buffers, optimizers, and what is registered.

A generation's bytes lie in a *slot*, which a later generation takes over when this one is the oldest. On CUDA slots are
pinned and the copies queued on the stream the optimizer works on: so they lie between two steps, and nobody waits. (A
stream of their own would overlap with the next forward, and every writer of a buffer or a state would have to wait for
it; one that is missed leaves half of another step in the snapshot.)

Not in a generation, and left alone by a rollback: gradients, schedulers and what they write into the optimizer's
groups, random numbers, the data's position.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

GENERATIONS = 3
#: PyTorch rounds each pinned allocation up to a power of two: one per tensor would cost up to twice what is asked for.
_CHUNK_BYTES = 1 << 26
_ALIGNMENT = 16
#: Group entries that are the user's or a scheduler's, whatever the optimizer's constructor is called with.
_SETTINGS = frozenset(
    {"params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "betas", "momentum"}
    | {"base_momentum", "max_momentum", "weight_decay"}
)


class SnapshotError(RuntimeError):
    """A snapshot can't be put back, and nothing was changed."""


class _Slot:
    """Host memory in chunks, pinned for what lies on a CUDA device."""

    def __init__(self) -> None:
        self._chunks: dict[bool, list[Tensor]] = {True: [], False: []}
        self._used = {True: 0, False: 0}
        self._events: dict[torch.device, torch.cuda.Event] = {}

    @property
    def size_bytes(self) -> int:
        """Held, whether used or not."""
        return sum(chunk.numel() for chunks in self._chunks.values() for chunk in chunks)

    def reserve(self, sizes: Mapping[bool, int]) -> None:
        """Make room for so many pinned and other bytes. If memory runs out, what is held is as it was."""
        chunks = {
            pinned: [
                _chunk(n, pinned, held) for n, held in itertools.zip_longest(_chunk_sizes(size), self._chunks[pinned])
            ]
            for pinned, size in sizes.items()
        }
        self._chunks, self._used = chunks, dict.fromkeys(chunks, 0)
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)

    def pieces(self, size: int, pinned: bool) -> list[Tensor]:
        """The next `size` bytes of what is reserved; a tensor may span chunks."""
        start, found = self._used[pinned], []
        self._used[pinned] += _aligned(size)
        while size:
            number, offset = divmod(start, _CHUNK_BYTES)
            length = min(size, _CHUNK_BYTES - offset)
            found.append(self._chunks[pinned][number][offset : offset + length])
            start, size = start + length, size - length
        return found

    def mark(self, devices: set[torch.device]) -> None:
        """What is queued on these devices up to now reads or writes this memory."""
        for device in devices:
            self._events[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._events[device].record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until all of that is done."""
        for event in self._events.values():
            event.synchronize()


class _Saved:
    """One tensor's bytes; of a DTensor this rank's part."""

    def __init__(self, tensor: Tensor) -> None:
        part = _part(tensor)
        self.tensor: Tensor | None = tensor
        """What is to be copied, until it is."""
        self.shape, self.stride, self.dtype, self.device = part.shape, part.stride(), part.dtype, part.device
        self.size_bytes = part.numel() * part.element_size()
        self.pieces: list[Tensor] = []
        self._wrap: Callable[[Tensor], Tensor] = lambda local: local
        if part is not tensor:
            kind: Any = type(tensor)
            mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()  # type: ignore[attr-defined]
            self._wrap = lambda local: kind.from_local(
                local, mesh, placements, run_check=False, shape=shape, stride=stride
            )

    @property
    def pinned(self) -> bool:
        """True where the tensor lies on a CUDA device."""
        return self.device.type == "cuda"

    def copy(self, slot: _Slot) -> None:
        """Queue the copy to the host."""
        if self.tensor is None:
            return
        self.pieces = slot.pieces(self.size_bytes, self.pinned)
        for piece, part in zip(self.pieces, _cut(_part(self.tensor).contiguous(), self.pieces), strict=True):
            piece.copy_(part, non_blocking=self.pinned)
        self.tensor = None

    def fits(self, current: Any) -> bool:
        """True if `current` can be written in place."""
        if not isinstance(current, Tensor):
            return False
        part = _part(current)
        expanded = 0 in part.stride() and part.numel() > 1
        return not expanded and (part.shape, part.dtype, part.device) == (self.shape, self.dtype, self.device)

    def write(self, current: Tensor) -> Tensor:
        """In place; queued on the device's current stream."""
        part = _part(current.detach())
        dense = part if part.is_contiguous() else torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for piece, target in zip(self.pieces, _cut(dense, self.pieces), strict=True):
            target.copy_(piece, non_blocking=True)
        if dense is not part:
            part.copy_(dense)
        return current

    def fresh(self) -> Tensor:
        """A new tensor where the old one was."""
        return self._wrap(
            self.write(torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device))
        )


@dataclass(slots=True)
class _OptimizerState:
    optimizer: Optimizer
    parameters: list[Tensor]
    """All it had."""
    state: dict[Any, Any]
    """Parameter -> tree."""
    entries: list[dict[str, Any]]
    """Of each group those in which the optimizer counts."""


@dataclass(slots=True)
class _Generation:
    step: int
    slot: _Slot
    named: dict[str, _Saved]
    """Parameters and buffers, by the name that an error calls them."""
    optimizers: list[_OptimizerState]
    registered: dict[str, Any]
    """Name -> tree of its state_dict()."""
    saved: list[_Saved]
    """All tensors of it."""

    def unlike(self, tensors: Mapping[str, Tensor]) -> str:
        """Name of a parameter or buffer that can't be put back into `tensors`; empty if there is none."""
        return next((name for name, saved in self.named.items() if not saved.fits(tensors.get(name))), "")

    def devices(self) -> set[torch.device]:
        """CUDA devices its tensors lie on."""
        return {saved.device for saved in self.saved if saved.pinned}

    def sizes(self) -> dict[bool, int]:
        """Bytes that are to be pinned, and others."""
        return {kind: sum(_aligned(s.size_bytes) for s in self.saved if s.pinned is kind) for kind in (True, False)}


def check_registrable(name: str, thing: Any) -> None:
    """Raises a TypeError if a thing can't be put back."""
    if not all(callable(getattr(thing, method, None)) for method in ("state_dict", "load_state_dict")):
        raise TypeError(
            f"{name} must have state_dict() and load_state_dict() (got a {type(thing).__name__}); "
            f"register what holds its state"
        )


class Snapshots:
    """The newest generations of a run's training state. Each rank keeps what it holds itself.

    Call between steps: when gradients are complete and the optimizer has not begun, or has ended.

    Args:
        model: its buffers are kept.
        parameters: gives name -> parameter, of those that are trained now.
        optimizers: which train them.
    """

    def __init__(
        self, model: nn.Module, parameters: Callable[[], Mapping[str, Tensor]], optimizers: Sequence[Optimizer]
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._optimizers = optimizers
        self._registered: dict[str, Any] = {}
        self._held: list[_Generation] = []
        self._spare: list[_Slot] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the generations held, oldest first."""
        return tuple(generation.step for generation in self._held)

    def register(self, name: str, thing: Any) -> None:
        """Keep `thing.state_dict()` as well, from the next generation on; a rollback gives it to `load_state_dict`.

        Raises:
            TypeError: it has not both.
            ValueError: the name is taken.
        """
        check_registrable(name, thing)
        if name in self._registered:
            raise ValueError(f"{name} is registered already; give each thing a name of its own")
        self._registered[name] = thing

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Keep the state as it is now, after `step`; the oldest generation makes room if there are enough.

        Never waits for a CUDA device, unless a registered thing's `state_dict` does. Where memory runs out, the older
        generations are as they were.
        """
        generation = self._describe(step)
        full = len(self._held) == GENERATIONS
        slot = self._held[0].slot if full else self._spare.pop() if self._spare else generation.slot
        try:
            slot.reserve(generation.sizes())
        except BaseException:
            if not full:
                self._spare.append(slot)
            raise
        del self._held[: int(full)]  # its bytes are overwritten from here on
        for saved in generation.saved:
            saved.copy(slot)
        slot.mark(generation.devices())
        generation.slot = slot
        self._held.append(generation)

    def restorable(self) -> tuple[int, ...]:
        """Steps of the generations that could be put back now, oldest first: all that is there has kept its shape."""
        _reshard(self._model)
        tensors = self._named()  # anew: a forward may have put another tensor in a buffer's place
        return tuple(
            held.step for held in self._held if held.named.keys() == tensors.keys() and not held.unlike(tensors)
        )

    @torch.no_grad()
    def restore(self, step: int) -> None:
        """Put the state after `step` back and drop all other generations: newer ones are suspect.

        Parameters, buffers and optimizer state that have kept their shape are written in place, since compiled steps,
        CUDA graphs and DDP hold on to them. State that came later goes, what has gone comes back.

        Raises:
            SnapshotError: a parameter or buffer is gone, or has changed its shape or place; nothing was written.
            ValueError: there is no such generation.
        """
        generation = next((held for held in self._held if held.step == step), None)
        if generation is None:
            raise ValueError(f"there is no snapshot of step {step}; those held are of {list(self.steps)}")
        _reshard(self._model)
        tensors = self._named()
        unlike = generation.unlike(tensors)
        if unlike:
            raise SnapshotError(
                f"the snapshot of step {step} can't be put back: {unlike} is gone or has another shape, type or "
                f"device; detach and attach gradmon after such a change"
            )
        generation.slot.wait()  # sync: for copies that are many steps old
        for name, tree in generation.registered.items():  # first: one that refuses leaves the rest as it is
            self._registered[name].load_state_dict(_put_back(tree, None))
        for name, saved in generation.named.items():
            saved.write(tensors[name])
        for kept in generation.optimizers:
            _put_back_optimizer(kept)
        generation.slot.mark(generation.devices())
        self._keep([generation])

    def clear(self) -> None:
        """Drop all generations; the next ones use their memory."""
        self._keep([])

    @torch.no_grad()
    def bytes_needed(self) -> int:
        """Host memory of this rank once all generations are there; known before any is.

        State that an optimizer has not made yet is taken for two tensors of each parameter's size, as Adam's.
        """
        generation = self._describe(0)
        sizes = generation.sizes()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups if not optimizer.state else ():
                for saved in (_Saved(p) for p in group["params"] if p.requires_grad):
                    sizes[saved.pinned] += 2 * _aligned(saved.size_bytes)
        return GENERATIONS * sum(sum(_chunk_sizes(size)) for size in sizes.values())

    def bytes_held(self) -> int:
        """Host memory in use now, with what dropped generations have left for the next."""
        return sum(slot.size_bytes for slot in (*self._spare, *(held.slot for held in self._held)))

    def _named(self) -> dict[str, Tensor]:
        tensors = {f"parameter {name}": parameter for name, parameter in self._parameters().items()}
        buffers = {f"buffer {name}": buffer for name, buffer in self._model.named_buffers()}
        # A sparse buffer has no bytes in one place; it is left alone.
        return tensors | {name: buffer for name, buffer in buffers.items() if buffer.layout == torch.strided}

    def _keep(self, generations: list[_Generation]) -> None:
        self._spare += [held.slot for held in self._held if held not in generations]
        self._held = generations

    def _describe(self, step: int) -> _Generation:
        """A generation without its bytes."""
        saved: list[_Saved] = []

        def keep(tensor: Tensor) -> _Saved:
            saved.append(_Saved(tensor.detach()))
            return saved[-1]

        def keep_all(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: keep(leaf) if isinstance(leaf, Tensor) else copy.deepcopy(leaf), tree)

        _reshard(self._model)
        return _Generation(
            step=step,
            slot=_Slot(),
            named={name: keep(tensor) for name, tensor in self._named().items()},
            optimizers=[
                _OptimizerState(
                    optimizer,
                    parameters=[p for group in optimizer.param_groups for p in group["params"]],
                    state={p: keep_all(dict(state)) for p, state in optimizer.state.items()},
                    entries=[keep_all({n: g[n] for n in _own_entries(optimizer, g)}) for g in optimizer.param_groups],
                )
                for optimizer in self._optimizers
            ],
            registered={name: keep_all(thing.state_dict()) for name, thing in self._registered.items()},
            saved=saved,
        )


def _reshard(model: nn.Module) -> None:
    """Under FSDP2 an evaluation may have left whole copies behind, which would be trained on after a rollback."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()


def _put_back_optimizer(kept: _OptimizerState) -> None:
    optimizer = kept.optimizer
    for parameter in kept.parameters:
        if parameter not in kept.state:
            optimizer.state.pop(parameter, None)
    for parameter, tree in kept.state.items():
        current = optimizer.state[parameter]
        then = _put_back(tree, dict(current))
        current.clear()
        current.update(then)
    for group, own in zip(optimizer.param_groups, kept.entries, strict=False):
        group.update(_put_back(own, {name: group.get(name) for name in own}))


def _put_back(tree: Any, current: Any) -> Any:
    """The tree as it was saved, its tensors those of `current` where it still has the same shape."""
    leaves, shape = pytree.tree_flatten(tree)
    there, shape_now = pytree.tree_flatten(current)
    if shape_now != shape:
        there = [None] * len(leaves)
    put = [
        (leaf.write(now) if leaf.fits(now) else leaf.fresh()) if isinstance(leaf, _Saved) else copy.deepcopy(leaf)
        for leaf, now in zip(leaves, there, strict=True)
    ]
    return pytree.tree_unflatten(put, shape)


def _own_entries(optimizer: Optimizer, group: dict[str, Any]) -> Iterator[str]:
    """Group entries in which the optimizer itself counts, as schedule-free ones do (k, weight_sum, lr_max).

    What its constructor takes is a setting: the user's, or a scheduler's, which cycles it and goes on after a rollback.
    """
    settings = set(_SETTINGS)
    for kind in type(optimizer).__mro__[:-1]:
        if "__init__" in vars(kind):
            settings |= inspect.signature(vars(kind)["__init__"]).parameters.keys()
    return (name for name in group if name not in settings)


def _part(tensor: Tensor) -> Tensor:
    """What this rank holds: of a DTensor its local part."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def _cut(dense: Tensor, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """The bytes of a contiguous tensor, cut like `pieces`."""
    return torch.split(dense.reshape(-1).view(torch.uint8), [p.numel() for p in pieces]) if pieces else ()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _chunk_sizes(size: int) -> list[int]:
    whole, rest = divmod(size, _CHUNK_BYTES)
    return [_CHUNK_BYTES] * whole + ([1 << (rest - 1).bit_length()] if rest else [])


def _chunk(size: int | None, pinned: bool, held: Tensor | None) -> Tensor:
    """The one that is held, if it is large enough or not needed."""
    if held is not None and (size is None or held.numel() >= size):
        return held
    return torch.empty(size or 0, dtype=torch.uint8, device="cpu", pin_memory=pinned)
