"""`gradmon report DIR`: one self-contained HTML file, and a short text, of what happened in a run. Needs no torch."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gradmon.config import load
from gradmon.diagnose import sections
from gradmon.diagnose.advice import Advice, advise
from gradmon.diagnose.charts import charts_of, marks_of
from gradmon.diagnose.markup import el, join, page
from gradmon.diagnose.story import Story, read_story
from gradmon.diagnose.telling import (
    clock,
    done,
    episode_text,
    factory_hint,
    replay_command,
    stopped_by_gradmon,
    verdict,
    what_was_done,
    why_nothing_done,
)
from gradmon.identity import agent_directory

_TEXT_EPISODES = 12
_TEXT_ADVICE = 6
_TEXT_CURES = 3
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `gradmon report` takes."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        help="directory of the journals, a run in it, or an archive (default: where attach() puts them: GRADMON_DIR or "
        "the setting dir, else the first that can be written of /var/lib/gradmon, SLURM_TMPDIR/gradmon, "
        "XDG_STATE_HOME/gradmon (~/.local/state/gradmon) and /tmp/gradmon-UID)",
    )
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="which run, or RUN/INSTANCE, where there are several (default: the one that started last)",
    )
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default: gradmon-report-RUN.html here)")
    parser.add_argument("--text", action="store_true", help="only the short text, no file")


def run(args: argparse.Namespace) -> int:
    """Write the report; prints the short text and where the file is.

    Raises:
        NoJournalsError: there is nothing to report on.
        ValueError: the file can't be written; names the cure.
    """
    given = args.directory
    directory = agent_directory(load().config.dir, os.environ) if given is None else Path(given).expanduser()
    story = read_story(directory, args.run)
    advice = advise(story)
    print(report_text(story, advice), end="")
    if not args.text:
        out = Path(args.out or f"gradmon-report-{story.identity.run}.html")
        print(f"\nreport: {write_page(out, report_html(story, advice))}")
    return 0


def write_page(out: Path, content: str) -> Path:
    """Write an HTML file; where it is.

    Raises:
        ValueError: it can't be written; names the cure.
    """
    try:
        out.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out} can't be written ({error.strerror}); name a file where you may write") from None
    return out.absolute()


def report_html(story: Story, advice: Sequence[Advice]) -> str:
    """The report as one HTML page that asks nobody for anything."""
    said = verdict(story)
    last_pair = el("div", sections.actions(story), sections.settings(story), class_="two")
    main = join(
        sections.head(story, said, advice),
        sections.first_things(story),
        sections.advice_cards(advice) if advice else None,
        sections.timeline(story),
        el("section", id="charts", class_="charts", aria_label="Charts"),
        sections.ranks(story),
        sections.layers(story),
        sections.parameters(story),
        sections.findings(story),
        last_pair,
        sections.advice_cards(advice) if not advice else None,
        el("footer", f"From the journals in {story.directory}. Last sign of life {clock(_last_seen(story))} UTC."),
    )
    return page(f"{story.identity.run} · gradmon report", main, {"charts": charts_of(story), "marks": marks_of(story)})


def _last_seen(story: Story) -> float:
    return max(rank.beat_seconds for rank in story.ranks)


def report_text(story: Story, advice: Sequence[Advice]) -> str:
    """The same in a few lines, for a console."""
    identity = story.identity
    lines = [f"{identity.run} ({identity.script}, {identity.topology}, instance {identity.instance})", ""]
    lines += _wrapped(verdict(story).text)
    for note in sections.notes_of(story):
        lines += _wrapped(note, "  note: ")
    episodes = sorted((*story.episodes, *story.findings), key=lambda one: (one.attempt, one.first_step))
    if episodes:
        lines += ["", "What happened"]
    for one in episodes[:_TEXT_EPISODES]:
        how = f" [{done(one)}]" if one.count > 1 else ""  # the message of a single one says it
        lines += _wrapped(episode_text(one) + how, f"  step {one.first_step:,}: ")
    if len(episodes) > _TEXT_EPISODES:
        lines.append(f"  and {len(episodes) - _TEXT_EPISODES} more (the HTML report has them)")
    unwell = [r for r in story.ranks if r.state not in ("finished", "running") and not stopped_by_gradmon(r.end_detail)]
    for rank in unwell[:4]:
        lines += _wrapped(f"{rank.state} {rank.end_detail[:300]}", f"  rank {rank.rank}: ")
    did = what_was_done(story)
    lines += ["", "What gradmon did", *_wrapped(did or why_nothing_done(story), "  ")]
    if story.best_bundle is not None:
        lines += ["", "See it again", f"  {replay_command(story, story.best_bundle)}"]
        lines += _wrapped(hint, "  ") if (hint := factory_hint(story)) else []
    if advice:
        lines += ["", "Advice"]
    for rule in advice[:_TEXT_ADVICE]:
        lines += _wrapped(f"{rule.rule}: {rule.evidence}", "  ")
        for cure in rule.cures[:_TEXT_CURES]:
            lines += _wrapped(cure, "    - ")
    if len(advice) > _TEXT_ADVICE:
        others = ", ".join(rule.rule for rule in advice[_TEXT_ADVICE:])
        lines += _wrapped(f"and {others} (the HTML report has them)", "  ")
    return "".join(f"{_printable(line)}\n" for line in lines)


def _wrapped(text: str, first: str = "") -> list[str]:
    rest = " " * len(first)
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    ) or [first]


def _printable(line: str) -> str:
    """A message is not trusted: it must not move the cursor or change the colours of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in line)
