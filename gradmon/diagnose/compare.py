"""`gradmon compare A B`: two runs side by side, and where they part. Needs no torch.

Two runs part where they differ beyond noise: with d the difference of their losses (or of the logarithms of their
norms) at a step both have, and s the noise, 1.4826 / sqrt 2 times the median change from one step to the next in the 64
steps around: at the first of 32 steps whose median d is beyond 2 s, 6 standard errors of that median. Runs with other
seeds differ from the first step on, now up and now down; a lone spike moves no median.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from gradmon.diagnose.charts import Buckets, Chart, line, picked
from gradmon.diagnose.gather import History
from gradmon.diagnose.markup import Markup, el, join, page
from gradmon.diagnose.report import write_page
from gradmon.diagnose.sections import card, table
from gradmon.diagnose.story import Story, read_story
from gradmon.diagnose.telling import how_it_ended, number, seconds, size, verdict, whole

_WINDOW = 32
_NOISE_WINDOW = 64
_SIGMAS = 2.0
_TO_SIGMA = 1.4826 / math.sqrt(2)
#: Smaller differences are those of rounding, where a run is so smooth that it has no noise.
_ROUNDING = 1e-6
_LAST = 50
#: Where a run lies and how it is served; the training is the same.
_NOT_OF_THE_TRAINING = ("run", "dir", "archive", "health_file")


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two series of the same name go different ways, over the steps that both have."""

    name: str
    """`loss` or `grad_norm`."""
    shared_steps: int
    first_difference: int | None
    """First step at which they are not bit-identical; None if they are all along."""
    beyond_noise: int | None
    """First step from which on they differ beyond noise; None if they don't, or are too short to say."""
    values: tuple[float, float] | None
    """Of both at `beyond_noise`."""


