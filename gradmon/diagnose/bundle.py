"""The incident bundle: one file with what a replay of the step needs, beside the journal of the rank that broke it.

    DIR/<run>/<instance>/<attempt>/rank-00007-step-0000123.bundle

Plain containers, numbers, texts and tensors, written with `torch.save` and read with `weights_only=True`: nothing is
ever executed from a bundle. It holds data of the training set, so only its owner may read it.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import inspect
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmon import __version__
from gradmon.diagnose import factory
from gradmon.diagnose.operations import Contents, Given, contents
from gradmon.journal import JournalView, read_journal
from gradmon.record import DETAIL_COLUMNS, RankIdentity, StepRecord

#: A reader knows this one, and reports newer ones.
VERSION = 1
_VERSION_KEY = "gradmon_bundle"
#: Steps around the incident whose records go with it.
_RECORDS = 64
_WORST = 16
_SAMPLES_NAMED = 4
#: Parts of a batch, and levels, that are kept: a step must not take longer for a list of a million texts.
MOST_PARTS = 1024
_DEEPEST = 16
_KINDS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
#: Marks a dict that was an object with fields: a dataclass, a BatchEncoding.
_FIELDS_OF = "gradmon:fields of"
#: Name of what the DataLoader gave, in sentences.
LOADED = "the loader's batch"


class BundleError(ValueError):
    """The bundle can't be read; the message says why and what to do about it."""


class Fields(dict[str, Any]):
    """What a batch object (a dataclass, a BatchEncoding) held: by key, and by attribute as the model may ask."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the bundle's batch has no {name!r}") from None


@dataclass(slots=True)
class Forward:
    """One forward call of the step: its batch, and all else that it depended on."""

    micro_step: int
    """Of its optimizer step, from 1."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: dict[str, Any]
    """`cpu` and `device`: states of torch's generators, `python` of the module `random`; just before the forward."""
    device: str
    """Type of the model's device, `cuda`."""
    autocast: torch.dtype | None
    """The type autocast was set to, None where it was off."""
    stack: list[str]
    """`file:line in function` of the user's code at the call, innermost first."""
    indices: Any = None
    """Indices of the samples in their dataset, as far as the loader tells."""
    requires_grad: list[str] = field(default_factory=list)
    """Inputs that asked for a gradient, `input 0`."""
    bad: list[str] = field(default_factory=list)
    """What is not finite in the batch, as sentences."""
    loaded: Any = None
    """The batch as the DataLoader gave it, targets too; None where it is not known. What forward got is in it as well,
    and is stored once."""


@dataclass(slots=True)
class Bundle:
    """One incident as the rank that caused it saw it."""

    identity: RankIdentity
    record: StepRecord
    records: list[StepRecord]
    """Steps around it, oldest first; the newest may not have been written yet."""
    worst: list[dict[str, Any]]
    """Parameters whose gradients were not finite or largest, by the newest details: `name`, `norm`, `nan_count`,
    `inf_count`, `abs_max`, `step`."""
    forwards: list[Forward]
    """The culprit's micro-step where it is known, else the newest of the step; empty if the batch was left out."""
    micro_steps: int
    """Forwards the step had."""
    eval_modules: list[str]
    """Modules that were not in train mode."""
    weights: dict[str, Tensor] | None
    """Parameters and buffers by name, as they were when the bundle was saved."""
    config: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    """What was left out, overwritten or changed, as sentences."""

    @property
    def step(self) -> int:
        """The optimizer step."""
        return self.record.step


