"""What the training process keeps, by reference, so that an incident's batch can be saved one step later.

The pre-hook on the module that the user calls runs outside of what torch.compile compiles; of a module that was
compiled in place (`model.compile()`), or is called through another's compiled graph, it sees nothing, and says so.
"""

from __future__ import annotations

import contextlib
import platform
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradmon import __version__
from gradmon.config import IncidentConfig
from gradmon.diagnose.bundle import LOADED, Bundle, Draft, Forward, bundle_path, inputs_of, plain, same
from gradmon.diagnose.operations import is_users
from gradmon.diagnose.weights import plain_name
from gradmon.inputs import is_readable
from gradmon.loaded import Gave, Loaded
from gradmon.record import RankIdentity, StepRecord

#: Frames of the user's code that are kept of a forward call.
_FRAMES = 12
#: So many steps pass before the next bundle of the same kind: a burst is one incident, and an incident in every step
#: must not copy a batch in every step.
_STEPS_BETWEEN = 100
#: After so many forwards that drew nothing from the module `random` its state is no longer taken.
_FORWARDS_TO_TELL = 8
#: Parts of a batch that are saved.
_PARTS_SAVED = 1 << 16


@dataclass(slots=True)
class _Held:
    """One forward call, by reference; tensors that require a gradient are detached."""

    micro_step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: dict[str, Any]
    autocast: torch.dtype | None
    stack: list[tuple[str, int, str]]
    loaded: Loaded | None
    """The indices, or a `Loaded` that can tell them and has the loader's batch."""
    notes: list[str]
    versions: dict[int, int] = field(default_factory=dict)
    """id of a tensor -> how often it had been written to in place."""
    requires_grad: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    held: deque[_Held]
    micro_steps: int = 0


