"""Journals below one directory -> the runs to show, with counters that go on and a bounded history per rank.

Words used here, with these meanings only:

- *journal*: one file, `DIR/<run>/<instance>/<attempt>/rank-NNNNN.db`; one rank in one attempt. Also below `DIR/<user>`.
- *rank*: one rank of an instance over all its attempts. Counters are summed over them, the history goes on.
- *instance*: one start of a run. It is *superseded* once a later instance of the same name began after its end.
- *run*: what is exported: an instance that nothing superseded, under a name no other exported instance has.

One thread calls `refresh`; others may read what it publishes while they hold `lock`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gradmon.agent.layer_gauges import LayerGauges
from gradmon.agent.places import Place, find_journals
from gradmon.counting import CounterKey, count_step
from gradmon.journal import JournalVersionError, JournalView, RankState, read_journal
from gradmon.locks import is_held
from gradmon.record import Event, StepRecord, finite

logger = logging.getLogger("gradmon.agent")

LIVING: frozenset[RankState] = frozenset({"running", "busy", "stuck"})
#: What the page draws of a rank: columns of its history.
POINT_FIELDS = (
    "step",
    "wall_seconds",
    "step_seconds",
    "grad_norm",
    "grad_norm_applied",
    "grad_norm_limit",
    "local_grad_norm",
    "loss",
    "learning_rate_scale",
    "memory_bytes",
)
#: Points held per rank: 80 bytes each.
HISTORY_LIMIT = 4_000
#: Events held per instance, newest first to stay.
EVENT_LIMIT = 1_000
#: A journal that can't be read is tried again when it changes, and else this often.
RETRY_SECONDS = 30.0
#: A journal just being created has no tables yet; for this long that is no error.
CREATION_SECONDS = 5.0
#: Parts that may fail, born at 0 each: a counter first seen above 0 fires no alert.
ERROR_PARTS = ("archive", "auth", "exporter", "journal", "journal_version", "nvml", "prune", "sd", "store")

_NOTHING_NEW = 1 << 62
_GAUGE_FIELDS = (
    *POINT_FIELDS[1:-1],
    "learning_rate",
    "grad_abs_max",
    "grad_min",
    "grad_max",
    "zero_count",
    "element_count",
    "local_grad_norm_rms",
    "local_grad_norm_max",
    "healthy_ranks",
    "mean_loss",
    "max_loss",
    "loss_scale",
    "noise_scale_ratio",
    "update_ratio",
)


class History:
    """The steps of one rank as columns, at most `limit` points: the newest in full, older ones evenly thinned."""

    def __init__(self, limit: int = HISTORY_LIMIT) -> None:
        self._limit = limit
        self._stride = 1
        self._sequence = array("q")
        self._incident = array("b")
        self._columns = {name: array("d") for name in POINT_FIELDS}

    def __len__(self) -> int:
        return len(self._sequence)

    def append(self, sequence: int, record: StepRecord) -> None:
        """Add a step. One that was seen before (a restart from a checkpoint) takes the place of it and all later."""
        keep = bisect_left(self._columns["step"], record.step)
        if keep < len(self):
            self._take(range(keep))
        self._sequence.append(sequence)
        self._incident.append(not record.healthy)
        for name, column in self._columns.items():
            value = getattr(record, name)
            column.append(math.nan if value is None else value)
        if len(self) > self._limit:
            self._thin()

    def since(self, sequence: int, limit: int) -> dict[str, list[float]]:
        """Points added after `sequence`, about `limit` at most, as columns; NaN where there is no value."""
        start = bisect_right(self._sequence, sequence)
        every = math.ceil(max(1, len(self) - start) / limit)
        sacred = sum(self._incident[start:]) <= limit // 2
        last = len(self) - 1
        picked = [
            i
            for i in range(start, len(self))
            if (i - start) % every == 0 or i == last or (sacred and self._incident[i])
        ]
        return {name: [column[i] for i in picked] for name, column in self._columns.items()}

    @property
    def newest(self) -> int:
        """Sequence number of the newest point, 0 if there is none."""
        return self._sequence[-1] if self._sequence else 0

    def recent(self, name: str, count: int) -> list[float]:
        """The newest `count` values of a column, without those that are missing."""
        return [value for value in self._columns[name][-count:] if math.isfinite(value)]

    def _thin(self) -> None:
        """Thin the older points until a good part is free. By step number, so that all ranks keep the same steps."""
        newest = len(self) - self._limit // 4
        # Incidents stay, unless a run consists of them: memory is bounded whatever the run does.
        sacred = sum(self._incident[:newest]) <= self._limit // 2
        steps = self._columns["step"]
        while True:
            keep = [
                i
                for i in range(len(self))
                if i >= newest or steps[i] % self._stride == 0 or (sacred and self._incident[i])
            ]
            if len(keep) <= 0.875 * self._limit:
                break
            self._stride *= 2
        self._take(keep)

    def _take(self, indices: list[int] | range) -> None:
        self._sequence = array("q", (self._sequence[i] for i in indices))
        self._incident = array("b", (self._incident[i] for i in indices))
        self._columns = {name: array("d", (column[i] for i in indices)) for name, column in self._columns.items()}


class Journal:
    """One file and how far it has been read."""

    def __init__(self, path: Path, rank: int, attempt: int) -> None:
        self.path = path
        self.rank = rank
        self.attempt = attempt
        self.view: JournalView | None = None
        """The newest look at it, without its steps, events and details."""
        self.looked_monotonic = 0.0
        """When that was, on the clock that nobody sets."""
        self.layers: LayerGauges | None = None
        """None until the first detail."""
        self._step = self._event = self._detail = 0
        self._complete = False
        self._signature: tuple[int, ...] = ()
        self._found = time.monotonic()
        self._failures = 0
        self._retry_at = 0.0
        self._logged = False

    def read(self, errors: Counter[str], *, follow: bool) -> JournalView | None:
        """What is new, or None. `follow=False` looks at who and whether only, and leaves steps and events for later."""
        signature = signature_of(self.path)
        if not self._due(signature != self._signature, follow):
            return None
        self._signature = signature
        try:
            view = self._read(follow)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file can provoke anything; the others are served on
            self._failed(error, errors)
            return None
        self._failures = 0
        self.looked_monotonic = time.monotonic()
        # The rank may have committed between our look at the rows and our look at its lock: a crash is read twice.
        newly_crashed = view.state == "crashed" and (self.view is None or self.view.state != "crashed")
        self._complete = (follow or self._complete) and not newly_crashed
        self.view = dataclasses.replace(view, steps=[], events=[], details=[])
        return view

    def _due(self, changed: bool, follow: bool) -> bool:
        """A living rank is looked at each time (its age counts), an ended one only if its file changed after all."""
        if self._failures:
            return time.monotonic() >= self._retry_at
        return changed or self.view is None or self.view.state in LIVING or (follow and not self._complete)

    def _read(self, follow: bool) -> JournalView:
        if not follow:
            nothing = dict.fromkeys(("after_step", "after_event", "after_detail"), _NOTHING_NEW)
            return read_journal(self.path, **nothing)
        if self.rank != 0:
            self._detail = _NOTHING_NEW  # the global gradients are equal on all ranks: one tells of their layers
        view = read_journal(self.path, after_step=self._step, after_event=self._event, after_detail=self._detail)
        if self.view is not None and view.identity.started_seconds != self.view.identity.started_seconds:
            view = read_journal(self.path)  # a new file under the old name
            self._step = self._event = self._detail = 0
            self.layers = None
        self._step = max((i for i, _ in view.steps[-1:]), default=self._step)
        self._event = max((i for i, _ in view.events[-1:]), default=self._event)
        self._detail = max((i for i, _ in view.details[-1:]), default=self._detail)
        return view

    def show_layers(self, view: JournalView, errors: Counter[str]) -> None:
        """Take in the new details. What is wrong with them costs the values per layer and nothing else."""
        try:
            for _, detail in view.details:
                self.layers = self.layers or LayerGauges(view)
                self.layers.feed(detail)
        except Exception as error:
            errors["journal"] += 1
            self._log(error)

    def _log(self, error: Exception) -> None:
        if not self._logged:
            self._logged = True
            logger.warning("can't read %s: %s: %s", self.path, type(error).__name__, error)

    def _young(self) -> bool:
        return time.monotonic() - self._found < CREATION_SECONDS and is_held(self.path.with_suffix(".lock"))

    def _failed(self, error: Exception, errors: Counter[str]) -> None:
        if self.view is None and self._young():
            return
        self._failures += 1
        self._retry_at = time.monotonic() + min(RETRY_SECONDS, 0.25 * 2**self._failures)
        errors["journal_version" if isinstance(error, JournalVersionError) else "journal"] += 1
        self._log(error)
        if self.view is not None and self.view.state in LIVING and not is_held(self.path.with_suffix(".lock")):
            self.view = dataclasses.replace(self.view, state="crashed")


class Rank:
    """One rank of an instance, over all its attempts."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.journals: dict[int, Journal] = {}
        self.history = History()
        self.gauges: dict[str, float] = {}
        """Last finite value by StepRecord field."""
        self.step: int | None = None
        self.incident: StepRecord | None = None
        self._attempt = -1

    @property
    def view(self) -> JournalView:
        """Its newest journal that could be read."""
        newest = self._newest
        if newest.view is None:
            raise ValueError(f"no journal of rank {self.number} could be read")
        return newest.view

    @property
    def looked_monotonic(self) -> float:
        """When that journal was looked at."""
        return self._newest.looked_monotonic

    @property
    def living(self) -> bool:
        """True while its process lives."""
        return self.view.state in LIVING

    @property
    def layers(self) -> LayerGauges | None:
        """Values per layer from that journal; only rank 0 has them."""
        return self._newest.layers

    @property
    def _newest(self) -> Journal:
        readable = [attempt for attempt, journal in self.journals.items() if journal.view is not None]
        return self.journals[max(readable or self.journals)]

    @property
    def last_seen_seconds(self) -> float:
        """Unix time of its last sign of life."""
        return max(self.view.beat_seconds, self.gauges.get("wall_seconds", 0.0))

    def counters(self) -> dict[CounterKey, float]:
        """Summed over the attempts, with a 0 for each counter that exists from the first step on."""
        total = dict(_born(applied=self.view.identity.mode == "guard"))
        for journal in list(self.journals.values()):
            if journal.view is not None:
                for key, value in journal.view.counters.items():
                    total[key] = total.get(key, 0.0) + value
        return total

    def feed(self, attempt: int, view: JournalView, sequence: Iterator[int]) -> None:
        """Take in the new steps of one attempt's journal."""
        if attempt < self._attempt:
            return  # a late word from a replaced attempt: its counters count, its steps are history
        for _, record in view.steps:
            self._attempt = attempt
            self.history.append(next(sequence), record)
            self.step = record.step
            for name in _GAUGE_FIELDS:
                value = finite(getattr(record, name))
                if value is not None:
                    self.gauges[name] = value
            if record.grad_norm_limit is None:
                self.gauges.pop("grad_norm_limit", None)
            if record.broken:
                self.incident = record


