"""A story as charts: few points, of which none that matters is missing. Plain data for `charts.js`. Pure.

A run of more steps than `BUCKETS` is drawn by buckets of steps: the lowest and the highest value of each, and between
them the median. What is one line only keeps both extremes of each bucket as points.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gradmon.diagnose.gather import History
from gradmon.diagnose.story import Episode, RankStory, Story
from gradmon.diagnose.telling import done, episode_text

BUCKETS = 480
#: More ranks than this are drawn as a band, with the most interesting ones as lines.
_LINES = 8
_FEW_LINES = 4
_MOST_MARKS = 240

Chart = dict[str, Any]
_Pick = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Buckets:
    """Equal spans of steps."""

    first: int
    width: int
    count: int
    last: int

    @classmethod
    def over(cls, histories: Sequence[History], most: int = BUCKETS) -> Buckets:
        """That hold all steps of these."""
        steps = [history.steps for history in histories if len(history)]
        first, last = min((s[0] for s in steps), default=1), max((s[-1] for s in steps), default=0)
        width = max(1, -(-(last - first + 1) // most))
        return cls(first, width, max(0, -(-(last - first + 1) // width)), last)

    def steps(self) -> list[int]:
        """The middle of each, or the last step."""
        return [min(self.last, self.first + i * self.width + self.width // 2) for i in range(self.count)]

    def fill(self, steps: Sequence[int], values: Sequence[float]) -> list[list[float]]:
        """The finite values in each."""
        filled: list[list[float]] = [[] for _ in range(self.count)]
        first, width = self.first, self.width
        for step, value in zip(steps, values, strict=True):
            if value - value == 0:  # finite
                filled[(step - first) // width].append(value)
        return filled


def picked(filled: Sequence[Sequence[float]], pick: _Pick) -> list[float]:
    """One value of each bucket, NaN where there is none."""
    return [pick(values) if values else math.nan for values in filled]


def extremes(columns: Sequence[Sequence[float]], most: int = BUCKETS) -> list[int]:
    """Places of the points to draw: of each bucket the lowest and highest of every column, and one without a value."""
    length = len(columns[0])
    if length <= 2 * most:
        return list(range(length))
    kept = {0, length - 1}
    for i in range(most):
        span = range(i * length // most, (i + 1) * length // most)
        for place, column in enumerate(columns):
            there = [k for k in span if math.isfinite(column[k])]
            if there:
                kept |= {min(there, key=column.__getitem__), max(there, key=column.__getitem__)}
            if len(there) < len(span) and place == 0:
                kept.add(next(k for k in span if not math.isfinite(column[k])))
    return sorted(kept)


def line(label: str, color: str, values: Sequence[float], **look: Any) -> dict[str, Any]:
    """A line of a chart; `color` is the name of a CSS variable."""
    return {"label": label, "color": color, "values": list(values), **look}


def charts_of(story: Story) -> list[Chart]:
    """All charts of a report; those without a value are not among them."""
    made = [
        _norm_chart(story),
        _local_chart(story),
        _loss_chart(story),
        _rate_chart(story),
        _time_chart(story),
        _memory_chart(story),
    ]
    return [chart for chart in made if any(v == v for one in chart["lines"] for v in one["values"])]


def marks_of(story: Story) -> list[dict[str, Any]]:
    """What is marked on the charts: episodes, findings, restarts."""
    marks = [_mark(episode) for episode in (*story.episodes, *story.findings)][:_MOST_MARKS]
    for attempt in story.attempts[1:]:
        if attempt.first_step is not None:
            text = f"attempt {attempt.number + 1} begins"
            marks.append({"kind": "restart", "first": attempt.first_step, "last": attempt.first_step, "text": text})
    return sorted(marks, key=lambda mark: mark["first"])


def _mark(episode: Episode) -> dict[str, Any]:
    text = f"{episode_text(episode)[:300]} ({done(episode)})"
    return {"kind": episode.kind, "first": episode.first_step, "last": episode.last_step, "text": text}


def _norm_chart(story: Story) -> Chart:
    history = story.history
    columns: list[Sequence[float]] = [history.column(n) for n in ("grad_norm", "grad_norm_applied", "grad_norm_limit")]
    norm, applied, limit = columns
    steps: Sequence[int] = history.steps
    highest: list[Chart] = []
    if len(steps) > 2 * BUCKETS:
        buckets = Buckets.over([history])
        filled = buckets.fill(history.steps, norm)
        highest = [line("highest", "--s5", picked(filled, max), width=1)]
        norm, limit = picked(filled, median), picked(buckets.fill(history.steps, limit), median)
        applied, steps = picked(buckets.fill(history.steps, applied), max), buckets.steps()
    return {
        "title": "Global gradient norm",
        "wide": True,
        "log": True,
        "fromTop": True,
        "format": "number",
        "x": list(steps),
        "lines": [
            line("spike limit", "--limit", limit, dash=[5, 4], width=1.25),
            *highest,
            line("applied, highest" if highest else "applied", "--applied", applied, width=1.5),
            line("norm, median" if highest else "norm", "--norm", norm, width=1.75, fill=True),
        ],
    }


def _local_chart(story: Story) -> Chart:
    chart = _rank_chart(story, "local_grad_norm", max, _far_off)
    return {**chart, "title": "Local norm per rank, before the all-reduce", "log": True, "format": "number"}


def _loss_chart(story: Story) -> Chart:
    chart = _rank_chart(story, "loss", median, _far_off)
    history = story.history
    means = history.column("mean_loss")
    if len(story.ranks) > 1 and any(value == value for value in means):
        buckets = Buckets.over([rank.history for rank in story.ranks])
        mean = picked(buckets.fill(history.steps, means), median)
        chart["lines"].append(line("mean", "--text", mean, width=1.75))
    if story.validation_loss is not None:
        values = [story.validation_loss] * len(chart["x"])
        chart["lines"].append(line("validation, the last", "--backoff", values, dash=[6, 4], width=1.5))
    return {**chart, "title": "Loss", "format": "number", "robust": True}


def _rate_chart(story: Story) -> Chart:
    history = story.history
    rate, scale = history.column("learning_rate"), history.column("learning_rate_scale")
    used = array("d", (r * s for r, s in zip(rate, scale, strict=True)))
    places = extremes([used])
    lines = [line("as used", "--backoff", [used[i] for i in places], width=1.75, fill=True)]
    if any(s < 0.999 for s in scale):
        lines.insert(0, line("as scheduled", "--dim", [rate[i] for i in places], dash=[5, 4], width=1.25))
    steps = [history.steps[i] for i in places]
    return {"title": "Learning rate", "format": "number", "zero": True, "x": steps, "lines": lines}


def _time_chart(story: Story) -> Chart:
    buckets = Buckets.over([rank.history for rank in story.ranks])
    filled = _of_all(story.ranks, "step_seconds", buckets)
    lines = [line("step", "--norm", picked(filled, median), width=1.6)]
    worst = max(story.ranks, key=lambda rank: rank.busy_ratio or 0.0)
    for label, name, color in (
        ("computing", "busy_seconds", "--spike"),
        ("waiting for data", "data_wait_seconds", "--s3"),
    ):
        values = picked(buckets.fill(worst.history.steps, worst.history.column(name)), median)
        if any(value > 0 for value in values):
            whose = f", rank {worst.rank}" if len(story.ranks) > 1 else ""
            lines.append(line(f"{label}{whose}", color, values, width=1.3))
    band = {"low": picked(filled, min), "high": picked(filled, max)}
    return {
        "title": "Step time",
        "format": "seconds",
        "zero": True,
        "robust": True,
        "x": buckets.steps(),
        "lines": lines,
        "band": band,
    }


def _memory_chart(story: Story) -> Chart:
    chart = _rank_chart(story, "memory_bytes", max, lambda rank, _: rank.memory_bytes or 0.0)
    return {**chart, "title": "Memory per rank", "format": "bytes", "zero": True}


def _of_all(ranks: Sequence[RankStory], name: str, buckets: Buckets) -> list[list[float]]:
    together: list[list[float]] = [[] for _ in range(buckets.count)]
    for rank in ranks:
        for all_ranks, own in zip(together, buckets.fill(rank.history.steps, rank.history.column(name)), strict=True):
            all_ranks += own
    return together


def _rank_chart(story: Story, name: str, pick: _Pick, interest: Callable[[RankStory, str], float]) -> Chart:
    """Few ranks as lines; many as a band with their median, and the most interesting ones as lines."""
    ranks = story.ranks
    buckets = Buckets.over([rank.history for rank in ranks])
    filled = _of_all(ranks, name, buckets)
    chart: Chart = {"x": buckets.steps(), "lines": []}
    shown = list(ranks)
    if len(ranks) > _LINES:
        chart["lines"].append(line("median", "--text", picked(filled, median), width=1.6))
        by_interest = sorted(ranks, key=lambda rank: (-rank.blamed, -interest(rank, name), rank.rank))
        shown = sorted(by_interest[:_FEW_LINES], key=lambda rank: rank.rank)
    if len(ranks) > _LINES or buckets.width > 1:
        chart["band"] = {"low": picked(filled, min), "high": picked(filled, max)}
    for place, rank in enumerate(shown):
        values = picked(buckets.fill(rank.history.steps, rank.history.column(name)), pick)
        chart["lines"].append(line(f"rank {rank.rank}", f"--s{place % _LINES}", values, width=1.4))
    return chart


def _far_off(rank: RankStory, name: str) -> float:
    values = [value for value in rank.history.column(name)[-200:] if math.isfinite(value)]
    return median(values) if values else 0.0