class Capture:
    """Keeps references to the batches of the step in progress and of the one before.

    No copies are made: memory that a script would have freed is held for one step longer, the batches of at most
    `config.batches` forward calls of each of the two steps. With each goes what the DataLoader gave, where the targets
    are: the same tensors, or those on the host of which `.to(device)` made copies; and one batch more per step, as a
    prefetcher may be ahead of the call. Nothing is kept of forwards without gradients (evaluation), nor of calls inside
    a call (recursion, a checkpointed forward that runs again).

    Args:
        model: what the user calls: the DDP object, the compiled module, where there is one.
        device: the model's.
        config: how much is kept and saved.
        guarded: `guarded("capture")` is a context in which a failure of gradmon's own is counted and forgotten.

    Attributes:
        why_nothing: a sentence if no batch can be captured of this model; else empty.
        loaded: gives what the DataLoader gave lately.
        seen: is given the inputs of each forward call, by name.
        backwards: gives how many backwards the step in progress has had; where it is None or gives None, forwards are
            counted.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        config: IncidentConfig,
        guarded: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.loaded: Callable[[], Loaded] | None = None
        self.backwards: Callable[[], int | None] | None = None
        self.seen: Callable[[Mapping[str, Any]], None] | None = None
        self.why_nothing = ""
        self._model = model
        self._device = device
        self._config = config
        self._guarded = guarded
        self._depth = 0
        self._taken = False
        """True inside a forward that is kept."""
        self._now = self._new_step()
        self._previous: tuple[int, _Step] | None = None
        self._last_saved: dict[str, int] = {}
        """Reason of an incident -> step of its newest bundle."""
        self._called_from: tuple[Any, list[tuple[str, int, str]]] = (None, [])
        self._python: Any = None
        """State of the module `random` before the newest forward that may have used it."""
        self._forwards_to_tell = _FORWARDS_TO_TELL
        self._draws = False
        self._handles: list[Any] = []
        self._device_rng = _device_generator(device)
        if config.bundles == 0:
            self.why_nothing = "incident.bundles is 0"
        elif getattr(model, "_compiled_call_impl", None) is not None:
            self.why_nothing = (
                "the model was compiled in place (model.compile()), where no batch can be seen;"
                " train torch.compile(model) instead to have it in incident bundles"
            )
        else:
            # Parts of a model are never called as one; the first is given the batch.
            called = model[0] if isinstance(model, nn.ModuleList) and len(model) else model
            self._handles = [
                called.register_forward_pre_hook(_Hook(self._before), prepend=True, with_kwargs=True),
                called.register_forward_hook(_Hook(self._after), always_call=True),
            ]

    def step_ended(self, number: int) -> None:
        """Optimizer step `number` has ended: what comes next is of the next; what is older than it is let go."""
        self._depth = 0  # a KeyboardInterrupt in a forward that the script lives through leaves it raised
        self._previous = (number, self._now)
        self._now = self._new_step()

    def stop(self) -> None:
        """Remove the hooks, let all batches go."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now, self._previous = self._new_step(), None

    def save(
        self, record: StepRecord, *, identity: RankIdentity, settings: Mapping[str, Any], journal: Path
    ) -> Draft | None:
        """Take to the host what a bundle of this step needs; for the rank that broke it, in the step after.

        Waits for the device. What it returns is to be written on the journal's thread, `journal.call("bundle",
        draft.write)`.

        Args:
            record: the step, as it was read back.
            identity: of this rank.
            settings: the config, as `Config.to_dict` gives it.
            journal: this rank's journal; the bundle goes beside it.

        Returns:
            None where no bundle is due: none are wanted, or enough of them lie there for now.
        """
        if not self._wanted(record):
            return None
        self._last_saved[record.reason] = record.step
        notes = [self.why_nothing] if self.why_nothing else []
        step = self._step_of(record.step)
        room = self._config.max_mib << 20
        forwards = []
        for held in self._chosen(record, step, notes):
            size = _bytes_of((held.args, held.kwargs))
            if size > room:
                notes.append(
                    f"the batch of micro-step {held.micro_step} was left out: {_mib(size)} do not fit into"
                    f" incident.max_mib {self._config.max_mib}"
                )
                continue
            room -= size
            forward, size = self._on_host(held, room, notes)
            forwards.append(forward)
            room -= size
        weights = self._weights(room, record, notes)
        bundle = Bundle(
            identity=identity,
            record=record,
            records=[record],
            worst=[],
            forwards=forwards,
            micro_steps=step.micro_steps,
            eval_modules=[plain_name(name) for name, m in bare(self._model).named_modules() if not m.training],
            weights=weights,
            config=dict(settings),
            versions=_versions(),
            notes=notes,
        )
        path = bundle_path(journal, identity.rank, record.step)
        return Draft(bundle, path, journal, self._config.bundles, self._config.redact)

    # --- in every forward ----------------------------------------------------------------------------------------

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        # Traced, or transformed by torch.func: the batch is none that could be saved.
        if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        try:
            self._take(args, kwargs)
        except Exception:
            with self._guarded("capture"):
                raise

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and self._taken and self._forwards_to_tell:
            self._forwards_to_tell -= 1
            if random.getstate() != self._python:
                self._draws, self._forwards_to_tell = True, 0
        self._taken = False

    def _take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        step = self._now
        step.micro_steps += 1
        notes: list[str] = []
        versions: dict[int, int] = {}
        requires_grad: list[str] = []

        def hold(tensor: Tensor, where: str) -> Tensor:
            if tensor.requires_grad:
                requires_grad.append(where)
                tensor = tensor.detach()  # shares memory and version, not the graph
            try:
                versions[id(tensor)] = tensor._version
            except RuntimeError:  # made in inference mode, where writes are not counted
                pass
            return tensor

        def keep(value: Any, where: str) -> Any:
            return hold(value, where) if type(value) is Tensor else plain(value, where, notes, hold)

        backwards = None if self.backwards is None else self.backwards()
        held = _Held(
            micro_step=step.micro_steps if backwards is None else backwards + 1,
            args=tuple([keep(value, f"input {i}") for i, value in enumerate(args)]),
            kwargs={name: keep(value, f"input {name}") for name, value in kwargs.items()},
            rng={
                "cpu": torch.default_generator.get_state(),
                "device": None if self._device_rng is None else self._device_rng.get_state(),
                "python": self._python_state(),
            },
            autocast=_autocast(self._device.type),
            stack=self._stack(),
            loaded=None if self.loaded is None else self.loaded(),
            notes=notes,
            versions=versions,
            requires_grad=requires_grad,
        )
        step.held.append(held)
        if self.seen is not None:
            self.seen(dict(inputs_of(held.args, held.kwargs)))  # what is held has no graph

    def _stack(self) -> list[tuple[str, int, str]]:
        """The user's frames; most steps call the model from where the step before did."""
        frame = _first_users_frame()
        above = None if frame is None else frame.f_back
        here = frame and (frame.f_code, frame.f_lineno, above and above.f_code, above and above.f_lineno)
        if here != self._called_from[0]:
            self._called_from = here, list(_users_frames(frame))
        return self._called_from[1]

    def _python_state(self) -> Any:
        """Costs as much as all else here, and few models draw from it: any state will do for one that does not."""
        self._taken = True
        if self._draws or self._forwards_to_tell:
            self._python = random.getstate()
        return self._python

    def _new_step(self) -> _Step:
        return _Step(deque(maxlen=self._config.batches))

    # --- at an incident --------------------------------------------------------------------------------------------

    def _wanted(self, record: StepRecord) -> bool:
        last = self._last_saved.get(record.reason)
        return self._config.bundles > 0 and (last is None or record.step - last >= _STEPS_BETWEEN)

    def _step_of(self, number: int) -> _Step:
        if self._previous is not None and self._previous[0] == number:
            return self._previous[1]
        return self._new_step()

    def _chosen(self, record: StepRecord, step: _Step, notes: list[str]) -> list[_Held]:
        """The culprit's micro-step where it is known; else all that are held, the newest first."""
        if not step.held:
            if not self.why_nothing:
                notes.append("no forward call of this step was seen: the batch is not in the bundle")
            return []
        if record.micro_step is None:
            if step.micro_steps > len(step.held):
                notes.append(
                    f"of {step.micro_steps} micro-steps the last {len(step.held)} were kept (incident.batches)"
                )
            return list(reversed(step.held))
        chosen = [held for held in step.held if held.micro_step == record.micro_step]
        if not chosen:
            notes.append(
                f"micro-step {record.micro_step} broke first, but of {step.micro_steps} only the last"
                f" {len(step.held)} were kept: raise incident.batches"
            )
            return list(reversed(step.held))
        return chosen

    def _on_host(self, held: _Held, room: int, notes: list[str]) -> tuple[Forward, int]:
        """With it the bytes that what the loader gave takes, of those there are."""
        notes += held.notes
        copies: list[tuple[Tensor, Tensor]] = []

        def to_host(tensor: Tensor, where: str) -> Tensor | None:
            known = held.versions.get(id(tensor), -1)
            if known >= 0 and tensor._version != known:
                notes.append(f"{where} of micro-step {held.micro_step} was written over after the forward call")
            host = _on_host(tensor, where, notes)
            if host is not None:
                copies.append((tensor, host))
            return host

        args = tuple(plain(value, where, notes, to_host, _PARTS_SAVED) for where, value in inputs_of(held.args, {}))
        kwargs = {
            name.removeprefix("input "): plain(value, name, notes, to_host, _PARTS_SAVED)
            for name, value in inputs_of((), held.kwargs)
        }
        gave = _loaded_for(held, copies)
        if gave is None and held.loaded is not None and held.loaded.batches:
            notes.append(
                "the samples' dataset indices are not known, and what the DataLoader gave is left out: the batch was"
                " changed between loader and model, and a loader may be ahead of it"
            )
        indices = None if gave is None else gave.indices
        loaded, size = (None, 0) if gave is None else self._loaded(held, gave, copies, room, notes)
        forward = Forward(
            micro_step=held.micro_step,
            args=args,
            kwargs=kwargs,
            rng=held.rng,
            device=self._device.type,
            autocast=held.autocast,
            stack=[f"{file}:{line} in {function}" for file, line, function in held.stack],
            indices=plain(indices, "indices", notes, to_host, _PARTS_SAVED),
            requires_grad=held.requires_grad,
            loaded=loaded,
        )
        return forward, size

    def _loaded(
        self, held: _Held, gave: Gave, copies: list[tuple[Tensor, Tensor]], room: int, notes: list[str]
    ) -> tuple[Any, int]:
        """What the loader gave, and the bytes it takes; what forward got of it is stored once."""

        def stored(tensor: Tensor, _where: str) -> Tensor:
            return next((host for given, host in copies if tensor is given or _is_copy(tensor, host)), tensor)

        batch = plain(gave.batch, LOADED, [], stored, _PARTS_SAVED)
        known = {id(host) for _, host in copies}
        size = _bytes_of(batch, known)
        if size > room:
            notes.append(
                f"what the DataLoader gave for micro-step {held.micro_step} was left out: {_mib(size)} do not fit into"
                f" incident.max_mib {self._config.max_mib} beside the batch"
            )
            return None, 0

        def on_host(tensor: Tensor, where: str) -> Tensor | None:
            shared = stored(tensor, where)
            return shared if id(shared) in known else _on_host(tensor, where, notes)

        return plain(gave.batch, LOADED, notes, on_host, _PARTS_SAVED), size

    def _weights(self, room: int, record: StepRecord, notes: list[str]) -> dict[str, Tensor] | None:
        if not self._config.weights:
            return None
        model = bare(self._model)
        # Not state_dict(): under some wrappers it is a collective, and this rank is alone here.
        named = {plain_name(name): t for name, t in (*model.named_parameters(), *model.named_buffers())}
        if any(hasattr(t, "placements") or type(t).__name__ == "FlatParameter" for t in named.values()):
            notes.append("the weights were left out: each rank holds a part of them only; replay with --weights")
            return None
        size = sum(t.nbytes for t in named.values())
        if size > room:
            notes.append(
                f"the weights were left out: {_mib(size)} do not fit into incident.max_mib {self._config.max_mib}"
                " beside the batch; replay with --weights"
            )
            return None
        if record.action not in ("skip", "rollback") or not record.applied:
            notes.append("the weights are those after the step, which was not skipped: replay sees them a step later")
        saved = {name: _on_host(t.detach(), name, notes) for name, t in named.items()}
        return {name: t for name, t in saved.items() if t is not None}


