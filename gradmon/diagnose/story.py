"""Journals of all ranks -> what happened: the story of one instance of a run, as plain data.

`read_story` gathers it; `advice` looks for causes in it, `report` shows it, `compare` lays two side by side. Attempts
of an instance are one story: steps that a restart made again replace those before, events are kept with their attempt.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

from gradmon.config import Config
from gradmon.diagnose.gather import (
    Bundle,
    History,
    NoJournalsError,
    Read,
    Unread,
    bundles_beside,
    choose_run,
    details_of_step,
    read_run,
    without_rows,
)
from gradmon.diagnose.parameters import (
    LayerStory,
    ParameterStory,
    layer_stories,
    nonfinite_parameters,
    parameter_stories,
)
from gradmon.journal import JournalView, RankState
from gradmon.record import Event, RankIdentity, StepReason, StepRecord, StreakReason, finite

#: Kinds of events about the gradients and what was done about them; all others are findings of the watches.
GRADIENT_KINDS = frozenset((*get_args(StepReason), *get_args(StreakReason)))
#: How the exception begins with which gradmon itself ends a run.
STOPPED = "gradmon stopped training"
#: Incidents this many steps apart belong together, unless that leaves too many episodes.
_EPISODE_GAP = 32
_MOST_EPISODES = 16
#: Steps over which a rank's shares of time are taken: the newest.
_RECENT = 500
#: Worst first: what the run as a whole is said to be.
_WORST = ("exception", "crashed", "stuck", "busy", "running", "finished")


@dataclass(frozen=True, slots=True)
class Incident:
    """One step whose gradients were not fit to be applied, as the rank that knew most of it wrote it down."""

    attempt: int
    step: int
    wall_seconds: float
    reason: str
    rank: int | None
    """Whose gradients broke; None where no rank stands out."""
    parameter: str | None
    micro_step: int | None
    nan_count: int
    inf_count: int
    norm: float
    limit: float | None
    action: str
    applied: bool
    everywhere: bool
    """True if the gradients of all ranks were not finite before they were averaged."""


@dataclass(frozen=True, slots=True)
class Episode:
    """Events of one kind that lie close together."""

    kind: str
    attempt: int
    first_step: int
    last_step: int
    wall_seconds: float
    """Of the first."""
    count: int
    ranks: tuple[tuple[int | None, int], ...]
    """(rank, events), most first."""
    parameters: tuple[tuple[str | None, int], ...]
    done: tuple[tuple[tuple[str, bool], int], ...]
    """((action, applied), events), most first."""
    message: str
    """Of the first event."""
    largest_norm: float | None
    """Largest finite global norm of its steps, if any is known."""


@dataclass(frozen=True, slots=True)
class AttemptStory:
    """One set of workers: from their start to their end."""

    number: int
    started_seconds: float
    first_step: int | None
    last_step: int | None
    state: RankState
    """The worst that any of its ranks is in."""
    end_detail: str


@dataclass(frozen=True, slots=True)
class RankStory:
    """How one rank fared, in its newest attempt."""

    rank: int
    identity: RankIdentity
    state: RankState
    end_detail: str
    beat_seconds: float
    """Unix time of its last sign of life."""
    history: History
    blamed: int
    """Incidents that it caused."""
    loss: float | None
    """Last finite one."""
    step_seconds: float | None
    """Median of the newest steps, as the two shares below."""
    busy_ratio: float | None
    """Share of a step until its gradients met the others': the rank all wait for has the largest."""
    data_wait_ratio: float | None
    """Share of a step in which it waited for its DataLoader."""
    memory_bytes: float | None
    """Largest sample."""

    @property
    def last_step(self) -> int | None:
        """Its newest step; None before the first."""
        return self.history.steps[-1] if len(self.history) else None


