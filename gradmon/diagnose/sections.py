"""The parts of a report, as HTML: each function one part of the page, None where there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from gradmon.diagnose.advice import Advice
from gradmon.diagnose.markup import Markup, code_words, el, join
from gradmon.diagnose.parameters import LayerStory, ParameterStory
from gradmon.diagnose.story import Episode, Incident, RankStory, Story
from gradmon.diagnose.telling import (
    Verdict,
    clock,
    count_of,
    done,
    episode_text,
    factory_hint,
    how_it_ended,
    number,
    percent,
    rank_list,
    replay_command,
    seconds,
    size,
    stopped_by_gradmon,
    whole,
    why_nothing_done,
)

_LOOKS = {"finished": "calm", "running": "ok", "busy": "warn", "stuck": "bad", "exception": "bad", "crashed": "bad"}
_RANK_ROWS = 256
_PARAMETER_ROWS = 12
_EPISODE_ROWS = 200
_BUNDLE_ROWS = 12


def head(story: Story, said: Verdict, advice: Sequence[Advice]) -> Markup:
    """Name, verdict, facts, and the way to the advice."""
    identity = story.identity
    again = f"{len(story.attempts)} attempts" if len(story.attempts) > 1 else ""
    facts = [
        identity.script,
        f"{count_of(identity.world_size, 'rank')}, {identity.topology}",
        identity.device,
        f"started {clock(story.attempts[0].started_seconds)} UTC",
        f"instance {identity.instance}",
        again,
        f"gradmon {identity.version}",
    ]
    links = [
        el("a", one.rule, href=f"#advice-{i}", class_="bad" if one.urgent else None) for i, one in enumerate(advice)
    ]
    return el(
        "section",
        el(
            "div",
            el("h1", identity.run, id="name"),
            el(
                "span",
                _state_word(story.state, story.attempts[-1].end_detail),
                class_=f"badge {_LOOKS[story.state]}",
                id="state",
            ),
            el(
                "span",
                "observe: changes nothing" if identity.mode == "observe" else f"{identity.mode} mode",
                class_="mode",
            ),
            class_="title",
        ),
        el("p", said.text, class_=f"verdict {said.look}", id="verdict"),
        el("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        el("nav", "Advice below: ", *links, class_="jump") if links else None,
        _notes(story),
        tiles(story),
        class_="head",
    )


def _state_word(state: str, end_detail: str) -> str:
    return state if state != "exception" else "stopped" if stopped_by_gradmon(end_detail) else "failed"


def notes_of(story: Story) -> list[str]:
    """What the reader must know of the report itself: what it could not see."""
    notes = [f"{one.path} could not be read: {one.why}. The others were used." for one in story.unread[:8]]
    if len(story.unread) > 8:
        notes.append(f"{len(story.unread) - 8} more journals could not be read.")
    missing = story.missing_ranks
    if missing:
        notes.append(
            f"Of {rank_list(missing)} no journal was read. Those of other nodes lie there; an archive has them all."
        )
    if story.others:
        more = f" and {len(story.others) - 6} more" if len(story.others) > 6 else ""
        notes.append(f"Other runs lie here too (--run NAME): {', '.join(story.others[:6])}{more}.")
    return notes


def _notes(story: Story) -> Markup | None:
    notes = notes_of(story)
    return el("div", *(el("p", note) for note in notes), class_="notes", id="notes") if notes else None


def tiles(story: Story) -> Markup:
    """The numbers that one looks for first."""
    history = story.history
    norms = [v for v in history.column("grad_norm") if math.isfinite(v)]
    losses = [v for v in story.losses[1] if math.isfinite(v)]
    times = [rank.step_seconds for rank in story.ranks if rank.step_seconds is not None]
    wall = history.column("wall_seconds")
    lasted = wall[-1] - story.attempts[0].started_seconds if len(history) else None
    acted = sum(story.actions.values())
    did = sum(n for (_, _, applied), n in story.actions.items() if applied)
    incidents = len(story.incidents)
    since = f"first at step {story.incidents[0].step:,}" if incidents else "all gradients were healthy"
    largest = number(max(norms, default=None))
    last = losses[-50:]
    shown = [
        ("Steps", whole(history.steps[-1] if len(history) else 0), f"in {seconds(lasted)}", ""),
        ("Step time", seconds(max(times, default=None)), "median of the last steps", ""),
        ("Loss", number(median(last) if last else None), _loss_note(story, losses), ""),
        ("Gradient norm", number(median(norms) if norms else None), f"median; largest {largest}", ""),
        ("Incidents", whole(incidents), since, "warn" if incidents else ""),
        ("Interventions", whole(did), f"{acted - did:,} more would have been" if acted > did else "by gradmon", ""),
    ]
    return el("div", *(_tile(*one) for one in shown), class_="tiles", id="tiles")


def _loss_note(story: Story, losses: Sequence[float]) -> str:
    if story.validation_loss is not None:
        return f"validation {number(story.validation_loss)}"
    return f"at the start {number(median(losses[:10]))}" if losses else "monitor.observe(loss=loss) was not called"


def _tile(label: str, value: str, note: str, look: str) -> Markup:
    parts = (("label", label), ("value", value), ("note", note))
    return el("div", *(el("div", text, class_=name) for name, text in parts), class_=f"tile {look}".strip())


def card(title: str, *inside: Markup | None, note: str = "", id_: str | None = None) -> Markup:
    """A card with a heading."""
    heading = el("div", el("h2", title), el("span", note, class_="dim") if note else None, class_="card-head")
    return el("section", heading, *inside, class_="card", id=id_)


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Markup], class_: str = "") -> Markup:
    """A table; a column is (title, whether it holds numbers)."""
    titles = (el("th", title, class_="num" if numeric else None) for title, numeric in columns)
    whole_table = el("table", el("thead", el("tr", *titles)), el("tbody", *rows), class_=class_ or None)
    return el("div", whole_table, class_="scroll")


def _row(*cells: tuple[str, str]) -> Markup:
    """A row of plain texts, each with its class."""
    return el("tr", *(el("td", text, class_=look or None) for text, look in cells))


def _step(first: int, last: int) -> Markup:
    text = f"{first:,}" if first == last else f"{first:,} – {last:,}"  # noqa: RUF001  a span
    return el(
        "button", text, type="button", class_="step", title="Show on the charts", data_first=first, data_last=last
    )


def first_things(story: Story) -> Markup | None:
    """What happened first, and where; and how to see it again."""
    first, broken = story.first_incident, story.first_nonfinite
    cards = []
    if broken is not None:
        cards.append(card("The first NaN or Inf", el("div", _facts_of(story, broken), class_="body"), id_="first"))
    if first is not None and first is not broken:
        cards.insert(0, card("The first spike", el("div", _facts_of(story, first), class_="body"), id_="first-spike"))
    bundles = _bundles(story)
    if bundles is not None:
        cards.append(bundles)
    return el("div", *cards, class_="two" if len(cards) > 1 else None) if cards else None


def _facts_of(story: Story, one: Incident) -> Markup:
    nobody = "all of them" if one.everywhere and story.identity.world_size > 1 else "none stands out"
    rank = nobody if one.rank is None else f"{one.rank}"
    host = next((r.identity.host for r in story.ranks if r.rank == one.rank), "")
    facts: list[tuple[str, Markup]] = [
        ("Step", join(_step(one.step, one.step), f", {clock(one.wall_seconds)} UTC")),
        ("Rank", join(el("b", rank), f" on {host}" if host else "")),
    ]
    if one.parameter is not None:
        facts.append(("Parameter", el("code", one.parameter)))
    if one.micro_step is not None:
        facts.append(("Micro-step", join(f"backward {one.micro_step}")))
    if one.reason == "spike":
        facts.append(("Norm", join(el("b", number(one.norm)), f", limit {number(one.limit)}")))
    else:
        facts.append(("Elements", join(f"{one.nan_count:,} NaN, {one.inf_count:,} Inf")))
        if story.broke_first:
            names = [join(el("code", name), f" ({n:,})") for name, n in story.broke_first[:5]]
            more = f" and {len(story.broke_first) - 5} more" if len(story.broke_first) > 5 else None
            facts.append(
                ("Not finite in", join(*[part for name in names for part in (name, Markup("<br>"))][:-1], more))
            )
    did = {"skip": "skipped", "rescale": "rescaled", "leave_out": "rank left out"}.get(one.action, one.action)
    facts.append(("gradmon", join(did if one.applied else f"only watched; would have {did}")))
    return el("dl", *(join(el("dt", name), el("dd", value)) for name, value in facts), class_="first")


def _bundles(story: Story) -> Markup | None:
    best = story.best_bundle
    if best is None:
        return None
    listed = [
        _row((f"{one.step:,}", "num"), (str(one.rank), "num"), (one.path.name, "mono"))
        for one in story.bundles[:_BUNDLE_ROWS]
    ]
    command = el("code", replay_command(story, best), class_="command")
    hint = factory_hint(story)
    words = el("p", f"Runs the batch of step {best.step:,} again and names the operation that broke:", class_="dim")
    more = f", {_BUNDLE_ROWS} of {len(story.bundles)}" if len(story.bundles) > _BUNDLE_ROWS else ""
    return card(
        "See it again",
        el("div", words, command, el("p", hint, class_="dim hint") if hint else None, class_="body"),
        table((("Step", True), ("Rank", True), ("Bundle", False)), listed),
        note=f"{count_of(len(story.bundles), 'bundle')}{more}",
        id_="bundles",
    )


def timeline(story: Story) -> Markup:
    """Episodes of incidents and actions, restarts and ends, by step."""
    rows = [(one.attempt, one.first_step, 0, _episode_row(one)) for one in (*story.episodes, *story.findings)]
    for attempt in story.attempts:
        if attempt.number != story.attempts[0].number and attempt.first_step is not None:
            text = f"Attempt {attempt.number + 1} begins, {clock(attempt.started_seconds)} UTC"
            rows.append((attempt.number, attempt.first_step, -1, _plain_row(attempt.first_step, text, "restart")))
        told_by_event = stopped_by_gradmon(attempt.end_detail)
        if attempt.state != "finished" and attempt.last_step is not None and not told_by_event:
            newest = attempt is story.attempts[-1]
            told = f"{how_it_ended(story)}." if newest and len(story.ranks) > 1 else f"{attempt.state}."
            text = f"Attempt {attempt.number + 1}: {told} {attempt.end_detail}"
            rows.append((attempt.number, attempt.last_step, 1, _plain_row(attempt.last_step, text, "")))
    rows.sort(key=lambda row: row[:3])
    shown = [row[3] for row in rows[:_EPISODE_ROWS]]
    if not shown:
        shown = [el("tr", el("td", "Nothing has happened: all gradients were healthy.", colspan=6), class_="none-yet")]
    columns = (("Step", True), ("Time (UTC)", False), ("Rank", False), ("Parameter", False), ("What was seen", False),
               ("What was done", False))  # fmt: skip
    note = (
        count_of(len(rows), "line") if len(rows) <= _EPISODE_ROWS else f"first {_EPISODE_ROWS} of {len(rows):,} lines"
    )
    return card("Timeline", table(columns, shown, "events"), note=note if rows else "", id_="timeline")


def _episode_row(one: Episode) -> Markup:
    ranks = [str(rank) for rank, _ in one.ranks if rank is not None]
    shown = ", ".join(ranks[:3]) + (f" +{len(ranks) - 3}" if len(ranks) > 3 else "")
    names = [name for name, _ in one.parameters if name is not None]
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    return el(
        "tr",
        el("td", _step(one.first_step, one.last_step), class_="num"),
        el("td", clock(one.wall_seconds)[11:], class_="nowrap dim", title=clock(one.wall_seconds)),
        el("td", shown),
        el("td", f"{names[0]}{more}" if names else "", class_="mono"),
        el("td", episode_text(one), class_="wide", data_kind=one.kind),
        el("td", done(one), class_="nowrap"),
    )


def _plain_row(step: int, text: str, kind: str) -> Markup:
    cells = [el("td", _step(step, step), class_="num"), el("td"), el("td"), el("td", class_="mono")]
    return el("tr", *cells, el("td", text, class_="wide", data_kind=kind or None), el("td"))


def ranks(story: Story) -> Markup:
    """Each rank at its end; of many the worst first."""
    bad = {"exception": 0, "crashed": 0, "stuck": 0, "busy": 1}
    many = len(story.ranks) > 8
    order = sorted(story.ranks, key=lambda r: (bad.get(r.state, 2), -r.blamed, r.rank) if many else (r.rank,))
    busiest = max((rank.busy_ratio or 0.0 for rank in story.ranks), default=0.0)
    rows = [_rank_row(rank, busiest) for rank in order[:_RANK_ROWS]]
    texts = (("Rank", True), ("End", False), ("Host", False), ("Device", False))
    numbers = ("Last step", "Incidents", "Last loss", "Step time", "Computing", "Data wait", "Memory")
    columns = (*texts, *((title, True) for title in numbers))
    note = f"{_RANK_ROWS} of {len(order)}, worst first" if len(order) > _RANK_ROWS else "worst first" if many else ""
    return card("Ranks", table(columns, rows, "ranks roomy"), note=note, id_="ranks")


def _rank_row(rank: RankStory, busiest: float) -> Markup:
    slowest = busiest > 0 and rank.busy_ratio == busiest
    numbers = [
        whole(rank.last_step),
        f"{rank.blamed:,}" if rank.blamed else "0",
        number(rank.loss),
        seconds(rank.step_seconds),
        percent(rank.busy_ratio),
        percent(rank.data_wait_ratio),
        size(rank.memory_bytes),
    ]
    stopped = stopped_by_gradmon(rank.end_detail)
    detail = el("div", rank.end_detail[:400], class_="sub") if rank.end_detail and not stopped else None
    return el(
        "tr",
        el("td", str(rank.rank), class_="num"),
        el("td", el("span", _state_word(rank.state, rank.end_detail), class_=f"badge {_LOOKS[rank.state]}"), detail),
        el("td", rank.identity.host),
        el("td", rank.identity.device),
        *(el("td", el("b", text) if slowest and i == 4 else text, class_="num") for i, text in enumerate(numbers)),
        class_="hot" if rank.state in ("exception", "crashed", "stuck") and not stopped else None,
    )


def layers(story: Story) -> Markup | None:
    """The gradient's profile over the layers, in the order of the model."""
    if not story.layers:
        return None
    logs = [math.log10(one.norm) for one in story.layers if one.norm]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    rows = []
    for one in story.layers:
        filled = 5 + 95 * (math.log10(one.norm) - low) / (high - low) if one.norm and high > low else 50
        meter = el(
            "span",
            el("i", class_="bad" if one.nonfinite_elements else None, style=f"width:{filled:.0f}%"),
            class_="meter",
        )
        rows.append(
            el(
                "tr",
                el("td", one.name, class_="mono"),
                el("td", meter if one.norm else None, class_="bar-cell"),
                el("td", number(one.norm), class_="num"),
                el("td", percent(one.zero_ratio), class_="num"),
                el("td", number(one.update_ratio), class_="num"),
                el("td", *_not_finite(one), class_="num"),
            )
        )
    columns = (
        ("Layer", False),
        ("log norm", False),
        ("Norm", True),
        ("Zeros", True),
        ("Update / weight", True),
        ("Not finite", True),
    )
    return card("Layers, from input to output", table(columns, rows, "roomy"), note="newest measurements", id_="layers")


