"""Looks at batches as they leave a `torch.utils.data.DataLoader`: on the host, at a cadence, changing nothing.

A look reads each tensor of a batch once, whole up to `inputs.WHOLE_BYTES`, else so many elements spread over it. Looks
come in pairs of batches, one after the other, so that a batch can be compared with the one before. What lies on a CUDA
device is measured there and read when it has landed; nothing is waited for.

Words used here: *input* and *sample* as in `inputs`; the *index* of a sample is what the DataLoader's sampler has asked
the dataset for. A *source* is a dataset: training and validation data are told apart, and each is normal in its own
way.

Legend: B samples of a batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
import statistics
import weakref
from collections import Counter, deque
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch
import torch.utils.data.dataloader as dataloader
from torch import Tensor

from gradmon.config import DataConfig
from gradmon.inputs import (
    TELLING_ELEMENTS,
    Input,
    counted,
    fingerprints,
    inputs,
    looked_at,
    lowest_and_highest,
    mark_of_batch,
    on_device,
    on_host,
    rows_of,
    spread,
)
from gradmon.landing import HostCopy
from gradmon.loaded import Gave, Loaded, index_numbers
from gradmon.loss_watch import Stretches
from gradmon.record import Finding

RULES = (
    "data_nonfinite", "data_range", "data_constant", "data_duplicate", "class_imbalance", "token_share",
    "labels_out_of_range",
)  # fmt: skip
#: The first batches of a source are all looked at, so that it is soon known what is usual.
_EAGER = 8
#: Looks that make a range usual.
_ENOUGH = 8
_REMEMBERED = 64
_SOURCES = 8
#: Inputs of a source of which it is known what is usual: names may be new in each batch.
_NAMES = 64
#: Batches that a forward call may have been given: a loader may be some ahead of the training.
_AHEAD = 4
#: Of so many of them the batch itself is held, as for the looks: a prefetcher is one ahead.
_HELD = 2
_PENDING = 16
#: Looks without a thing after which it is told anew.
_QUIET = 8
_FEWEST_SAMPLES = 4
_TOKENS = 4096
#: More different labels than this are numbers, not classes.
_CLASSES = 1000
#: Labels of each class, on average, that are needed to tell its share from chance.
_PER_CLASS = 30
#: -1 is the other class of a margin loss, or what nanoGPT and others ignore; -100 is what PyTorch ignores.
_USUAL_NEGATIVES = (-1, -100)
_FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)
_DEBUGGER = "Amazon SageMaker Debugger, rule "


_Known = TypeVar("_Known")


@dataclasses.dataclass(slots=True)
class _Source:
    """What is known of one dataset's batches."""

    name: str
    batches: int = 0
    ranges: dict[str, deque[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    classes: dict[str, Counter[int]] = dataclasses.field(default_factory=dict)
    shares: dict[str, deque[float]] = dataclasses.field(default_factory=dict)
    iterator: Callable[[], Any] | None = None
    """Weak reference to the one that gave the batch before."""
    before: tuple[int, list[float], list[int] | None] | None = None
    """Number of the batch that was looked at last, fingerprints of its samples, their indices; None in a new epoch."""


@dataclasses.dataclass(slots=True)
class _Batch:
    """A batch that a look may still be taken at."""

    source: _Source
    number: int
    """Of the source's batches."""
    batch: Any
    asked: Any
    looked_at: bool = False

    @property
    def indices(self) -> list[int] | None:
        """Of its samples, where they are known."""
        return index_numbers(self.asked)


@dataclasses.dataclass(slots=True)
class _Pace:
    """Of one iterator."""

    given: int = 0
    forwards: int = 0
    kept: bool = True
    """Each forward call so far came after one more batch: none was fetched ahead, left out or used twice."""


class BatchWatch:
    """Watches the batches that the training thread takes.

    Args:
        config: cadence, thresholds, and which rules are on.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._pid = os.getpid()
        self._sources: dict[int, _Source] = {}
        self._newest: deque[_Batch] = deque(maxlen=2)
        self._loaded: deque[Gave] = deque(maxlen=_AHEAD)
        self._sent: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
        """Iterator -> number of a batch in its epoch -> what its sampler asked for."""
        self._paces: weakref.WeakKeyDictionary[Any, _Pace] = weakref.WeakKeyDictionary()
        self._pace: _Pace | None = None
        """Of the iterator that gave the newest batch."""
        self._stretches = Stretches(_QUIET)
        self._found: list[Finding] = []
        self._pending: deque[tuple[_Source, str, HostCopy]] = deque(maxlen=_PENDING)
        self._samples: dict[str, float] = {}
        self._original: Any = None
        self._wrapper: Any = None

    def start(self) -> None:
        """Begin to note which indices the samplers ask for."""
        kind = dataloader._BaseDataLoaderIter
        original: Any = kind._next_index
        self._original = original

        @functools.wraps(original)
        def watched(iterator: Any) -> Any:
            asked = original(iterator)
            if self._wrapper is not None:
                with contextlib.suppress(Exception):  # of a kind of iterator that is not torch's: no index is known
                    self._note(iterator, asked)
            return asked

        self._wrapper = watched
        kind._next_index = watched  # type: ignore[method-assign]

    def stop(self) -> None:
        """Put torch's own back, unless somebody has wrapped ours since (then ours only passes through)."""
        kind = dataloader._BaseDataLoaderIter
        if self._wrapper is not None and kind._next_index is self._wrapper:
            kind._next_index = self._original  # type: ignore[method-assign]
        self._wrapper = None
        for held in (self._newest, self._loaded, self._pending, self._sent):
            held.clear()

    def seen(self, iterator: Any, batch: Any) -> None:
        """Take in a batch that `iterator`, a DataLoader's, has given to the training thread."""
        if not self._config.every or os.getpid() != self._pid:
            return
        dataset = getattr(iterator, "_dataset", None)
        source = self._source(id(dataset), type(dataset).__name__)
        asked = self._asked(iterator)
        same = source.iterator is not None and source.iterator() is iterator
        follows = same and getattr(iterator, "_num_yielded", 2) > 1  # persistent workers keep theirs over epochs
        source.iterator = weakref.ref(iterator)
        self._pace = self._paces.setdefault(iterator, _Pace())
        self._pace.given += 1
        batch = _kept(batch)
        self._take_in(source, batch, asked, follows=follows)
        self._loaded.appendleft(Gave(asked, mark_of_batch(batch), batch))
        if len(self._loaded) > _HELD:
            self._loaded[_HELD] = self._loaded[_HELD]._replace(batch=None)

    def observe(self, batch: Any) -> None:
        """Take in a batch of a script that uses no DataLoader: tensors in any nesting, on any device."""
        if self._config.every:
            self._take_in(self._source(0, ""), batch, None, follows=True)

    def look_again(self) -> None:
        """Look at the newest two batches, whatever the cadence: after an incident, for the sample that made it."""
        for newest in self._newest:
            if not newest.looked_at:
                self._look(newest)

    def take(self) -> list[Finding]:
        """What was found since the last call."""
        while self._pending and self._pending[0][-1].landed():
            source, name, copy = self._pending.popleft()
            self._of_device(source, name, copy.values().tolist())
        found, self._found = self._found, []
        return found

    def loaded(self) -> Loaded:
        """What the forward call that comes now may have been given; to be called once for each."""
        pace = self._pace
        if pace is not None:
            pace.forwards += 1
            pace.kept = pace.kept and pace.given == pace.forwards
        return Loaded(tuple(self._loaded), in_step=pace is not None and pace.kept)

    def samples(self) -> dict[str, float]:
        """Of the newest look that measured it: `class_imbalance_ratio`, `token_share_ratio`."""
        return dict(self._samples)

    # --- which batch -----------------------------------------------------------------------------------------------

    def _note(self, iterator: Any, asked: Any) -> None:
        if os.getpid() != self._pid or getattr(iterator, "_dataset_kind", None) != dataloader._DatasetKind.Map:
            return
        sent = self._sent.setdefault(iterator, {})
        # Without workers a batch is made as soon as it is asked for; with workers it comes back under this number.
        sent[getattr(iterator, "_send_idx", 0)] = asked
        most = 1 + (getattr(iterator, "_prefetch_factor", None) or 0) * getattr(iterator, "_num_workers", 0)
        if len(sent) > most:  # another thread takes the batches
            del sent[next(iter(sent))]

    def _asked(self, iterator: Any) -> Any:
        """What the sampler asked for to make the batch that has come; None where it is not known."""
        sent = self._sent.get(iterator)
        if sent is None or not getattr(iterator, "_in_order", True):
            return None
        asked = sent.pop(getattr(iterator, "_rcvd_idx", 1) - 1, None)
        return tuple(asked) if isinstance(asked, list) else asked  # the sampler may use its list again

    def _source(self, key: int, name: str) -> _Source:
        source = self._sources.get(key)
        if source is None:
            if len(self._sources) >= _SOURCES:
                del self._sources[next(iter(self._sources))]
            source = self._sources[key] = _Source(name)
        return source

    def _take_in(self, source: _Source, batch: Any, asked: Any, *, follows: bool) -> None:
        source.batches += 1
        newest = _Batch(source, source.batches, batch, asked)
        self._newest.append(newest)
        if not follows:  # the end of an epoch may come again at the begin of the next
            source.before = None
        if newest.number <= _EAGER or newest.number % self._config.every <= 1:
            self._look(newest)

    # --- one look --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, newest: _Batch) -> None:
        newest.looked_at = True
        source, indices = newest.source, newest.indices
        parts = inputs(newest.batch, len(indices) if indices else 0)
        for part in parts:
            if not on_host(part.value):
                if part.value.is_floating_point():
                    self._pending.append((source, part.name, HostCopy(on_device(part.value))))
            elif part.value.is_floating_point():
                self._of_floats(source, part, indices)
            elif part.is_label:
                self._of_labels(source, part, indices)
            elif part.value.dim() == 2 and part.value.shape[1] > 1:
                self._of_tokens(source, part)
        if self._config.duplicate_share:
            self._of_samples(newest, indices, [part for part in parts if on_host(part.value)])

    def _of_floats(self, source: _Source, part: Input, indices: list[int] | None) -> None:
        low, high = lowest_and_highest(part.value)
        finite = math.isfinite(low) and math.isfinite(high)
        if self._config.nonfinite:
            self._check_finite(source, part, indices, (low, high))
        if finite:
            self._check_range(source, part.name, (low, high), lambda value: _holder(part, value, indices))
            self._check_constant(source, part, low, high)

    def _check_finite(
        self, source: _Source, part: Input, indices: list[int] | None, extremes: tuple[float, float]
    ) -> None:
        finite = all(map(math.isfinite, extremes))
        if finite:
            self._tell(source, "data_nonfinite", part.name, False)
            return
        bad = looked_at(part.value).isfinite().logical_not_() if part.samples == 0 else None
        rows = [] if bad is not None else rows_of(part).isfinite().all(1).logical_not_().nonzero().flatten().tolist()
        count = int(bad.sum()) if bad is not None else len(rows)
        if self._tell(source, "data_nonfinite", part.name, True):
            what = f"{count} elements" if bad is not None else _which(rows, indices)
            self._add(
                "data_nonfinite",
                part.name,
                f"NaN or Inf in {part.name}{_of(source)}: {what}",
                measured=float(count),
                cure="leave such samples out of the dataset, or repair what makes them (0/0 in a normalisation, an "
                "empty file, a missing value)",
                severity="error",
            )

    def _check_range(
        self, source: _Source, name: str, extremes: tuple[float, float], where: Callable[[float], str] = lambda _: ""
    ) -> None:
        """Against the ranges of earlier looks; `where` names the sample that holds a value."""
        low, high = extremes
        known = _known(source.ranges, name, lambda: deque(maxlen=_REMEMBERED))
        outside = self._outside(known, low, high)
        if self._tell(source, "data_range", name, outside is not None) and outside is not None:
            usual_low, usual_high, value = outside
            self._add(
                "data_range",
                name,
                f"{value:.4g} in {name}{_of(source)}{where(value)}: it is usually from {usual_low:.4g} to "
                f"{usual_high:.4g}",
                measured=value,
                threshold=usual_high if value == high else usual_low,
                source="medians of the extremes of earlier looks",
                cure="look at that sample; check that all files are normalised alike (0 to 255 against 0 to 1), or "
                "clamp the input",
            )
        known.append(extremes)

    def _outside(self, known: deque[tuple[float, float]], low: float, high: float) -> tuple[float, float, float] | None:
        """(usual lowest, usual highest, value) if it lies far outside."""
        if not self._config.range_ratio or len(known) < _ENOUGH:
            return None
        usual_low, usual_high = (statistics.median(values) for values in zip(*known, strict=True))
        room = self._config.range_ratio * (usual_high - usual_low)
        # What has come before as the second largest is not unheard of: heavy tails.
        highest, lowest = sorted(h for _, h in known)[-2], sorted(x for x, _ in known)[1]
        if room > 0 and high > max(usual_high, highest) + room:
            return usual_low, usual_high, high
        if room > 0 and low < min(usual_low, lowest) - room:
            return usual_low, usual_high, low
        return None

    def _check_constant(self, source: _Source, part: Input, low: float, high: float) -> None:
        value = part.value
        masks = part.name.rpartition(".")[2].endswith(("mask", "weight", "weights"))
        flags = value.dim() < 3 and low in (0.0, 1.0)  # of float masks, too, all may be set
        telling = value.dim() > 1 and value.numel() > TELLING_ELEMENTS and not masks and not flags
        constant = low == high and telling and self._config.constant and not part.is_label
        if self._tell(source, "data_constant", part.name, constant):
            self._add(
                "data_constant",
                part.name,
                f"all {value.numel()} elements of {part.name}{_of(source)} are {low:.4g}",
                measured=low,
                cure="look at what the dataset reads: an empty or missing file, a mask or an augmentation that wipes "
                "all out, a normalisation that divides by infinity",
            )

    # --- whole numbers ---------------------------------------------------------------------------------------------

    def _of_labels(self, source: _Source, part: Input, indices: list[int] | None) -> None:
        value = looked_at(part.value)
        if value.dtype in _FEW_OPERATIONS:
            value = value.long()
        if self._config.label_range and value.dtype != torch.bool and value.numel():
            lowest = int(value.min().item())
            negative = counted(value[value < 0]) if lowest < 0 else {}
            strange = [v for v in negative if v not in _USUAL_NEGATIVES]
            if self._tell(source, "labels_out_of_range", part.name, bool(strange)):
                self._add(
                    "labels_out_of_range",
                    part.name,
                    f"label {strange[0]} in {part.name}{_of(source)}{_holder(part, strange[0], indices)}",
                    measured=float(strange[0]),
                    threshold=0.0,
                    source="classes are counted from 0; -100 is what PyTorch ignores",
                    cure="map labels to 0 .. classes - 1, or to -100 where there is none",
                    severity="error",
                )
        if part.value.dim() == 1 and part.samples > 1 and self._config.imbalance_ratio:
            self._count_classes(source, part.name, value)

    def _count_classes(self, source: _Source, name: str, labels: Tensor) -> None:
        counts = _known(source.classes, name, Counter)
        if len(counts) > _CLASSES:
            return
        counts.update({label: n for label, n in counted(labels).items() if label != _USUAL_NEGATIVES[1]})
        total = sum(counts.values())
        if not counts or total < max(self._config.imbalance_samples, _PER_CLASS * len(counts)):
            return
        (most, most_times), *_ = counts.most_common(1)
        least, least_times = min(counts.items(), key=lambda item: item[1])
        self._samples["class_imbalance_ratio"] = most_times / least_times
        # As little as the ratio may be by chance, two standard errors of each count away.
        surely = (most_times - 2 * math.sqrt(most_times)) / (least_times + 2 * math.sqrt(least_times))
        alone = len(counts) == 1
        if self._tell(source, "class_imbalance", name, alone or surely > self._config.imbalance_ratio):
            seen = f"all {total} labels in {name}{_of(source)} are {most}"
            if not alone:
                seen = (
                    f"class {most} came {most_times} times and class {least} {least_times} times in {total} labels of "
                    f"{name}{_of(source)}"
                )
            self._add(
                "class_imbalance",
                name,
                seen,
                measured=math.inf if alone else most_times / least_times,
                threshold=self._config.imbalance_ratio,
                source=_DEBUGGER + "ClassImbalance (ratio 10, 500 samples)",
                cure="`WeightedRandomSampler`, or `CrossEntropyLoss(weight=...)`; if all labels are the same, look at "
                "how they are read and whether the data is sorted and not shuffled",
            )

    def _of_tokens(self, source: _Source, part: Input) -> None:
        if not self._config.token_share or part.value.dtype == torch.bool or not part.value.numel():
            return
        tokens = spread(part.value, _TOKENS)
        counts = counted(tokens)
        if max(counts) <= 1:  # a mask, or token types
            return
        most = max(counts, key=counts.__getitem__)
        newest = counts[most] / tokens.numel()
        shares = _known(source.shares, part.name, lambda: deque(maxlen=_ENOUGH))
        shares.append(newest)
        share = statistics.fmean(shares)
        self._samples["token_share_ratio"] = share
        much = len(shares) >= _ENOUGH // 2 and share > self._config.token_share
        if self._tell(source, "token_share", part.name, much):
            self._add(
                "token_share",
                part.name,
                f"token {most} makes {share:.0%} of {part.name}{_of(source)}",
                measured=share,
                threshold=self._config.token_share,
                cure="if it pads, put samples of like length together, pack them, or pad to the longest of the batch "
                "only; else look at the tokenizer (unknown words?)",
            )

    # --- samples that come again -----------------------------------------------------------------------------------

    def _of_samples(self, newest: _Batch, indices: list[int] | None, parts: list[Input]) -> None:
        prints, source = fingerprints(parts), newest.source
        before, source.before = source.before, (newest.number, prints, indices)
        if len(prints) < _FEWEST_SAMPLES:
            return
        inside = 1 - len(set(prints)) / len(prints)
        again, same_indices = 0.0, False
        # What no DataLoader gave may be one batch, used again: by a closure, a critic, in full-batch training.
        reused = source is self._sources.get(0) and before is not None and before[1] == prints
        if before is not None and before[0] == newest.number - 1 and not reused:
            earlier = set(before[1])
            again = sum(p in earlier for p in prints) / len(prints)
            if indices and before[2]:
                asked = set(before[2])
                share = sum(i in asked for i in indices) / len(indices)
                same_indices = share > self._config.duplicate_share
                again = max(again, share)
        share = max(inside, again)
        if not self._tell(source, "data_duplicate", "", share > self._config.duplicate_share):
            return
        if again >= inside:
            seen = f"{again:.0%} of a batch{_of(source)} are samples of the batch before it"
            seen += ", asked for by the same indices" if same_indices else ""
        else:
            seen = f"{inside:.0%} of the samples of a batch{_of(source)} are like another sample of it"
        if indices:
            seen += f" (dataset {_numbers('index', indices)})"
        self._add(
            "data_duplicate",
            "",
            seen,
            measured=share,
            threshold=self._config.duplicate_share,
            cure="look at the sampler: the same seed for each batch, a generator made anew"
            if same_indices
            else "look at the dataset: `__getitem__` that does not use its index, a buffer that is filled again and "
            "returned without a copy, an iterable dataset that every worker reads from the start",
        )

    # --- telling ---------------------------------------------------------------------------------------------------

    def _of_device(self, source: _Source, name: str, values: list[float]) -> None:
        """Of an input on a device, once its numbers have landed."""
        nonfinite, low, high = values
        if self._tell(source, "data_nonfinite", name, nonfinite > 0 and self._config.nonfinite):
            message = f"NaN or Inf in {name}{_of(source)}: {nonfinite:.0f} elements"
            self._add("data_nonfinite", name, message, measured=nonfinite, severity="error")
        if low <= high:  # else nothing was finite
            self._check_range(source, name, (low, high))

    def _tell(self, source: _Source, rule: str, name: str, on: bool) -> bool:
        return self._stretches.begins(f"{rule} {source.name} {name}", on)

    def _add(self, rule: str, where: str, message: str, **more: Any) -> None:
        self._found.append(Finding(rule=rule, where=where, message=message, **more))


def _kept(batch: Any) -> Any:
    """The script may take parts out of its batch: `labels = batch.pop("labels")`; no tensor is copied."""
    if isinstance(batch, list | MutableMapping):
        with contextlib.suppress(Exception):  # a container of the user's that can't be copied
            return copy.copy(batch)
    return batch


def _known(places: dict[str, _Known], name: str, new: Callable[[], _Known]) -> _Known:
    """What is known of an input; the oldest makes room for a new one."""
    if name not in places:
        if len(places) >= _NAMES:
            del places[next(iter(places))]
        places[name] = new()
    return places[name]


def _holder(part: Input, value: float, indices: list[int] | None) -> str:
    """Which sample holds it."""
    rows = (rows_of(part) == value).any(1).nonzero().flatten().tolist() if part.samples else []
    return f", {_which(rows, indices)}" if rows else ""


def _which(rows: list[int], indices: list[int] | None) -> str:
    if not rows:
        return ""
    what = _numbers("sample", rows)
    known = [indices[row] for row in rows if row < len(indices)] if indices else []
    return what + (f" of the batch (dataset {_numbers('index', known)})" if known else " of the batch")


def _numbers(noun: str, numbers: list[int]) -> str:
    plural = {"index": "indices"}.get(noun, noun + "s")
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{plural if len(numbers) > 1 else noun} {', '.join(map(str, numbers[:8]))}{more}"


def _of(source: _Source) -> str:
    return f" of {source.name}" if source.name else ""