class _Hook:
    """A hook on the user's module. A copy of the module, for a mean of the weights or on its way to a file or another
    process, takes along a call that does nothing, of the standard library, and nothing of gradmon.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> None:
        """Traced into a graph it leaves nothing there."""
        if not torch.compiler.is_compiling():
            self._function(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        """`nullcontext().__exit__` takes any arguments and gives None."""
        return getattr, (contextlib.nullcontext(), "__exit__")


def bare(model: nn.Module) -> nn.Module:
    """The user's own module, out of DDP and torch.compile."""
    inner: Any = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            found: nn.Module = inner
            return found


def _on_host(tensor: Tensor, where: str, notes: list[str]) -> Tensor | None:
    """A copy of its own, of no more memory than it needs and of torch's own class; a DTensor's local part."""
    value: Any = tensor
    if hasattr(value, "placements"):
        notes.append(f"{where} is this rank's part of a DTensor")
        value = value.to_local()
    sparse = type(value) is Tensor and value.layout == torch.sparse_coo
    if not sparse and not is_readable(value):
        notes.append(f"{where} was left out: a {_kind(value)} can't be saved")
        return None
    with torch.no_grad():
        plainly = value.detach() if sparse else value.detach().as_subclass(Tensor)
        host: Tensor = plainly.to("cpu", copy=True)  # sync: an incident, once
    if host.is_inference():
        host = host.clone()
    return host