def _not_finite(one: LayerStory | ParameterStory) -> tuple[str, Markup | None]:
    """Elements in the newest measurement; and in the worst one, where that was another."""
    now, worst = one.nonfinite_elements, one.worst
    more = worst.nonfinite_elements > now
    said = el("div", f"at worst {worst.nonfinite_elements:,} (step {worst.step:,})", class_="sub") if more else None
    return f"{now:,}", said


def parameters(story: Story) -> Markup | None:
    """Those that stand out: not finite, without gradient, dead, or holding most of the norm."""
    if not story.parameters:
        return None
    worst = sorted(story.parameters, key=_badness, reverse=True)[:_PARAMETER_ROWS]
    rows = [
        el(
            "tr",
            el("td", one.name, class_="mono"),
            el("td", whole(one.elements or None), class_="num"),
            el("td", number(one.norm), class_="num"),
            el("td", number(one.largest_norm), class_="num"),
            el("td", percent(one.norm_ratio), class_="num"),
            el("td", percent(one.zero_ratio), class_="num"),
            el("td", number(one.update_ratio), class_="num"),
            el("td", *_not_finite(one) if one.has_gradient else ("no gradient",), class_="num"),
            class_="hot" if one.nonfinite_elements else None,
        )
        for one in worst
    ]
    numbers = ("Elements", "Norm", "Largest", "Share", "Zeros", "Update / weight", "Not finite")
    columns = (("Parameter", False), *((title, True) for title in numbers))
    note = f"{len(worst)} of {len(story.parameters):,}, worst first; newest measurements"
    return card("Parameters that stand out", table(columns, rows, "roomy"), note=note, id_="parameters")