@dataclass(slots=True)
class Draft:
    """A bundle on its way: all of it is on the host; `write` may take its time.

    Args:
        bundle: what is to be written.
        path: where.
        journal: this rank's journal, for the steps around the incident.
        keep: bundles that may lie there.
        redact: `module:function`, see `IncidentConfig`.
    """

    bundle: Bundle
    path: Path
    journal: Path
    keep: int
    redact: str | None

    def write(self) -> Path:
        """Complete it from the journal, put it on disk, and remove those that are too many. For the writer's thread.

        Raises:
            OSError: the disk is full, or gone.
        """
        bundle = self.bundle
        for forward in bundle.forwards:
            redacted(forward, self.redact, bundle.notes)
        bundle.forwards = [forward for forward in bundle.forwards if forward.args or forward.kwargs]
        for forward in bundle.forwards:
            forward.bad = [given.told for given, _ in given_inputs(forward) if given.told]
        # The journal is a help; without it a bundle is worth writing all the same.
        with contextlib.suppress(Exception):
            view = read_journal(self.journal, limit=_RECORDS)
            there = [record for _, record in view.steps if record.step != bundle.step]
            bundle.records = sorted([*there, bundle.record], key=lambda record: record.step)[-_RECORDS:]
            bundle.worst = _worst(view)
        write_bundle(self.path, bundle)
        for surplus in surplus_bundles(self.path.parent, bundle.identity.rank, self.keep):
            surplus.unlink(missing_ok=True)
        return self.path


def bundle_path(journal: Path, rank: int, step: int) -> Path:
    """Where the bundle of a step lies, beside the rank's journal."""
    return journal.with_name(f"rank-{rank:05d}-step-{step:07d}.bundle")


def bundles_of(folder: Path, rank: int) -> list[Path]:
    """Those of a rank that lie there, the first step's first."""
    return sorted(folder.glob(f"rank-{rank:05d}-step-*.bundle"))