def _kind(value: Tensor) -> str:
    if type(value) is not Tensor:
        return type(value).__qualname__
    return f"tensor of layout {value.layout}, type {value.dtype} and device {value.device.type}"


def _loaded_for(held: _Held, copies: list[tuple[Tensor, Tensor]]) -> Gave | None:
    """The loader's batch that this forward was given, or a part of it; None where that is not known."""
    if held.loaded is None:
        return None
    return held.loaded.batch_of([given for given, _ in copies], [host for _, host in copies])


def _is_copy(tensor: Tensor, host: Tensor) -> bool:
    on_host = tensor.device.type == "cpu" and is_readable(tensor)
    return on_host and (tensor.dtype, tensor.shape) == (host.dtype, host.shape) and same(tensor, host)


def _bytes_of(batch: Any, known: Collection[int] = ()) -> int:
    """What it takes on the host, about; without the tensors of these ids, which are stored already."""
    tensors: dict[int, Tensor] = {}
    texts = 0

    def add(tensor: Tensor, _where: str) -> None:
        if id(tensor) not in known:
            tensors[id(tensor)] = tensor

    def look(value: Any) -> None:
        nonlocal texts
        if isinstance(value, (str, bytes)):
            texts += len(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                look(part)
        elif isinstance(value, dict):
            look(list(value.values()))

    plain(batch, "", [], add, _PARTS_SAVED)
    look(batch)
    return texts + sum(
        (t._nnz() if t.layout == torch.sparse_coo else t.numel()) * t.element_size() for t in tensors.values()
    )


def _device_generator(device: torch.device) -> torch.Generator | None:
    """The generator that random operations on this device use; None on the CPU, whose is torch's default."""
    if device.type == "cpu":
        return None
    generators = getattr(torch.get_device_module(device), "default_generators", ())
    return generators[device.index or 0] if generators else None


def _autocast(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _first_users_frame() -> Any:
    frame: Any = sys._getframe(2)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _users_frames(frame: Any) -> Iterator[tuple[str, int, str]]:
    """File, line, function of the user's frames, innermost first. The frames themselves would keep what they hold."""
    count = 0
    while frame is not None and count < _FRAMES:
        code = frame.f_code
        if is_users(code.co_filename):
            count += 1
            yield code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _versions() -> dict[str, str]:
    return {
        "gradmon": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda or ""),
    }
