"""Which journals belong to the run that is asked for, and what they hold. Reads only; needs no torch and no agent."""

from __future__ import annotations

import dataclasses
import math
import re
import sqlite3
from array import array
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from gradmon.agent.places import Place, find_journals
from gradmon.journal import JournalVersionError, JournalView, read_journal
from gradmon.record import Detail, StepRecord

#: Steps taken in of all ranks together; each rank's are thinned evenly beyond its share, incidents kept. Those of the
#: lowest rank, which holds all that is equal on all ranks, are thinned beyond this number only.
STEPS_IN_ALL = 400_000
_LEAST_STEPS = 4_000
#: Asks `read_journal` for nothing that is new: who wrote it, and what became of them.
_NOTHING = 1 << 62

_JOURNAL = re.compile(r"rank-(\d{5,})\.db")
_BUNDLE = re.compile(r"rank-(\d{5,})-step-(\d+)\.bundle")

#: Fields of a step that are kept as columns, NaN where not measured or not finite.
COLUMNS = (
    "wall_seconds",
    "step_seconds",
    "grad_norm",
    "grad_norm_applied",
    "grad_norm_limit",
    "local_grad_norm",
    "learning_rate",
    "learning_rate_scale",
    "loss",
    "mean_loss",
    "memory_bytes",
    "loss_scale",
    "busy_seconds",
    "data_wait_seconds",
    "update_ratio",
    "noise_scale_ratio",
)


class NoJournalsError(ValueError):
    """No journal of a run lies where one was looked for; names what was looked for and the cure."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The journals of one instance of a run."""

    places: tuple[Place, ...]
    """By attempt, then by rank."""
    others: tuple[str, ...]
    """Other runs, and other instances of this one (`run/instance`), below the same directory; newest first."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An incident's bundle beside the journals."""

    path: Path
    rank: int
    step: int


class History:
    """Steps of one rank, oldest first, each step once: as columns, because a record a step is ten times larger."""

    def __init__(self) -> None:
        self.steps: array[int] = array("q")
        self._columns = {name: array("d") for name in COLUMNS}

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, name: str) -> array[float]:
        """One of COLUMNS, as long as `steps`. NaN where it was not measured or was not finite."""
        return self._columns[name]

    def add(self, records: Iterable[StepRecord]) -> None:
        """Put an attempt's steps behind those before; steps made again, from a checkpoint, replace what was there."""
        for record in records:
            if self.steps and record.step <= self.steps[-1]:
                self._forget_from(record.step)
            self.steps.append(record.step)
            for name, column in self._columns.items():
                value = getattr(record, name)
                column.append(math.nan if value is None else value)

    def _forget_from(self, step: int) -> None:
        keep = len(self.steps)
        while keep and self.steps[keep - 1] >= step:
            keep -= 1
        del self.steps[keep:]
        for column in self._columns.values():
            del column[keep:]


@dataclass(frozen=True, slots=True)
class Read:
    """One journal as it was found."""

    place: Place
    view: JournalView


@dataclass(frozen=True, slots=True)
class Unread:
    """A journal that could not be used, and why."""

    path: Path
    why: str