def surplus_bundles(folder: Path, rank: int, keep: int) -> list[Path]:
    """Bundles of a rank that are too many: the first and the newest stay."""
    found = bundles_of(folder, rank)
    return found[1 : len(found) - keep + 1] if keep > 0 else found


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write it so that a reader finds all of it or nothing; only its owner may read it.

    Raises:
        OSError: the disk is full, or gone.
    """
    content = {field.name: getattr(bundle, field.name) for field in dataclasses.fields(bundle)}
    content |= {
        _VERSION_KEY: VERSION,
        "identity": dataclasses.asdict(bundle.identity),
        "record": dataclasses.asdict(bundle.record),
        "records": [dataclasses.asdict(record) for record in bundle.records],
        "forwards": [
            {f.name: getattr(forward, f.name) for f in dataclasses.fields(forward)} for forward in bundle.forwards
        ],
        "checksums": torch.serialization.get_crc32_options(),
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_bundle(path: Path) -> Bundle:
    """Read a bundle; nothing in it is executed.

    Raises:
        BundleError: it is not there, no bundle, damaged, or from a newer gradmon.
    """
    if path.is_dir():
        there = sorted(path.rglob("*.bundle"))
        found = f"; it holds {', '.join(str(p) for p in there[:3])}" if there else " and it holds none"
        raise BundleError(f"{path} is a directory: name one bundle{found}")
    if not path.is_file():
        raise BundleError(f"{path} does not exist; bundles lie beside the journals, rank-*-step-*.bundle")
    try:
        with path.open("rb") as file:
            begins_well = file.read(4) == b"PK\x03\x04"
        if not begins_well:
            raise BundleError(f"{path} is not a bundle of gradmon's")
        if not zipfile.is_zipfile(path):
            raise BundleError(f"{path} is cut off; copy it again, or take an older one from beside it")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise BundleError(
            f"{path} is not a bundle, or damaged: it holds what only executing it would give, and that is not done"
        ) from None
    except BundleError:
        raise
    except Exception as error:  # what is damaged makes torch and zipfile raise anything
        raise BundleError(f"{path} is damaged ({type(error).__name__}); copy it again") from None
    return _from_content(path, content)


def _from_content(path: Path, content: Any) -> Bundle:
    version = content.get(_VERSION_KEY) if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path} is not a bundle of gradmon's, though torch can read it (a checkpoint?)")
    if version > VERSION:
        written = content.get("versions", {}).get("gradmon", "a newer version")
        raise BundleError(
            f"{path} has bundle format {version}, written by gradmon {written}; this one ({__version__}) reads up to"
            f" {VERSION}: upgrade gradmon here"
        )
    if content.get("checksums") and not _whole(path):
        raise BundleError(f"{path} is damaged (a checksum does not fit); copy it again")
    try:
        known = {f.name: content[f.name] for f in dataclasses.fields(Bundle)}
        known["identity"] = _build(RankIdentity, content["identity"])
        known["record"] = _build(StepRecord, content["record"])
        known["records"] = [_build(StepRecord, r) for r in content["records"]]
        known["forwards"] = [_build(Forward, f) for f in content["forwards"]]
        for forward in known["forwards"]:
            forward.args, forward.kwargs = tuple(restored(forward.args)), dict(restored(forward.kwargs))
            forward.loaded = restored(forward.loaded)
        return Bundle(**known)
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged: {type(error).__name__} {error}; copy it again") from None


def _whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # as above
        return False


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


# --- what a batch becomes ---------------------------------------------------------------------------------------------


def plain(
    value: Any, where: str, notes: list[str], tensor: Callable[[Tensor, str], Any], most: int = MOST_PARTS
) -> Any:
    """Only containers, numbers, texts and tensors of it; an object with fields becomes a dict that says so.

    Whatever a part is, and whatever it raises when it is looked at: at worst that part is left out.

    Args:
        value: a batch, or a part of one.
        where: its name, `input 0`.
        notes: takes a sentence for each part that is left out.
        tensor: what becomes of a tensor.
        most: parts that are looked at; what comes after them is left out.
    """
    return _Plain(notes, tensor, most).part(value, where, 0)


class _Plain:
    def __init__(self, notes: list[str], tensor: Callable[[Tensor, str], Any], most: int) -> None:
        self._notes = notes
        self._tensor = tensor
        self._most = self._left = most
        self._cut = False

    def part(self, value: Any, where: str, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > _DEEPEST:
            if not self._cut:
                self._cut = True
                self._notes.append(f"{where} was left out: more than {self._most} parts, or {_DEEPEST} levels")
            return None
        try:
            return self._of(value, where, depth)
        except Exception as error:
            self._notes.append(f"{where} was left out: it raised {type(error).__name__}: {str(error)[:200]}")
            return None

    def _of(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if value is None or isinstance(value, (torch.dtype, torch.device)):
            return value
        for kind in _KINDS:
            if isinstance(value, kind):
                return kind(value)  # of a subclass (numpy's float64, an IntEnum) only the value
        if type(value) is dict:
            return self._named(value.items(), where, depth)
        if isinstance(value, Mapping):
            return {_FIELDS_OF: type(value).__name__, **self._named(value.items(), where, depth)}
        if isinstance(value, (list, tuple)):
            if hasattr(value, "_fields"):
                fields = zip(value._fields, value, strict=True)
                return {_FIELDS_OF: type(value).__name__, **self._named(fields, where, depth)}
            parts = self._listed(value, where, depth)
            return parts if isinstance(value, list) else tuple(parts)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            named = ((f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value))
            return {_FIELDS_OF: type(value).__name__, **self._named(named, where, depth)}
        if type(value).__module__ == "numpy" and _is_writable(value):  # torch warns of those that are not
            with contextlib.suppress(TypeError, ValueError):
                array = torch.as_tensor(value)
                self._notes.append(f"{where} was a numpy array and is a tensor now")
                return self._tensor(array, where)
        self._notes.append(
            f"{where} was left out: a {type(value).__module__}.{type(value).__qualname__} can't be saved"
        )
        return None

    def _listed(self, value: Any, where: str, depth: int) -> list[Any]:
        found = []
        for i, part in enumerate(value):
            found.append(self.part(part, f"{where}[{i}]", depth + 1))
            if self._left < 0:
                break
        return found

    def _named(self, items: Iterable[tuple[Any, Any]], where: str, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, part in items:
            name = key if isinstance(key, (str, int)) else str(key)
            name = str(name) if isinstance(name, str) else int(name)
            found[name] = self.part(part, f"{where}[{name!r}]", depth + 1)
            if self._left < 0:
                break
        return found


def _is_writable(array: Any) -> bool:
    return bool(getattr(getattr(array, "flags", None), "writeable", False))


def restored(value: Any) -> Any:
    """A batch out of a bundle as the model may use it."""
    if isinstance(value, dict):
        parts = {key: restored(part) for key, part in value.items() if key != _FIELDS_OF}
        return Fields(parts) if _FIELDS_OF in value else parts
    if isinstance(value, (list, tuple)):
        return type(value)(restored(part) for part in value)
    return value


def tensors_in(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that lie in it: `input 0['labels']`."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_in(part, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from tensors_in(part, f"{where}[{i}]")


def inputs_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and value of each input: `input 0`, `input labels`."""
    for i, value in enumerate(args):
        yield f"input {i}", value
    for name, value in kwargs.items():
        yield f"input {name}", value