@dataclass(frozen=True, slots=True)
class Line:
    """One number of both runs."""

    name: str
    values: tuple[str, str]
    better: int | None = None
    """0 or 1 where one is better, None where that can't be said."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side."""

    stories: tuple[Story, Story]
    names: tuple[str, str]
    settings: tuple[tuple[str, Any, Any], ...]
    """(name, of A, of B) of what differs, beside where a run lies and how it is served."""
    lines: tuple[Line, ...]
    partings: tuple[Parting, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `gradmon compare` takes."""
    parser.add_argument("a", metavar="A", help="directory of a run, as for `gradmon report`")
    parser.add_argument("b", metavar="B", help="directory of the run to compare it with")
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default: gradmon-compare-A-B.html here)")
    parser.add_argument("--text", action="store_true", help="only the text, no file")


def run(args: argparse.Namespace) -> int:
    """Write the comparison; prints it as text, and where the file is.

    Raises:
        NoJournalsError: one of the directories holds none.
        ValueError: the file can't be written; names the cure.
    """
    both = compare(*(read_story(Path(directory).expanduser()) for directory in (args.a, args.b)))
    print(comparison_text(both), end="")
    if not args.text:
        first, second = (story.identity.run for story in both.stories)
        out = Path(args.out or f"gradmon-compare-{first}-{second}.html")
        print(f"\ncomparison: {write_page(out, comparison_html(both))}")
    return 0


def compare(a: Story, b: Story) -> Comparison:
    """Lay two runs side by side."""
    same_name = a.identity.run == b.identity.run
    first, second = (f"{s.identity.run}/{s.identity.instance}" if same_name else s.identity.run for s in (a, b))
    names = (first, second) if first != second else (f"A: {first}", f"B: {second}")
    norms = [(s.history.steps, s.history.column("grad_norm")) for s in (a, b)]
    partings = (parting("loss", a.losses, b.losses), parting("grad_norm", *norms, logs=True))
    return Comparison((a, b), names, _settings(a, b), _lines(a, b), tuple(p for p in partings if p.shared_steps))


_Series = tuple[Sequence[int], Sequence[float]]


def parting(name: str, a: _Series, b: _Series, *, logs: bool = False) -> Parting:
    """Where two series part; see the top of this file.

    Args:
        name: what they are.
        a: (steps, values).
        b: the other's.
        logs: whether ratios count, and not differences: for norms.
    """
    of_b = dict(zip(*b, strict=True))
    shared = [(step, x, of_b[step]) for step, x in zip(*a, strict=True) if step in of_b]
    known = [(step, x, y) for step, x, y in shared if not (math.isnan(x) and math.isnan(y))]
    first = next((step for step, x, y in known if x != y), None)
    usable = [(s, x, y) for s, x, y in known if math.isfinite(x) and math.isfinite(y) and not (logs and min(x, y) <= 0)]
    scale: Callable[[float], float] = math.log if logs else float
    place = None if first is None else _beyond_noise([scale(x) for _, x, _ in usable], [scale(y) for *_, y in usable])
    values = None if place is None else usable[place][1:]
    return Parting(name, len(known), first, None if place is None else usable[place][0], values)


def _beyond_noise(xs: Sequence[float], ys: Sequence[float]) -> int | None:
    """Index at which two series part for longer than a moment."""
    apart = [x - y for x, y in zip(xs, ys, strict=True)]
    changes = [max(abs(x - w), abs(y - v)) for (w, v), (x, y) in pairwise(zip(xs, ys, strict=True))]
    noise, block = 0.0, -1
    for i in range(len(apart) - _WINDOW + 1):
        if i // _WINDOW != block:
            block = i // _WINDOW
            around = changes[max(0, i - _NOISE_WINDOW // 2) : i + _NOISE_WINDOW // 2]
            noise = _SIGMAS * max(_TO_SIGMA * median(around), _ROUNDING * abs(xs[i]), _ROUNDING)
        if abs(apart[i]) > noise and abs(median(apart[i : i + _WINDOW])) > noise:
            return i
    return None


def _settings(a: Story, b: Story) -> tuple[tuple[str, Any, Any], ...]:
    facts = ("script", "version", "world_size", "topology", "device")
    of = [{name: getattr(s.identity, name) for name in facts} | dict(s.settings) for s in (a, b)]
    names = [name for name in {**of[0], **of[1]} if name not in _NOT_OF_THE_TRAINING and not name.startswith("agent.")]
    missing = "(not known)"
    pairs = [(name, of[0].get(name, missing), of[1].get(name, missing)) for name in names]
    return tuple(pair for pair in pairs if pair[1] != pair[2])


def _lines(a: Story, b: Story) -> tuple[Line, ...]:
    """Numbers of both: (name, how to find it, how to write it, whether less is better)."""
    measured: list[tuple[str, Callable[[Story], float | None], Callable[[float | None], str], bool]] = [
        ("steps", lambda s: s.history.steps[-1] if len(s.history) else 0, whole, False),
        ("ranks", lambda s: s.identity.world_size, whole, False),
        ("attempts", lambda s: len(s.attempts), whole, False),
        ("loss, last 50 steps", lambda s: _of_last(s.losses[1]), number, True),
        ("loss, best 50 steps", lambda s: _best(s.losses[1]), number, True),
        ("validation loss, last", lambda s: s.validation_loss, number, True),
        ("gradient norm, median", lambda s: _median(s.history.column("grad_norm")), number, False),
        ("gradient norm, largest", lambda s: max(_finite(s.history.column("grad_norm")), default=None), number, False),
        ("spikes", lambda s: sum(one.reason == "spike" for one in s.incidents), whole, True),
        ("non-finite steps", lambda s: sum(one.reason != "spike" for one in s.incidents), whole, True),
        ("skipped", lambda s: s.done("skip"), whole, False),
        ("rescaled", lambda s: s.done("rescale"), whole, False),
        ("back-offs", lambda s: s.done("backoff"), whole, False),
        ("rollbacks", lambda s: s.done("rollback"), whole, False),
        ("step time, median", _step_seconds, seconds, True),
        ("steps per second", lambda s: 1 / t if (t := _step_seconds(s)) else None, number, False),
        ("computing, slowest rank", lambda s: _largest(s, "busy_ratio"), number, False),
        ("data wait, slowest rank", lambda s: _largest(s, "data_wait_ratio"), number, True),
        ("memory, largest rank", lambda s: _largest(s, "memory_bytes"), size, True),
    ]
    lines = [Line("end", (how_it_ended(a), how_it_ended(b)))]
    for name, find, write, less in measured:
        found = find(a), find(b)
        if found != (None, None) and (found != (0, 0) or name in ("spikes", "non-finite steps")):
            lines.append(Line(name, (write(found[0]), write(found[1])), _better(*found) if less else None))
    return tuple(lines)


def _better(a: float | None, b: float | None) -> int | None:
    """The smaller one, if that is more than what any two runs differ by."""
    if a is None or b is None or abs(a - b) <= 0.01 * max(abs(a), abs(b)):
        return None
    return 0 if a < b else 1


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _median(values: Sequence[float]) -> float | None:
    finite = _finite(values)
    return median(finite) if finite else None


def _of_last(values: Sequence[float]) -> float | None:
    return _median(_finite(values)[-_LAST:])


def _best(values: Sequence[float]) -> float | None:
    finite = _finite(values)
    starts = range(0, max(1, len(finite) - _LAST + 1), 10)
    return min((median(finite[i : i + _LAST]) for i in starts), default=None) if finite else None


def _step_seconds(story: Story) -> float | None:
    return _median(story.history.column("step_seconds"))


def _largest(story: Story, name: str) -> float | None:
    return max((value for rank in story.ranks if (value := getattr(rank, name)) is not None), default=None)


def parting_text(one: Parting) -> str:
    """Where they part, in a sentence."""
    what = {"loss": "Loss", "grad_norm": "Gradient norm"}[one.name]
    if one.first_difference is None:
        return f"{what}: bit-identical in all {one.shared_steps:,} steps that both have"
    same = f"{what}: differs from step {one.first_difference:,} on"
    if one.first_difference > 1:
        same = f"{what}: bit-identical before step {one.first_difference:,}"
    if one.beyond_noise is None or one.values is None:
        if one.shared_steps < _WINDOW:
            return f"{same}; the {one.shared_steps:,} steps that both have are too few to tell it from noise"
        return f"{same}, never beyond noise"
    a, b = one.values
    return f"{same}, beyond noise from step {one.beyond_noise:,} on ({number(a)} and {number(b)})"


def comparison_text(both: Comparison) -> str:
    """Both runs as a table of plain text."""
    rows = [("", *both.names), *((one.name, *one.values) for one in both.lines)]
    if both.settings:
        rows += [("", "", ""), ("what differs", "", "")]
        rows += [(name, str(a), str(b)) for name, a, b in both.settings]
    first, second = (max(len(_short(row[i])) for row in rows) for i in (0, 1))
    lines = [f"{_short(r[0]):<{first}}  {_short(r[1]):<{second}}  {_short(r[2])}".rstrip() for r in rows]
    lines += ["", *(parting_text(one) for one in both.partings)]
    if not both.partings:
        lines.append("There is no step that both have: where they part can't be said.")
    return "".join("".join(c if c.isprintable() else "?" for c in text) + "\n" for text in lines)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def comparison_html(both: Comparison) -> str:
    """The same as one HTML page, with the charts of both on top of each other."""
    a, b = both.names
    title = el("div", el("h1", f"{a} and {b}", id="name"), class_="title")
    partings = [el("p", f"{parting_text(one)}.", class_="verdict") for one in both.partings]
    said = [
        el("p", el("span", class_=f"swatch {look}"), el("b", name), f": {verdict(story).text}", class_="facts")
        for look, name, story in zip("ab", both.names, both.stories, strict=True)
    ]
    head = el("section", title, *partings, *said, class_="head")
    columns = (("", False), (a, False), (b, False))
    numbers = card("Side by side", table(columns, [_row(one) for one in both.lines]), id_="numbers")
    changed = [
        el("tr", el("td", name, class_="mono"), el("td", str(x), class_="mono"), el("td", str(y), class_="mono"))
        for name, x, y in both.settings
    ]
    same = el("p", "Both ran with the same settings.", class_="body good")
    settings = card("What differs", table(columns, changed) if changed else same, id_="settings")
    charts = el("section", id="charts", class_="charts", aria_label="Charts")
    main = join(head, charts, el("div", numbers, settings, class_="two"))
    return page(f"{a} and {b} · gradmon", main, {"charts": _charts(both), "marks": _marks(both)})


def _row(one: Line) -> Markup:
    cells = (el("td", value, class_="better" if one.better == i else None) for i, value in enumerate(one.values))
    return el("tr", el("td", one.name, class_="dim"), *cells)


def _marks(both: Comparison) -> list[dict[str, Any]]:
    steps = {one.beyond_noise: one for one in both.partings if one.beyond_noise is not None}
    return [{"kind": "restart", "first": s, "last": s, "text": parting_text(one)} for s, one in sorted(steps.items())]


def _charts(both: Comparison) -> list[Chart]:
    histories = [story.history for story in both.stories]
    buckets = Buckets.over(histories)
    made: list[tuple[str, str, Callable[[Sequence[float]], float], dict[str, Any]]] = [
        ("Global gradient norm", "grad_norm", max, {"wide": True, "log": True, "format": "number"}),
        ("Loss", "loss", median, {"format": "number", "robust": True}),
        ("Learning rate as used", "learning_rate", median, {"format": "number", "zero": True}),
        ("Step time", "step_seconds", median, {"format": "seconds", "zero": True, "robust": True}),
        ("Memory", "memory_bytes", max, {"format": "bytes", "zero": True}),
    ]
    charts = []
    for title, name, pick, look in made:
        lines = [
            line(label, color, picked(buckets.fill(*_series(story, history, name)), pick), width=1.6, dash=dash)
            for label, color, dash, story, history in zip(
                both.names, ("--s0", "--s1"), (None, [6, 4]), both.stories, histories, strict=True
            )
        ]
        if any(value == value for one in lines for value in one["values"]):
            charts.append({"title": title, "x": buckets.steps(), "lines": lines, **look})
    return charts


def _series(story: Story, history: History, name: str) -> _Series:
    if name == "loss":
        return story.losses
    values = history.column(name)
    if name == "learning_rate":
        scales = history.column("learning_rate_scale")
        return history.steps, [rate * scale for rate, scale in zip(values, scales, strict=True)]
    return history.steps, values