def _badness(one: ParameterStory) -> tuple[float, bool, bool, float]:
    return (
        one.nonfinite_elements,
        not one.has_gradient,
        one.worst.nonfinite_elements > 0,
        (one.norm_ratio or 0.0) + max(0.0, (one.zero_ratio or 0.0) - 0.5),
    )


def findings(story: Story) -> Markup | None:
    """What the watches of data, loss and weights told."""
    if not story.findings:
        return None
    rows = [
        el(
            "tr",
            el("td", _step(one.first_step, one.last_step), class_="num"),
            el("td", one.kind.replace("_", " "), class_="nowrap", data_kind=one.kind),
            el("td", "" if one.ranks[0][0] is None else str(one.ranks[0][0])),
            el("td", one.parameters[0][0] or "", class_="mono"),
            el("td", one.message, class_="wide"),
            el("td", f"{one.count:,}", class_="num"),
        )
        for one in story.findings[:_EPISODE_ROWS]
    ]
    columns = (
        ("Step", True),
        ("Finding", False),
        ("Rank", False),
        ("Where", False),
        ("What was found", False),
        ("Times", True),
    )
    return card(
        "Findings", table(columns, rows, "roomy"), note="of the watches of loss, data and weights", id_="findings"
    )


def actions(story: Story) -> Markup:
    """How often gradmon did what, and why."""
    rows = [
        _row(
            (action, ""), (reason.replace("_", " "), ""), ("yes" if did else "no, only watched", ""), (f"{n:,}", "num")
        )
        for (action, reason, did), n in sorted(story.actions.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    if story.scaler_skips:
        skips = f"{len(story.scaler_skips):,}"
        rows.append(_row(("skip", ""), ("overflow of the loss scale", ""), ("by the GradScaler", ""), (skips, "num")))
    rows += [
        _row(("failed", ""), (part.replace("_", " "), ""), ("a part of gradmon", ""), (f"{n:,}", "num"))
        for part, n in sorted(story.errors.items())
    ]
    if not rows:
        return card(
            "What gradmon did", el("p", f"{why_nothing_done(story).capitalize()}.", class_="body good"), id_="actions"
        )
    columns = (("Action", False), ("Reason", False), ("Done", False), ("Times", True))
    return card("What gradmon did", table(columns, rows), id_="actions")


def settings(story: Story) -> Markup:
    """What differs from the defaults."""
    changed = story.changed_settings()
    if not changed:
        said = "All settings are the defaults." if story.settings else "The journal holds no settings."
        return card("Settings", el("p", said, class_="body good"), id_="settings")
    rows = [
        el(
            "tr",
            el("td", name, class_="mono"),
            el("td", str(value), class_="mono"),
            el("td", str(default), class_="mono dim"),
        )
        for name, (value, default) in changed.items()
    ]
    return card("Settings", table((("Setting", False), ("Value", False), ("Default", False)), rows),
                note="those that differ from the defaults", id_="settings")  # fmt: skip


def advice_cards(advice: Sequence[Advice]) -> Markup:
    """What to do about it."""
    if not advice:
        said = el("p", "No rule of the table matches this run.", class_="body good")
        return el("section", card("Advice", said), id="advice")
    cards = [
        el(
            "article",
            el("h3", one.rule[:1].upper() + one.rule[1:]),
            el("p", one.evidence, class_="evidence"),
            el("h4", "Likely causes"),
            el("ul", *(el("li", code_words(cause)) for cause in one.causes)),
            el("h4", "What to do"),
            el("ol", *(el("li", code_words(cure)) for cure in one.cures)),
            class_="card urgent" if one.urgent else "card",
            id=f"advice-{i}",
        )
        for i, one in enumerate(advice)
    ]
    return el("section", el("h2", "Advice", class_="section"), el("div", *cards, class_="advice"), id="advice")