def same(mine: Tensor, other: Tensor) -> bool:
    """True if they hold the same numbers in the same order, in whatever shape and type; NaN is NaN."""
    if mine.numel() != other.numel() or {mine.layout, other.layout} != {torch.strided}:
        return False
    if mine.is_complex() != other.is_complex():
        return False
    a, b = mine.detach().reshape(-1), other.detach().reshape(-1)
    cast = a.is_floating_point() and b.is_floating_point()  # as autocast does, which rounds
    common = b.dtype if cast else torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(b.device, common), b.to(common)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def rest_of(forward: Forward) -> tuple[Any, ...] | dict[str, Any]:
    """What the DataLoader gave and forward did not get, which are the targets, and mostly nothing else.

    Of a list or tuple what remains, in its order; of a dict (or an object with fields) the entries that remain. What
    forward got in another shape or type counts as given; so does, of tensors with more than one dimension, the first
    with as many elements as an input that none is equal to: it was normalised on the way.
    """
    remaining = list(_remaining(forward))
    return dict(remaining) if isinstance(forward.loaded, dict) else tuple(part for _, part in remaining)


def _remaining(forward: Forward) -> Iterator[tuple[Any, Any]]:
    """(Place in the loader's batch, part); the place is None for a batch that is no container."""
    given = [t for name, value in inputs_of(forward.args, forward.kwargs) for _, t in tensors_in(value, name)]
    loaded = forward.loaded
    parts: Iterable[tuple[Any, Any]] = [] if loaded is None else [(None, loaded)]
    if isinstance(loaded, dict):
        parts = loaded.items()
    elif isinstance(loaded, (list, tuple)):
        parts = enumerate(loaded)
    for place, part in [(place, part) for place, part in parts if not _was_given(part, given)]:
        large = isinstance(part, Tensor) and part.dim() > 1  # labels are not taken for time steps
        changed = next((i for i, known in enumerate(given) if large and part.numel() == known.numel()), None)
        if changed is None:
            yield place, part
        else:
            del given[changed]


def _was_given(part: Any, given: list[Tensor]) -> bool:
    """True if all its tensors are among those given, which they are then taken from: of two equal ones one may be a
    target.
    """
    left = list(given)
    tensors = [t for _, t in tensors_in(part, "")]
    for tensor in tensors:
        place = next((i for i, known in enumerate(left) if same(tensor, known)), None)
        if place is None:
            return False
        del left[place]
    given[:] = left
    return bool(tensors)


def given_inputs(forward: Forward) -> list[tuple[Given, Tensor]]:
    """The batch's tensors, the targets too where they are known, and what is wrong with each."""
    only_loaded = [(LOADED if p is None else f"{LOADED}[{p!r}]", part) for p, part in _remaining(forward)]
    found = []
    for name, value in (*inputs_of(forward.args, forward.kwargs), *only_loaded):
        for where, tensor in tensors_in(value, name):
            holds = contents(tensor) or Contents()
            told = _bad_samples(tensor, where, holds, forward.indices) if holds.bad else ""
            found.append((Given("input", where, holds, told), tensor))
    return found


