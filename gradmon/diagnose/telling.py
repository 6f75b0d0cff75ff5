"""A story in words: the verdict, what happened first, what was done. Plain text; whoever shows it escapes it."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from gradmon.diagnose.gather import Bundle
from gradmon.diagnose.story import STOPPED, Episode, Incident, RankStory, Story

#: How good or bad what is told is.
Look = Literal["ok", "warn", "bad", "calm"]

#: What stands for a number that is not there.
_NONE = "-"
#: action -> what was done, to many steps or several times.
_DONE = {
    "rescale": "rescaled {n}",
    "skip": "skipped {n}",
    "leave_out": "left a bad rank out of {n}",
}
_TIMES = {
    "backoff": "lowered the learning rate {n}",
    "rollback": "rolled back {n}",
}
_EVENT_DONE = {
    "none": ("noted", "noted"),
    "rescale": ("rescaled", "would rescale"),
    "skip": ("skipped", "would skip"),
    "leave_out": ("rank left out", "would leave out"),
    "backoff": ("rate lowered", "would lower the rate"),
    "rollback": ("rolled back", "would roll back"),
    "stop": ("stopped", "would stop"),
}
_PLURAL = {
    "spike": "spikes",
    "nonfinite": "non-finite steps",
    "left_out": "steps without a bad rank",
    "scaler_skip": "GradScaler skips",
    "spike_streak": "streaks of spikes",
    "skip_streak": "streaks of skips",
    "scaler_streak": "streaks of GradScaler skips",
    "left_out_streak": "streaks of a left-out rank",
}
#: In what torch's backends raise where the other side is no longer there.
_LOST_PEER = (
    "Connection reset",
    "Connection closed",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
    "Socket closed",
)
#: Stands for what only the user knows, in a command that is otherwise ready to be run.
FACTORY = "FACTORY"
NO_MODULE = f"MODULE:{FACTORY}"
_DEMO = "gradmon.demo.train"
#: What starts a script or a notebook, and is not its module.
_STARTERS = ("__main__", "ipykernel_launcher", "python", "python3", "pytest")
_ENDS = {
    "finished": "finished",
    "exception": "ended with an exception",
    "crashed": "ended without a word (killed?)",
    "stuck": "is stuck: alive, but without a heartbeat",
    "busy": "lives and makes no step",
    "running": "is running",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The story in one or two sentences."""

    look: Look
    text: str


def number(value: float | None) -> str:
    """Three significant digits; very large and small ones as 1.2e5."""
    if value is None or math.isnan(value):
        return _NONE
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{float(f'{value:.3g}'):g}"


def whole(value: float | None) -> str:
    """With separators: 12,345."""
    return _NONE if value is None or not math.isfinite(value) else f"{round(value):,}"