class Instance:
    """One start of a run: its ranks on this node and the events they told."""

    def __init__(self, run: str, name: str) -> None:
        self.run = run
        self.name = name
        self.ranks: dict[int, Rank] = {}
        self.events: dict[str, tuple[int, Event]] = {}
        """By a key that is equal on all ranks: (sequence, event), oldest first."""

    def journals(self) -> Iterator[Journal]:
        """All its files, by rank and attempt."""
        for _, rank in sorted(self.ranks.items()):
            yield from (journal for _, journal in sorted(rank.journals.items()))

    def views(self) -> list[JournalView]:
        """The newest look at each file that could be read."""
        return [journal.view for journal in self.journals() if journal.view is not None]

    @property
    def started_seconds(self) -> float:
        """Unix time of the first attach."""
        return min(view.identity.started_seconds for view in self.views())

    @property
    def last_seen_seconds(self) -> float:
        """Unix time of the last sign of life of any rank."""
        beats = (view.beat_seconds for view in self.views())
        return max(*beats, *(rank.gauges.get("wall_seconds", 0.0) for rank in self.ranks.values()), 0.0)

    @property
    def living(self) -> bool:
        """True while any of its ranks lives."""
        return any(view.state in LIVING for view in self.views())

    def current(self) -> dict[int, Rank]:
        """The ranks of the newest attempt. Replaced ones, and those a smaller world has no place for, are not there."""
        readable = [journal for journal in self.journals() if journal.view is not None]
        if not readable:
            return {}
        newest = max(journal.attempt for journal in readable)
        views = {j.rank: j.view for j in readable if j.attempt == newest and j.view is not None}
        world = max(views.values(), key=lambda view: view.identity.started_seconds).identity.world_size
        return {rank: self.ranks[rank] for rank in sorted(views) if rank < world}

    def tell(self, attempt: int, event: Event, sequence: Iterator[int]) -> None:
        """Keep an event once, though each rank tells it; the one who knows the parameter wins."""
        key = f"{attempt}-{event.step}-{event.kind}-{event.action}"
        known = self.events.get(key)
        if known is None or (known[1].parameter is None and event.parameter is not None):
            self.events[key] = (next(sequence), event)
            if len(self.events) > EVENT_LIMIT:
                del self.events[next(iter(self.events))]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is exported under one name."""

    name: str
    instance: Instance

    def ranks(self) -> dict[int, Rank]:
        """Its ranks on this node, by number, newest attempt only."""
        return self.instance.current()


class Store:
    """All runs below a directory. `refresh` reads what is new; hold `lock` while reading what it published."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock = threading.RLock()
        self.errors: Counter[str] = Counter(dict.fromkeys(ERROR_PARTS, 0))
        self.runs: list[Run] = []
        """In the order of their names."""
        self.sequence = itertools.count(1)
        self._instances: dict[tuple[str, str, str], Instance] = {}

    @property
    def journals(self) -> int:
        """Number of journals seen."""
        with self.lock:
            return sum(1 for instance in self._instances.values() for _ in instance.journals())

    @property
    def instances(self) -> list[Instance]:
        """All there are, exported or not; hold `lock`."""
        return list(self._instances.values())

    def find(self, name: str) -> Run | None:
        """The run exported as `name`."""
        return next((run for run in self.runs if run.name == name), None)

    def refresh(self) -> None:
        """Look for new and vanished journals, and read what is new in those that are exported."""
        places = list(find_journals(self.directory))
        with self.lock:
            self._forget({place.path for place in places})
            for place in places:
                self._add(place)
        followed = {id(run.instance) for run in self.runs}
        for instance in self._instances.values():
            for journal in instance.journals():
                if journal.view is None or (journal.view.state in LIVING and id(instance) not in followed):
                    journal.read(self.errors, follow=False)
        runs = self._select()
        for run in runs:
            self._follow(run.instance)
        with self.lock:
            for gone in followed - {id(run.instance) for run in runs}:
                self._release(gone)
            self.runs = runs

    def _forget(self, found: set[Path]) -> None:
        for key, instance in list(self._instances.items()):
            for number, rank in list(instance.ranks.items()):
                rank.journals = {a: j for a, j in rank.journals.items() if j.path in found}
                if not rank.journals:
                    del instance.ranks[number]
            if not instance.ranks:
                del self._instances[key]

    def _release(self, identity: int) -> None:
        """Give the history of a superseded instance back; the next refresh finds its files anew and only looks."""
        self._instances = {key: x for key, x in self._instances.items() if id(x) != identity}

    def _add(self, place: Place) -> None:
        key = (place.user, place.run, place.instance)
        if key not in self._instances:
            self._instances[key] = Instance(place.run, place.instance)
        ranks = self._instances[key].ranks
        if place.rank not in ranks:
            ranks[place.rank] = Rank(place.rank)
        if place.attempt not in ranks[place.rank].journals:
            ranks[place.rank].journals[place.attempt] = Journal(place.path, place.rank, place.attempt)

    def _follow(self, instance: Instance) -> None:
        for journal in list(instance.journals()):
            view = journal.read(self.errors, follow=True)
            if view is None:
                continue
            with self.lock:
                instance.ranks[journal.rank].feed(journal.attempt, view, self.sequence)
                journal.show_layers(view, self.errors)
                for _, event in view.events:
                    instance.tell(journal.attempt, event, self.sequence)

    def _select(self) -> list[Run]:
        """Instances nothing superseded, under names that differ. Depends on the files alone, not on when we looked."""
        by_run: dict[str, list[Instance]] = {}
        for instance in self._instances.values():
            if instance.views():
                by_run.setdefault(instance.run, []).append(instance)
        runs: dict[str, Run] = {}
        for name, instances in sorted(by_run.items()):
            numbers = itertools.count(2)
            for instance in _not_superseded(instances):
                unique = name
                while unique in runs or (unique != name and unique in by_run):
                    unique = f"{name}~{next(numbers)}"
                runs[unique] = Run(unique, instance)
        return [runs[name] for name in sorted(runs)]