def _bad_samples(tensor: Tensor, where: str, holds: Contents, indices: Any) -> str:
    if tensor.dim() == 0 or tensor.layout != torch.strided:
        return f"{where} holds {holds.told()}"
    bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
    samples: list[int] = bad.nonzero().flatten().tolist()
    if len(samples) == tensor.shape[0] and len(samples) > 1:
        return f"every sample of {where} holds {holds.told()}"
    return f"{samples_named(samples, indices)} of {where} hold{'s' if len(samples) == 1 else ''} {holds.told()}"


def samples_named(samples: Sequence[int], indices: Any) -> str:
    """`samples 3 (index 77 of the dataset), 5 (index 12 of the dataset) and 4 more`."""
    shown = ", ".join(_sample(i, indices) for i in samples[:_SAMPLES_NAMED])
    more = f" and {len(samples) - _SAMPLES_NAMED} more" if len(samples) > _SAMPLES_NAMED else ""
    return f"sample{'s' if len(samples) > 1 else ''} {shown}{more}"


def _sample(number: int, indices: Any) -> str:
    if isinstance(indices, Tensor):
        indices = indices.tolist() if indices.dim() == 1 else None
    if isinstance(indices, (list, tuple)) and number < len(indices):
        return f"{number} (index {indices[number]} of the dataset)"
    return str(number)


def redacted(forward: Forward, redact: str | None, notes: list[str]) -> None:
    """Have the user's function say what may be saved of the batch; where it fails, nothing may.

    It is called with (args, kwargs, loaded) and returns the three; one that takes two arguments returns two, and what
    the DataLoader gave, which it was never shown, is left out.
    """
    if redact is None:
        return
    try:
        function = factory.function(redact, "incident.redact")
        given = [restored(forward.args), restored(forward.kwargs), restored(forward.loaded)]
        shown = 3 if _takes(function, *given) else 2
        result = function(*given[:shown])
        if not (isinstance(result, tuple) and len(result) == shown):
            wanted = "(args, kwargs, loaded)" if shown == 3 else "(args, kwargs)"
            raise TypeError(f"must return {wanted}, got a {type(result).__name__}")
        told: list[str] = []
        args, kwargs, loaded = (*result, None)[:3]
        if shown == 2 and forward.loaded is not None:
            told.append(f"what the DataLoader gave was left out: incident.redact {redact} takes no third argument")
        forward.args = tuple(plain(list(args), "input", told, lambda t, _where: t.detach().cpu()))
        forward.kwargs = dict(plain(dict(kwargs), "input", told, lambda t, _where: t.detach().cpu()))
        forward.loaded = plain(loaded, LOADED, told, lambda t, _where: t.detach().cpu())
        notes += [*told, f"the batch is what {redact} left of it"]
    except Exception as error:  # the user's function: whatever it raises
        forward.args, forward.kwargs, forward.loaded = (), {}, None
        notes.append(f"the batch was left out: incident.redact {redact} failed ({type(error).__name__}: {error})")


def _takes(function: Callable[..., Any], *args: Any) -> bool:
    try:
        inspect.signature(function).bind(*args)
    except (TypeError, ValueError):  # it does not, or that can't be told
        return False
    return True


def _worst(view: JournalView) -> list[dict[str, Any]]:
    detail = view.detail
    if detail is None:
        return []
    cells = array.array("d", detail.values)
    width = len(DETAIL_COLUMNS)
    rows = [dict(zip(DETAIL_COLUMNS, cells[i : i + width], strict=True)) for i in range(0, len(cells), width)]
    named: list[dict[str, Any]] = [
        {
            "name": name,
            "norm": math.sqrt(row["sum_of_squares"]) if row["sum_of_squares"] >= 0 else math.nan,
            "nan_count": row["nan_count"],
            "inf_count": row["inf_count"],
            "abs_max": row["abs_max"],
            "step": detail.step,
        }
        for name, row in zip(view.parameter_names, rows, strict=False)
        if row["nan_count"] == row["nan_count"]  # else it had no gradient
    ]
    named.sort(key=lambda p: (-(p["nan_count"] + p["inf_count"]), -p["norm"] if p["norm"] == p["norm"] else -math.inf))
    return named[:_WORST]