@dataclass(frozen=True, slots=True)
class Story:
    """What happened in one instance of a run."""

    directory: Path
    """What was asked for."""
    identity: RankIdentity
    """Of `lead`, newest attempt."""
    lead: int
    """The rank whose journal tells what is equal on all ranks."""
    attempts: tuple[AttemptStory, ...]
    ranks: tuple[RankStory, ...]
    unread: tuple[Unread, ...]
    others: tuple[str, ...]
    """Other runs below the directory."""
    incidents: tuple[Incident, ...]
    scaler_skips: tuple[int, ...]
    """Steps that the script's GradScaler skipped."""
    max_norm_steps: int
    """Steps clipped to clip.max_norm."""
    episodes: tuple[Episode, ...]
    """Events about gradients, by step."""
    findings: tuple[Episode, ...]
    """All other events: what the watches of data, loss and weights found; one for each kind, place and rank."""
    actions: Mapping[tuple[str, str, bool], int]
    """(action, reason, applied) -> how often."""
    errors: Mapping[str, int]
    """Part of gradmon -> how often it failed."""
    nonfinite_losses: int
    validation_loss: float | None
    """The last that the script observed."""
    settings: Mapping[str, Any]
    """Every setting by its dotted name, as far as the journal has them."""
    parameters: tuple[ParameterStory, ...]
    layers: tuple[LayerStory, ...]
    broke_first: tuple[tuple[str, int], ...]
    """(parameter, non-finite elements) of the first non-finite step, on the rank that broke where that was kept."""
    bundles: tuple[Bundle, ...]

    @property
    def history(self) -> History:
        """Steps of the leading rank."""
        return next(rank.history for rank in self.ranks if rank.rank == self.lead)

    @property
    def state(self) -> RankState:
        """The worst that any rank is in."""
        return self.attempts[-1].state

    @property
    def first_incident(self) -> Incident | None:
        """The first step that was not fit to be applied."""
        return self.incidents[0] if self.incidents else None

    @property
    def first_nonfinite(self) -> Incident | None:
        """The first step with NaN or Inf in its gradients."""
        return next((one for one in self.incidents if one.reason != "spike"), None)

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks of the newest attempt whose journals are not here."""
        return tuple(sorted(set(range(self.identity.world_size)) - {rank.rank for rank in self.ranks}))

    @property
    def losses(self) -> tuple[Sequence[int], Sequence[float]]:
        """(steps, loss): the mean over the ranks where it is known, else the leading rank's own."""
        history = self.history
        mean = history.column("mean_loss")
        return history.steps, mean if any(value == value for value in mean) else history.column("loss")

    @property
    def best_bundle(self) -> Bundle | None:
        """Of the first non-finite step if there is one, else the first."""
        first = self.first_nonfinite
        of_first = (one for one in self.bundles if first is not None and one.step == first.step)
        return next(of_first, self.bundles[0] if self.bundles else None)

    @property
    def stop(self) -> Episode | None:
        """What gradmon ended the newest attempt for; None if it ended otherwise."""
        ended = [rank.end_detail for rank in self.ranks if rank.state == "exception"]
        if not any(text.startswith(STOPPED) for text in ended):
            return None
        newest = (one for one in reversed(self.episodes) if one.attempt == self.attempts[-1].number)
        return next((one for one in newest if any(did and act == "stop" for (act, did), _ in one.done)), None)

    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Name -> (value, default) of the settings that differ from the defaults."""
        defaults = flat_settings(Config().to_dict())
        return {
            name: (v, defaults[name]) for name, v in self.settings.items() if name in defaults and v != defaults[name]
        }

    def done(self, action: str, *, applied: bool = True) -> int:
        """How often an action was taken (or would have been), for whatever reason."""
        return sum(n for (what, _, did), n in self.actions.items() if what == action and did == applied)


def read_story(directory: Path, run: str | None = None) -> Story:
    """Read the journals of a run and tell what happened.

    Args:
        directory: of the journals, of a run, an instance or an attempt, or an archive.
        run: name of the run, where there are several; None: the one that started last.

    Raises:
        NoJournalsError: there is nothing to tell of; names the cure.
    """
    chosen = choose_run(directory, run)
    gathering = _Gathering()
    unread = read_run(chosen, gathering.take)
    if not gathering.newest:
        why = "; ".join(f"{one.path.name}: {one.why}" for one in unread[:3])
        raise NoJournalsError(f"no journal in {directory} could be read ({why}); give a copy from the archive")
    return gathering.story(directory, tuple(unread), chosen.others, tuple(bundles_beside(chosen.places)))


def flat_settings(nested: Mapping[str, Any]) -> dict[str, Any]:
    """`{"clip": {"max_norm": 1}}` -> `{"clip.max_norm": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


@dataclass
class _Gathering:
    """What is kept of each journal once it has been read."""

    newest: dict[int, Read] = field(default_factory=dict)
    """Rank -> its journal of the newest attempt, without steps and events."""
    views: list[Read] = field(default_factory=list)
    histories: dict[int, History] = field(default_factory=dict)
    incidents: dict[tuple[int, int], Incident] = field(default_factory=dict)
    known: dict[tuple[int, int], tuple[bool, ...]] = field(default_factory=dict)
    """How much was known of an incident by the rank whose word stands."""
    scaler_skips: set[tuple[int, int]] = field(default_factory=set)
    max_norm_steps: Counter[int] = field(default_factory=Counter)
    events: dict[tuple[Any, ...], tuple[int, Event]] = field(default_factory=dict)
    spans: dict[int, list[int]] = field(default_factory=dict)
    """Attempt -> its first and its last step."""

    def take(self, read: Read) -> None:
        """Attempts come in their order."""
        rank, attempt = read.place.rank, read.place.attempt
        records = [record for _, record in read.view.steps]
        self.histories.setdefault(rank, History()).add(records)
        if records:
            first, last = self.spans.get(attempt, (records[0].step, 0))
            self.spans[attempt] = [min(first, records[0].step), max(last, records[-1].step)]
        for record in records:
            if record.broken:
                self._blame(attempt, rank, record)
            elif record.reason == "scaler_skip":
                self.scaler_skips.add((attempt, record.step))
            elif record.reason == "max_norm":
                self.max_norm_steps[rank] += 1
        for _, event in read.view.events:
            self._tell(attempt, event)
        kept = dataclasses.replace(read, view=without_rows(read.view))
        self.views.append(kept)
        self.newest[rank] = kept

    def _blame(self, attempt: int, rank: int, record: StepRecord) -> None:
        here = record.local_nan_count + record.local_inf_count > 0
        knows = (record.culprit_rank is not None, record.culprit_rank == rank, here, record.parameter is not None)
        if (attempt, record.step) in self.known and knows <= self.known[attempt, record.step]:
            return
        self.known[attempt, record.step] = knows
        self.incidents[attempt, record.step] = Incident(
            attempt=attempt,
            step=record.step,
            wall_seconds=record.wall_seconds,
            reason=record.reason,
            rank=record.culprit_rank,
            parameter=record.parameter,
            micro_step=record.micro_step,
            nan_count=record.local_nan_count if here else record.nan_count,
            inf_count=record.local_inf_count if here else record.inf_count,
            norm=record.grad_norm,
            limit=record.grad_norm_limit,
            action=record.action,
            applied=record.applied,
            # that no rank stands out, though this one broke, means that all did
            everywhere=record.culprit_rank is None and (here or record.healthy_ranks == 0),
        )

    def _tell(self, attempt: int, event: Event) -> None:
        """Once, though each rank tells it; of what a rank found for itself, each."""
        key: tuple[Any, ...] = (attempt, event.step, event.kind, event.action)
        if event.kind not in GRADIENT_KINDS:
            key = (*key, event.rank, event.parameter)
        known = self.events.get(key)
        if known is None or (known[1].parameter is None and event.parameter is not None):
            self.events[key] = (attempt, event)

    def story(
        self, directory: Path, unread: tuple[Unread, ...], others: tuple[str, ...], bundles: tuple[Bundle, ...]
    ) -> Story:
        last_attempt = max(read.place.attempt for read in self.newest.values())
        current = {rank: read for rank, read in self.newest.items() if read.place.attempt == last_attempt}
        lead = min(current, key=lambda rank: (-self._weight(rank), rank))
        view = current[lead].view
        settings = flat_settings(view.config)
        incidents = tuple(self.incidents[key] for key in sorted(self.incidents))
        of_lead = [read.view for read in self.views if read.place.rank == lead]
        pattern = settings.get("metrics.layers")
        told = sorted(self.events.values(), key=lambda pair: (pair[0], pair[1].step, pair[1].wall_seconds))
        details = [detail for _, detail in view.details]
        return Story(
            directory=directory,
            identity=view.identity,
            lead=lead,
            attempts=tuple(self._attempt(number) for number in sorted({read.place.attempt for read in self.views})),
            ranks=tuple(self._rank(rank, current[rank].view, incidents) for rank in sorted(current)),
            unread=unread,
            others=others,
            incidents=incidents,
            scaler_skips=tuple(step for _, step in sorted(self.scaler_skips)),
            max_norm_steps=self.max_norm_steps[lead],
            episodes=_episodes([pair for pair in told if pair[1].kind in GRADIENT_KINDS], self.incidents),
            findings=_findings([pair for pair in told if pair[1].kind not in GRADIENT_KINDS]),
            actions=_actions(of_lead),
            errors=_errors([read.view for read in self.views]),
            nonfinite_losses=_most(self.views, "gradmon_nonfinite_losses_total"),
            validation_loss=finite(view.samples.get("validation_loss")),
            settings=settings,
            parameters=parameter_stories(view.parameter_names, view.elements, details),
            layers=layer_stories(view.parameter_names, view.elements, details, pattern),
            broke_first=self._broke_first(incidents, lead),
            bundles=bundles,
        )

    def _weight(self, rank: int) -> int:
        """The lowest rank is read whole; another one leads only if that has far fewer steps, as when it is damaged."""
        steps = self.histories[rank].steps
        return steps[-1] // 1000 if steps else -1

    def _attempt(self, number: int) -> AttemptStory:
        views = [read.view for read in self.views if read.place.attempt == number]
        first, last = self.spans.get(number, (None, None))
        worst = min(views, key=lambda view: (_WORST.index(view.state), view.beat_seconds))
        started = min(view.identity.started_seconds for view in views)
        return AttemptStory(number, started, first, last, worst.state, worst.end_detail)

    def _rank(self, rank: int, view: JournalView, incidents: Sequence[Incident]) -> RankStory:
        history = self.histories[rank]
        seconds = _recent(history, "step_seconds")
        whole = sum(seconds)
        losses = [value for value in history.column("loss") if math.isfinite(value)]
        memory = [value for value in history.column("memory_bytes") if math.isfinite(value)]
        sampled = view.samples.get("gpu_memory_allocated_bytes", view.samples.get("resident_memory_bytes"))
        return RankStory(
            rank=rank,
            identity=view.identity,
            state=view.state,
            end_detail=view.end_detail,
            beat_seconds=max(view.beat_seconds, history.column("wall_seconds")[-1] if len(history) else 0.0),
            history=history,
            blamed=sum(one.rank == rank for one in incidents),
            loss=losses[-1] if losses else None,
            step_seconds=median(seconds) if seconds else None,
            busy_ratio=_share(_recent(history, "busy_seconds"), whole),
            data_wait_ratio=_share(_recent(history, "data_wait_seconds"), whole),
            memory_bytes=max(memory, default=sampled),
        )

    def _broke_first(self, incidents: Sequence[Incident], lead: int) -> tuple[tuple[str, int], ...]:
        first = next((one for one in incidents if one.reason != "spike"), None)
        if first is None:
            return ()
        wanted = lead if first.rank is None else first.rank
        for read in self.views:
            if read.place.attempt == first.attempt and read.place.rank == wanted:
                details = sorted(details_of_step(read.place.path, first.step), key=lambda one: one.place != "local")
                for detail in details:
                    return tuple(nonfinite_parameters(read.view.parameter_names, detail))
        return ()


def _recent(history: History, name: str) -> list[float]:
    return [value for value in history.column(name)[-_RECENT:] if math.isfinite(value)]


def _share(parts: list[float], whole: float) -> float | None:
    return min(1.0, sum(parts) / whole) if parts and whole > 0 else None


def _episodes(told: list[tuple[int, Event]], incidents: Mapping[tuple[int, int], Incident]) -> tuple[Episode, ...]:
    gap = _EPISODE_GAP
    while True:
        groups = _grouped(told, gap)
        if len(groups) <= _MOST_EPISODES or gap > 1 << 40:
            return tuple(_episode(group, incidents) for group in groups)
        gap *= 4


def _grouped(told: list[tuple[int, Event]], gap: int) -> list[list[tuple[int, Event]]]:
    groups: list[list[tuple[int, Event]]] = []
    latest: dict[tuple[int, str], list[tuple[int, Event]]] = {}
    for attempt, event in told:
        near = latest.get((attempt, event.kind))
        if near is None or event.step - near[-1][1].step > gap:
            near = latest[attempt, event.kind] = []
            groups.append(near)
        near.append((attempt, event))
    return groups


def _findings(told: list[tuple[int, Event]]) -> tuple[Episode, ...]:
    groups: dict[tuple[Any, ...], list[tuple[int, Event]]] = {}
    for attempt, event in told:
        groups.setdefault((event.kind, event.parameter, event.rank), []).append((attempt, event))
    return tuple(sorted((_episode(group, {}) for group in groups.values()), key=lambda one: one.first_step))


def _episode(group: list[tuple[int, Event]], incidents: Mapping[tuple[int, int], Incident]) -> Episode:
    attempt, first = group[0]
    norms = [one.norm for a, e in group if (one := incidents.get((a, e.step))) is not None and math.isfinite(one.norm)]
    return Episode(
        kind=first.kind,
        attempt=attempt,
        first_step=first.step,
        last_step=group[-1][1].step,
        wall_seconds=first.wall_seconds,
        count=len(group),
        ranks=tuple(Counter(event.rank for _, event in group).most_common()),
        parameters=tuple(Counter(event.parameter for _, event in group).most_common()),
        done=tuple(Counter((str(event.action), event.applied) for _, event in group).most_common()),
        message=first.message,
        largest_norm=max(norms, default=None),
    )


def _actions(views: Sequence[JournalView]) -> dict[tuple[str, str, bool], int]:
    """Over all attempts of one rank: every rank counts the same."""
    total: Counter[tuple[str, str, bool]] = Counter()
    for view in views:
        for (name, labels), value in view.counters.items():
            if name == "gradmon_actions_total" and value:
                action, reason, applied = labels
                total[action, reason, applied == "yes"] += int(value)
    return dict(total)


def _errors(views: Sequence[JournalView]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for view in views:
        for (name, labels), value in view.counters.items():
            if name == "gradmon_errors_total" and value:
                total[labels[0]] += int(value)
    return dict(total)


def _most(reads: Sequence[Read], counter: str) -> int:
    """Of the rank that counted most, over its attempts."""
    total: Counter[int] = Counter()
    for read in reads:
        total[read.place.rank] += int(read.view.counters.get((counter, ()), 0))
    return max(total.values(), default=0)