def _not_superseded(instances: list[Instance]) -> list[Instance]:
    ordered = sorted(instances, key=lambda x: (x.started_seconds, x.name))
    return [
        x
        for i, x in enumerate(ordered)
        if x.living or not any(y.started_seconds >= x.last_seen_seconds for y in ordered[i + 1 :])
    ]


def signature_of(path: Path) -> tuple[int, ...]:
    """Changes whenever somebody writes the journal or puts another in its place."""
    signature: tuple[int, ...] = ()
    for file in (path, path.with_name(path.name + "-wal")):
        try:
            status = file.stat()
        except OSError:
            continue
        signature += (status.st_ino, status.st_mtime_ns, status.st_size)
    return signature


@functools.cache
def _born(*, applied: bool) -> dict[CounterKey, float]:
    """Every counter a step can raise, at 0."""
    healthy = StepRecord(
        step=0,
        wall_seconds=0.0,
        step_seconds=None,
        grad_norm=0.0,
        grad_norm_applied=0.0,
        grad_norm_limit=None,
        local_grad_norm=None,
        nan_count=0,
        inf_count=0,
        local_nan_count=0,
        local_inf_count=0,
        action="none",
        reason="healthy",
        applied=applied,
        culprit_rank=None,
        parameter=None,
        learning_rate=0.0,
        learning_rate_scale=1.0,
    )
    return dict.fromkeys(count_step(healthy, 0), 0.0)