def seconds(value: float | None) -> str:
    """In the unit that fits."""
    if value is None or not math.isfinite(value):
        return _NONE
    for limit, size, unit in ((0.9995, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if abs(value) < limit:
            return f"{number(value / size)} {unit}" if size <= 1 else f"{value / size:.0f} {unit}"
    return f"{value / 86400:.0f} days"


def size(value: float | None) -> str:
    """Bytes in the unit that fits."""
    if value is None or not math.isfinite(value):
        return _NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def percent(value: float | None) -> str:
    """A ratio, as a share of a hundred."""
    return _NONE if value is None or not math.isfinite(value) else f"{number(100 * value)} %"


def clock(unix: float) -> str:
    """In UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix))


def count_of(count: int, one: str, many: str | None = None) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def rank_list(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0 to 7`, `ranks 1, 2, 5 and 12 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    shown = [str(rank) for rank in ranks[:5]]
    return f"ranks {listed(shown if len(ranks) <= 5 else [*shown, f'{len(ranks) - 5} more'])}"


def factory_of(script: str) -> tuple[str, str]:
    """From the script of a run to what makes its model.

    Returns:
        (directory in which its module can be imported, "" for any; `train:FACTORY` for `--model`, `MODULE:FACTORY`
        where the module can't be told).
    """
    if script == _DEMO:
        return "", f"{_DEMO}:Model"
    path = PurePath(script)
    if path.suffix == ".py" and re.fullmatch(r"\w[\w-]*", path.stem) and path.stem not in _STARTERS:
        return "" if path.parent == PurePath() else str(path.parent), f"{path.stem}:{FACTORY}"
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", script) and script not in _STARTERS:  # as after `python -m`
        return "", f"{script}:{FACTORY}"
    return "", NO_MODULE


def replay_command(story: Story, bundle: Bundle) -> str:
    """What to run to see an incident again, ready but for FACTORY."""
    directory, factory = factory_of(story.identity.script)
    there = f"cd {shlex.quote(directory)} && " if directory else ""
    return f"{there}gradmon replay {shlex.quote(str(bundle.path))} --model {factory}"


def factory_hint(story: Story) -> str:
    """What to put in the place of FACTORY; empty where nothing is left to be put in."""
    factory = factory_of(story.identity.script)[1]
    what = "the function or class in {} that makes the model, called without arguments"
    if factory == NO_MODULE:
        return f"{NO_MODULE}: a module that can be imported, and {what.format('it')}"
    if not factory.endswith(f":{FACTORY}"):
        return ""
    return f"{FACTORY}: {what.format(PurePath(story.identity.script).name)}"


def verdict(story: Story) -> Verdict:
    """What happened, in one or two sentences."""
    parts = [_ran(story)]
    if not _all_said_by_stop(story):
        parts.append(_broke(story) if story.incidents else _calm(story))
    sentences = ["; ".join([*parts, *filter(None, [what_was_done(story, end=False)])])]
    nonfinite = story.nonfinite_losses
    if nonfinite and not story.incidents:
        sentences.append(f"The loss was not finite in {count_of(nonfinite, 'step')}")
    return Verdict(_look(story), ". ".join(sentences) + ".")


def _look(story: Story) -> Look:
    if story.state in ("exception", "crashed", "stuck") or any(a == "stop" for a, _, did in story.actions if did):
        return "bad"
    if story.incidents or story.findings or story.nonfinite_losses or story.episodes:
        return "warn"
    return "ok"


def _ran(story: Story) -> str:
    steps = len(story.history) and story.history.steps[-1]
    first = story.history.steps[0] if steps else 0
    ran = f"Training ran {count_of(steps, 'step')}" if steps else "Training made no step"
    if first > 1:
        ran = f"Training ran steps {first:,} to {steps:,}"
    ran += f" on {count_of(story.identity.world_size, 'rank')}"
    if len(story.attempts) > 1:
        ran += f" in {count_of(len(story.attempts), 'attempt')}"
    return f"{ran}{' and' if story.stop is None else ';'} {how_it_ended(story)}"


def stopped_by_gradmon(end_detail: str) -> bool:
    """True for what a rank raises because gradmon ends the run: the reason is an event's."""
    return end_detail.startswith(STOPPED)


def _streak(story: Story) -> list[Incident]:
    """The non-finite steps in a row for which gradmon ended the run, oldest first."""
    stop = story.stop
    found: list[Incident] = []
    if stop is None or stop.kind != "skip_streak":
        return found
    for one in reversed([one for one in story.incidents if one.attempt == stop.attempt and one.step <= stop.last_step]):
        if one.reason == "spike" or one.step != stop.last_step - len(found):
            break
        found.append(one)
    return found[::-1]


def _all_said_by_stop(story: Story) -> bool:
    """True if there were no incidents beside those that `how_it_ended` tells of."""
    streak = _streak(story)
    return bool(streak) and len(streak) == len(story.incidents)


def _how_gradmon_stopped(story: Story, stop: Episode) -> str:
    whom = "all ranks" if story.identity.world_size > 1 else "it"
    stopped = f"gradmon stopped {whom} at step {stop.last_step:,}"
    streak = _streak(story)
    if not streak:
        return f"{stopped}: {shortened(re.sub(': stopping( all ranks)?$', '', stop.message))}"
    first = streak[0]
    rank = "" if first.rank is None or story.identity.world_size == 1 else f"rank {first.rank}"
    where = ", ".join(filter(None, [rank, first.parameter]))
    count = count_of(len(streak), "non-finite step")
    return f"{stopped}, after {count} from step {first.step:,} on{f' ({where})' if where else ''}"


def how_it_ended(story: Story) -> str:
    """`finished`, or who ended how."""
    state = story.state
    if story.stop is not None:
        return _how_gradmon_stopped(story, story.stop)
    if state in ("finished", "running"):
        return _ENDS[state]
    who = sorted((rank for rank in story.ranks if rank.state == state), key=lambda rank: (rank.beat_seconds, rank.rank))
    name = "" if len(story.ranks) == 1 else f"{rank_list(sorted(rank.rank for rank in who))} "
    if state == "exception":
        if killed := _killed_before(story, who[0]):
            return killed
        other = f" (and {count_of(len(who) - 1, 'more rank')})" if len(who) > 1 else ""
        return f"{rank_name(story, who[0])}ended with {shortened(who[0].end_detail) or 'an exception'}{other}"
    verb = {"stuck": "is stuck, alive but without a heartbeat", "busy": "lives and makes no step"}.get(state, "")
    return f"{name}{verb}" if verb else f"{name}ended without a word (killed?)"


def lost_peer(message: str) -> bool:
    """True for what a rank raises because another one has gone: it is not where the run broke."""
    return any(words in message for words in _LOST_PEER)


def _killed_before(story: Story, raised: RankStory) -> str:
    """Where ranks ended without a word, and the first exception only says that they had gone."""
    killed = sorted(rank.rank for rank in story.ranks if rank.state == "crashed")
    if not killed or not lost_peer(raised.end_detail):
        return ""
    return (
        f"{rank_list(killed)} ended without a word (killed?), and rank {raised.rank} with the connection that it lost"
    )


def rank_name(story: Story, rank: RankStory) -> str:
    """`rank 3 `, nothing where there is only one."""
    return "" if len(story.ranks) == 1 else f"rank {rank.rank} "


def shortened(text: str, most: int = 160) -> str:
    """The first line, not endless."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _calm(story: Story) -> str:
    if not len(story.history):
        return "nothing was measured"
    if story.episodes:
        return f"no step was unfit to be applied, but {shortened(story.episodes[0].message)}"
    return "all gradients were healthy"


def _broke(story: Story) -> str:
    first = story.first_nonfinite
    if first is not None:
        where = f"{place(story, first)}{_how(first)}{_more(story, first)}"
        before = story.incidents.index(first)
        if before:
            spiked = f"spiked from step {story.incidents[0].step:,} ({count_of(before, 'spike')})"
            return f"gradients {spiked}, not finite from step {first.step:,}{where}"
        return f"gradients broke first at step {first.step:,}{where}"
    spike = story.incidents[0]
    where = f"step {spike.step:,}{place(story, spike)}: norm {number(spike.norm)}, limit {number(spike.limit)}"
    return f"no gradient was NaN or Inf; the first spike came at {where}{_more(story, spike)}"


def place(story: Story, incident: Incident) -> str:
    """` on rank 1, blocks.2.mlp.weight`; ` in blocks.2.mlp.weight` where there is one rank, or none to blame."""
    where = ""
    if story.identity.world_size > 1:
        where = " on all ranks" if incident.everywhere else "" if incident.rank is None else f" on rank {incident.rank}"
    if incident.parameter is None:
        return where
    return f"{where}, {incident.parameter}" if where else f" in {incident.parameter}"


def _how(incident: Incident) -> str:
    kinds = [name for name, n in (("NaN", incident.nan_count), ("Inf", incident.inf_count)) if n]
    parts = [" and ".join(kinds)] if kinds else []
    if incident.micro_step is not None:
        parts.append(f"in backward {incident.micro_step}")
    return f" ({' '.join(parts)})" if parts else ""


def _more(story: Story, first: Incident) -> str:
    """What came after it."""
    later = len(story.incidents) - story.incidents.index(first) - 1
    return f", before {count_of(later, 'more incident')}" if later else ""


def what_was_done(story: Story, *, end: bool = True) -> str:
    """`gradmon skipped 4 steps and rescaled 2`, or what it would have done; empty if there was nothing to do.

    Args:
        story: of the run.
        end: whether to say that gradmon ended the run; False where `how_it_ended` says so.
    """
    did, would = (_said(story, applied=applied, end=end or story.stop is None) for applied in (True, False))
    if did:
        return f"gradmon {listed(did)}" + (f" (and would have {listed(would)} where it only watched)" if would else "")
    if would:
        return f"gradmon only watched, and would have {listed(would)}"
    return ""


def _said(story: Story, *, applied: bool, end: bool) -> list[str]:
    parts: list[str] = []
    for action, words in _DONE.items():
        n = story.done(action, applied=applied)
        if n:
            parts.append(words.format(n=count_of(n, "step") if not parts else f"{n:,}"))
    for action, words in _TIMES.items():
        n = story.done(action, applied=applied)
        if n:
            parts.append(words.format(n={1: "once", 2: "twice"}.get(n, f"{n:,} times")))
    if end and story.done("stop", applied=applied):
        parts.append("stopped all ranks" if story.identity.world_size > 1 else "stopped the run")
    return parts


def why_nothing_done(story: Story) -> str:
    """For a run in which gradmon did nothing."""
    if _look(story) == "ok":
        return "nothing: nothing was needed"
    return "nothing: no step was unfit to be applied; what else was seen is for a person to act on"


def done(episode: Episode) -> str:
    """What was done about it: `skipped`, `4 skipped, 2 rescaled`."""
    parts = []
    for (action, applied), n in episode.done:
        word = _EVENT_DONE.get(action, (action, f"would {action}"))[0 if applied or action == "none" else 1]
        parts.append(word if len(episode.done) == 1 else f"{n:,} {word}")
    return ", ".join(parts)


def episode_text(episode: Episode) -> str:
    """One event as it was told; many as one sentence."""
    if episode.count == 1:
        return episode.message
    span = f"steps {episode.first_step:,} to {episode.last_step:,}"
    if episode.kind not in _PLURAL:
        return f"{episode.message} (and {episode.count - 1:,} more until step {episode.last_step:,})"
    text = f"{episode.count:,} {_PLURAL[episode.kind]}, {span}"
    named = [(rank, n) for rank, n in episode.ranks if rank is not None]
    if named:
        shown = [f"rank {rank} ({n:,})" if len(named) > 1 else f"rank {rank}" for rank, n in named[:2]]
        text += f", on {listed(shown)}" if len(named) < 3 else f", on {len(named)} ranks, most on {shown[0]}"
    parameters = [(name, n) for name, n in episode.parameters if name is not None]
    if parameters:
        text += f", {'mostly ' if len(parameters) > 1 else ''}{parameters[0][0]}"
    return text + (f"; largest norm {number(episode.largest_norm)}" if episode.largest_norm is not None else "")
