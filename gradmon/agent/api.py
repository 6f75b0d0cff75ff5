"""What the live page asks for: runs, their state in words, and what is new since a cursor. Plain data, JSON-ready."""

from __future__ import annotations

import dataclasses
import math
import time
from statistics import median
from typing import Any, get_args
from uuid import uuid4

from gradmon.agent.store import LIVING, Instance, Rank, Run, Store
from gradmon.record import Action, Event

#: Points per series in one answer, for a few ranks; for many ranks fewer, so that an answer stays below this size.
POINTS = 2_000
_POINTS_OF_ALL_RANKS = 32_000
_EVENTS = 500

_GLOBAL_FIELDS = (
    "step",
    "wall_seconds",
    "grad_norm",
    "grad_norm_applied",
    "grad_norm_limit",
    "learning_rate_scale",
)
_RANK_FIELDS = ("step", "local_grad_norm", "loss", "memory_bytes", "step_seconds")
#: A cursor of another agent (one before a restart) means nothing to this one; the answer is then a full one.
_EPOCH = uuid4().hex[:8]


def list_runs(store: Store) -> list[dict[str, Any]]:
    """All runs: living first, then the newest."""
    with store.lock:
        runs = [_summary(run) for run in store.runs]
    return sorted(runs, key=lambda run: (not run["living"], -run["started_seconds"]))