def choose_run(directory: Path, run: str | None = None) -> Chosen:
    """Find the journals of a run: the one named, else the one that started last.

    Args:
        directory: of the journals, of a run, an instance or an attempt, or an archive.
        run: its name, or `run/instance`; None: whichever started last.

    Raises:
        NoJournalsError: there is none, or none of that name.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise NoJournalsError(f"{directory} {what}; {_CURE}")
    places = _places(directory.resolve())
    if not places:
        raise NoJournalsError(
            f"{directory} holds no journals (looked for [RUN/[INSTANCE/[ATTEMPT/]]]rank-00000.db and others); {_CURE}"
        )
    groups: dict[tuple[str, str, str], list[Place]] = {}
    for place in places:
        groups.setdefault((place.user, place.run, place.instance), []).append(place)
    wanted = {key: found for key, found in groups.items() if run in (None, key[1], f"{key[1]}/{key[2]}")}
    if not wanted:
        names = ", ".join(sorted({name for _, name, _ in groups}))
        raise NoJournalsError(f"{directory} holds no run named {run}; --run takes one of: {names}")
    by_start = sorted(groups, key=lambda key: _started(groups[key]), reverse=True)
    newest = next(key for key in by_start if key in wanted)
    others = [
        name if name != newest[1] else f"{name}/{instance}"
        for user, name, instance in by_start
        if (user, name, instance) != newest
    ]
    ordered = sorted(groups[newest], key=lambda place: (place.attempt, place.rank))
    return Chosen(tuple(ordered), tuple(dict.fromkeys(others)))


_CURE = "give the directory that GRADMON_DIR or `dir:` names, a run in it, or an archive"


def _places(directory: Path) -> list[Place]:
    found = list(find_journals(directory))
    if found:
        return found
    flat = [(path, match) for path in sorted(directory.iterdir()) if (match := _JOURNAL.fullmatch(path.name))]
    if flat:  # an attempt; or files that somebody has put into a folder of their own
        number = int(directory.name) if directory.name.isdecimal() else 0
        run, instance = directory.parent.parent.name, directory.parent.name
        return [Place(path, "", run, instance, number, int(match[1])) for path, match in flat]
    for levels, pattern in ((1, "*/rank-*.db"), (2, "*/*/rank-*.db")):  # an instance, a run
        if next(directory.glob(pattern), None) is not None:
            root = directory.parents[2 - levels]
            return [place for place in find_journals(root) if directory in place.path.parents]
    return []


def _started(places: list[Place]) -> tuple[float, float]:
    """(when it began, when it was written last): the second decides where no file of it can be read."""
    changed = max((place.path.stat().st_mtime for place in places if place.path.exists()), default=0.0)
    for place in sorted(places, key=lambda place: (-place.attempt, place.rank))[:3]:
        read = _try(place.path, partial(read_journal, after_step=_NOTHING, after_event=_NOTHING))
        if isinstance(read, JournalView):
            return read.identity.started_seconds, changed
    return 0.0, changed


def read_run(chosen: Chosen, taken: Callable[[Read], None]) -> list[Unread]:
    """Read one journal after the other, each handed over as it comes: all at once would not fit where ranks are many.

    Returns:
        Those that could not be read.
    """
    lowest = {min(place.rank for place in chosen.places)}
    each = max(_LEAST_STEPS, STEPS_IN_ALL // len(chosen.places))
    unread = []
    for place in chosen.places:
        limit = STEPS_IN_ALL if place.rank in lowest else each
        view = _try(place.path, partial(read_journal, limit=limit))
        if isinstance(view, JournalView):
            taken(Read(place, view))
        else:
            unread.append(Unread(place.path, view))
    return unread


def _try(path: Path, read: Callable[[Path], JournalView]) -> JournalView | str:
    """What is in a journal, or why that can't be said."""
    try:
        return read(path)
    except FileNotFoundError:
        return "it is gone"
    except JournalVersionError as error:
        return str(error)
    except sqlite3.Error as error:
        return f"cut off or damaged ({error})"
    except (ValueError, KeyError, TypeError) as error:
        return f"no journal of gradmon ({type(error).__name__}: {error})"
    except OSError as error:
        return f"can't be read ({error.strerror or error})"


def details_of_step(path: Path, step: int) -> list[Detail]:
    """Statistics of every parameter in one step, of both places, as far as the journal still has them.

    `read_journal` gives the newest only; the first incident's are what names the layer that broke.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=1.0)) as connection:
            rows = connection.execute("SELECT step, place, stats FROM details WHERE step = ?", (step,)).fetchall()
    except sqlite3.Error:
        return []
    return [Detail(*row) for row in rows]


def bundles_beside(places: Iterable[Place]) -> list[Bundle]:
    """Incident bundles in the folders of these journals, by step."""
    found = []
    for folder in sorted({place.path.parent for place in places}):
        for path in sorted(folder.iterdir()):
            match = _BUNDLE.fullmatch(path.name)
            if match:
                found.append(Bundle(path, int(match[1]), int(match[2])))
    return sorted(found, key=lambda bundle: (bundle.step, bundle.rank))


def without_rows(view: JournalView) -> JournalView:
    """A view that no longer holds its steps and events."""
    return dataclasses.replace(view, steps=[], events=[])