def run_since(store: Store, name: str, cursor: str) -> dict[str, Any] | None:
    """All the page draws of a run that is new since `cursor` ("" for all), or None if there is no such run."""
    with store.lock:
        run = store.find(name)
        ranks = run.ranks() if run is not None else {}
        if run is None or not ranks:
            return None
        since = _since(cursor, run)
        newest = max([since, *(rank.history.newest for rank in ranks.values())])
        newest = max([newest, *(sequence for sequence, _ in run.instance.events.values())])
        points = max(200, min(POINTS, _POINTS_OF_ALL_RANKS // len(ranks)))
        series = {number: rank.history.since(since, points) for number, rank in ranks.items()}
        lowest = next(iter(ranks))
        return {
            "cursor": f"{_EPOCH}.{run.instance.name}.{newest}",
            "full": since == 0,
            "now_seconds": time.time(),
            "run": _summary(run),
            "totals": _totals(ranks[lowest]),
            "ranks": [_rank(rank) for rank in ranks.values()],
            "global": _columns(series[lowest], _GLOBAL_FIELDS),
            "series": {str(number): _columns(columns, _RANK_FIELDS) for number, columns in series.items()},
            "events": _events(run.instance, since),
        }


def _since(cursor: str, run: Run) -> int:
    epoch, _, rest = cursor.partition(".")
    instance, _, sequence = rest.rpartition(".")
    known = epoch == _EPOCH and instance == run.instance.name and sequence.isdecimal()
    return int(sequence) if known else 0


def _summary(run: Run) -> dict[str, Any]:
    ranks = run.ranks()
    identity = next(iter(ranks.values())).view.identity
    state, headline = describe(run, time.time())
    steps = [rank.step for rank in ranks.values() if rank.step is not None]
    durations = [median(recent) for rank in ranks.values() if (recent := rank.history.recent("step_seconds", 20))]
    return {
        "run": run.name,
        "instance": run.instance.name,
        "attempt": identity.attempt,
        "world_size": identity.world_size,
        "ranks_here": len(ranks),
        "mode": identity.mode,
        "topology": identity.topology,
        "script": identity.script,
        "version": identity.version,
        "host": identity.host,
        "device": identity.device,
        "started_seconds": run.instance.started_seconds,
        "last_seen_seconds": run.instance.last_seen_seconds,
        "living": run.instance.living,
        "state": state,
        "headline": headline,
        "step": max(steps, default=None),
        "step_seconds": _number(max(durations)) if durations else None,
        "learning_rate": next(iter(ranks.values())).gauges.get("learning_rate"),
    }


def _totals(rank: Rank) -> dict[str, int]:
    """What gradmon did, and what it would have done: "skip", "rescale" and so on, each also with "would_" before."""
    actions = [action for action in get_args(Action) if action != "none"]
    totals = {f"{would}{action}": 0 for would in ("", "would_") for action in actions} | {"nonfinite_steps": 0}
    for (name, labels), value in rank.counters().items():
        if name == "gradmon_actions_total":
            action, _, applied = labels
            key = action if applied == "yes" else f"would_{action}"
            totals[key] = totals.get(key, 0) + int(value)
        elif name == "gradmon_nonfinite_steps_total":
            totals["nonfinite_steps"] = int(value)
    return totals


def _rank(rank: Rank) -> dict[str, Any]:
    identity, view = rank.view.identity, rank.view
    gauges = rank.gauges
    memory = view.samples.get("gpu_memory_allocated_bytes", view.samples.get("resident_memory_bytes", math.nan))
    return {
        "rank": rank.number,
        "local_rank": identity.local_rank,
        "host": identity.host,
        "device": identity.device,
        "pid": identity.pid,
        "state": view.state,
        "detail": view.end_detail,
        "step": rank.step,
        "step_age_seconds": _number(time.time() - gauges["wall_seconds"]) if "wall_seconds" in gauges else None,
        "seen_age_seconds": _number(time.time() - rank.last_seen_seconds),
        "step_seconds": _number(median(rank.history.recent("step_seconds", 20) or [math.nan])),
        "memory_bytes": _number(memory),
        "local_grad_norm": _number(gauges.get("local_grad_norm", math.nan)),
        "loss": _number(gauges.get("loss", math.nan)),
    }


def _events(instance: Instance, since: int) -> list[dict[str, Any]]:
    new: list[tuple[str, Event]] = [(key, e) for key, (sequence, e) in instance.events.items() if sequence > since]
    return [{"id": key, **dataclasses.asdict(e), "applied": bool(e.applied)} for key, e in new[-_EVENTS:]]


def _columns(columns: dict[str, list[float]], names: tuple[str, ...]) -> dict[str, list[float | None]]:
    return {name: [_number(value, 2 if name == "wall_seconds" else None) for value in columns[name]] for name in names}


def _number(value: float, digits: int | None = None) -> float | None:
    """For JSON: six significant digits (or so many decimals), whole numbers whole, None for what is not finite."""
    if not math.isfinite(value):
        return None
    value = float(value)
    if value.is_integer() and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.6g}") if digits is None else round(value, digits)


def describe(run: Run, now: float) -> tuple[str, str]:
    """(state, sentence) of a run: the worst that any of its ranks here is in, said plainly."""
    ranks = run.ranks()
    by_state: dict[str, list[Rank]] = {}
    for rank in ranks.values():
        by_state.setdefault(rank.view.state, []).append(rank)
    for state, sentence in (("exception", _failed), ("crashed", _crashed), ("stuck", _stuck)):
        if state in by_state:
            return {"exception": "failed"}.get(state, state), sentence(by_state[state], len(ranks), now)
    living = [rank for rank in ranks.values() if rank.view.state in LIVING]
    if not living:
        return "finished", "the run has ended"
    paused = next((rank.view.paused_for for rank in living if rank.view.paused_for), "")
    if paused:
        return "busy", f"no step is expected now: {paused}"
    if all(rank.step is None for rank in living):
        return "running", "attached, waiting for the first step"
    if "running" not in by_state:
        age = min(now - rank.gauges.get("wall_seconds", rank.view.identity.started_seconds) for rank in living)
        return "busy", f"no step since {_duration(age)} (evaluation, checkpoint, or a hang?)"
    return "running", "all ranks here make steps" if len(living) > 1 else "making steps"


def _failed(ranks: list[Rank], _of: int, _now: float) -> str:
    first = min(ranks, key=lambda rank: rank.last_seen_seconds)
    where = "before the first step" if first.step is None else f"after step {first.step}"
    others = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
    return f"rank {first.number} ended {where} with {first.view.end_detail or 'an exception'}{others}"


def _crashed(ranks: list[Rank], of: int, now: float) -> str:
    age = _duration(min(now - rank.last_seen_seconds for rank in ranks))
    whole = len(ranks) == of > 1
    return f"{f'all {of} ranks here are' if whole else _name(ranks)} silent since {age} (killed?)"


def _stuck(ranks: list[Rank], _of: int, now: float) -> str:
    age = _duration(min(now - rank.view.beat_seconds for rank in ranks))
    return f"{_name(ranks)} stuck: alive, but without a heartbeat since {age} (stopped, or the host is overloaded?)"


def _name(ranks: list[Rank]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0].number} is"
    numbers = [str(rank.number) for rank in ranks]
    if len(numbers) > 4:
        return f"ranks {', '.join(numbers[:3])} and {len(numbers) - 3} more are"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]} are"


def _duration(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, round(seconds / size))} {unit}"
    return f"{round(seconds / 86400)} days"
