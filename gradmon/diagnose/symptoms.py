"""What a story shows: one function per symptom, which gives the evidence in numbers, or "" where it is not seen. Pure.

Thresholds that SageMaker Debugger has too are named with its rule; the others are those of gradmon's own detector and
policy, or were chosen so that a healthy run stays quiet.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from gradmon.diagnose.story import Incident, RankStory, Story
from gradmon.diagnose.telling import (
    count_of,
    lost_peer,
    number,
    percent,
    place,
    rank_list,
    seconds,
    shortened,
    size,
    stopped_by_gradmon,
)

#: Share of the incidents that one rank, or one parameter, must have to be the one.
_MOSTLY = 0.8
_LEAST_INCIDENTS = 3
_EARLY_STEPS = 200
#: In a run that is not much longer nearly all steps are early ones.
_LONG_ENOUGH = 2 * _EARLY_STEPS
#: A shorter wait is not worth a DataLoader of its own processes.
_LEAST_WAIT_SECONDS = 0.005
#: GradScaler's search for its scale skips a few steps at the start, and one in 2,000 later on.
_SCALER_SEARCH = 50
_SCALER_SKIPS = 10
#: SageMaker Debugger, VanishingGradient: mean |gradient| below 1e-7.
_VANISHED = 1e-7
_BLOCKS = 10
#: What the data watch tells of, beside class_imbalance.
_INPUT_KINDS = (
    "data_nonfinite",
    "data_range",
    "data_constant",
    "data_duplicate",
    "token_share",
    "labels_out_of_range",
)
_LEAST_STEPS = 200


def one_bad_rank(story: Story) -> str:
    """Most non-finite steps come from one rank of several."""
    broken = _nonfinite(story)
    named = [one.rank for one in broken if one.rank is not None]
    if story.identity.world_size < 2 or len(named) < _LEAST_INCIDENTS:
        return ""
    rank, count = Counter(named).most_common(1)[0]
    if count < _MOSTLY * len(broken):
        return ""
    host = next((r.identity.host for r in story.ranks if r.rank == rank), "")
    return f"rank {rank}{f' on {host}' if host else ''} caused {count:,} of {count_of(len(broken), 'non-finite step')}"


def one_bad_batch(story: Story) -> str:
    """A few single steps were not finite, and the steps around them were: on one rank, or on all of them."""
    broken = _nonfinite(story)
    if not broken or one_bad_rank(story) or broken_for_good(story):
        return ""
    places = {place(story, one) for one in broken}
    each = len(places) > 1
    steps = ", ".join(f"{one.step:,}{place(story, one) if each else ''}" for one in broken[:3])
    more = f" and {len(broken) - 3:,} more" if len(broken) > 3 else ""
    where = "" if each else next(iter(places))
    after = ", healthy steps after them" if broken[-1].step < story.history.steps[-1] else ""
    alike = sum(one.everywhere for one in broken)
    code = ""
    if alike and story.identity.world_size > 1:
        which = "" if alike == len(broken) else f"in {alike:,} of them "
        code = f"; {which}all ranks broke at once: more likely the code than the data"
    return f"{count_of(len(broken), 'step')} not finite (step {steps}{more}{where}){after}{code}"


def broken_for_good(story: Story) -> str:
    """Ten non-finite steps in a row, or as many as gradmon stops for; or moments that are not finite."""
    longest, last = _longest_streak([(one.attempt, one.step) for one in _nonfinite(story)])
    if longest < 10 and not (longest and story.stop is not None and story.stop.kind == "skip_streak"):
        return _told(story, "moments_nonfinite")
    alike = sum(one.everywhere for one in _nonfinite(story)) if story.identity.world_size > 1 else 0
    all_ranks = f"; in {alike:,} of them all ranks broke alike, as when the weights themselves are NaN" if alike else ""
    return f"{count_of(longest, 'step')} in a row not finite, up to step {last:,}{all_ranks}"


def scaler_overflow(story: Story) -> str:
    """The GradScaler skips in a row, or again and again after its search."""
    late = [step for step in story.scaler_skips if step > _SCALER_SEARCH]
    streak, last = _longest_streak([(0, step) for step in story.scaler_skips])
    steps = len(story.history)
    if streak >= _SCALER_SKIPS:
        return f"the GradScaler skipped {streak:,} steps in a row, up to step {last:,}{_scale(story)}"
    if len(late) > max(_SCALER_SKIPS, 0.01 * steps):
        share = percent(len(late) / max(1, steps))
        return f"the GradScaler skipped {len(late):,} steps after its search ({share} of all){_scale(story)}"
    return ""


def explodes_early(story: Story) -> str:
    """Three spikes or more, half of all within the first 200 steps of a longer run; NaN has causes of its own."""
    found = [one for one in story.incidents if one.reason == "spike"]
    early = [one for one in found if one.step <= _EARLY_STEPS]
    if len(early) < _LEAST_INCIDENTS or len(early) < 0.5 * len(found) or story.history.steps[-1] < _LONG_ENOUGH:
        return ""
    if one_bad_rank(story) or one_bad_batch(story) or broken_for_good(story):
        return ""
    worst = max((one.norm for one in early if math.isfinite(one.norm)), default=math.nan)
    norm = f", largest norm {number(worst)}" if math.isfinite(worst) else ""
    of_all = f"{len(early):,} of {count_of(len(found), 'spike')}"
    return f"{of_all} within the first {_EARLY_STEPS} of {story.history.steps[-1]:,} steps{norm}"


def spikes(story: Story) -> str:
    """Spikes in a row, a back-off, or more than one spike in a thousand steps."""
    found = [one for one in story.incidents if one.reason == "spike"]
    backoffs = story.done("backoff") + story.done("backoff", applied=False)
    if not backoffs and len(found) < max(_LEAST_INCIDENTS, 0.001 * len(story.history)):
        return ""
    worst = max((one.norm / one.limit for one in found if one.limit and math.isfinite(one.norm)), default=math.nan)
    streak, _ = _longest_streak([(one.attempt, one.step) for one in found])
    parts = [count_of(len(found), "spike"), f"up to {streak} in a row"]
    if math.isfinite(worst):
        parts.append(f"up to {number(worst)} times the limit")
    if backoffs:
        parts.append(f"{count_of(backoffs, 'back-off')} of the learning rate")
    return ", ".join(parts)


def one_parameter(story: Story) -> str:
    """Most spikes have their largest gradient in one parameter."""
    named = [one.parameter for one in story.incidents if one.reason == "spike" and one.parameter is not None]
    if len(named) < _LEAST_INCIDENTS:
        return ""
    name, count = Counter(named).most_common(1)[0]
    if count < _MOSTLY * len(named) or len(story.parameters) == 1:
        return ""
    share = next((p.norm_ratio for p in story.parameters if p.name == name), None)
    usual = "" if share is None else f"; it holds {percent(share)} of the squared norm in the newest measurement"
    return f"{name} holds the largest gradient in {count:,} of {count_of(len(named), 'spike')}{usual}"


def drift(story: Story) -> str:
    """The norms drifted up, or the run was rolled back."""
    return _told(story, "drift", "diverging")


def vanished(story: Story) -> str:
    """A vanish event, gradients of exactly 0, or a norm that says mean |g| < 1e-7."""
    told = _told(story, "vanish", "gradients_tiny")
    if told:
        return told
    norms = _finite(story.history.column("grad_norm")[-16:])
    elements = sum(parameter.elements for parameter in story.parameters)
    if len(norms) < 16 or not elements:
        return ""
    mean = median(norms) / math.sqrt(elements)
    return f"root mean square of the gradient {number(mean)} over the last 16 steps" if mean < _VANISHED else ""


def dead_units(story: Story) -> str:
    """Weights whose gradient is 0 in more than half of their elements (rows of dead units), or altogether."""
    told = _told(story, "gradients_zero")
    dead = [
        parameter
        for parameter in story.parameters
        if parameter.zero_ratio is not None
        and parameter.zero_ratio > 0.5
        and parameter.elements >= 256
        # of an embedding only the rows of tokens that came up have a gradient
        and not any(word in parameter.name for word in ("emb", "wte", "token"))
    ]
    if not dead:
        return told
    worst = max(dead, key=lambda parameter: parameter.zero_ratio or 0.0)
    more = f" and {count_of(len(dead) - 1, 'more parameter')}" if len(dead) > 1 else ""
    return f"{worst.name}: {percent(worst.zero_ratio)} of the gradient is exactly 0{more}"


def frozen(story: Story) -> str:
    """Parameters that never had a gradient, or did not change."""
    told = _told(story, "weights_unchanged")
    without = [parameter.name for parameter in story.parameters if not parameter.has_gradient]
    if without:
        return f"{count_of(len(without), 'parameter')} without a gradient in any measurement ({shortened(without[0])})"
    return told


def updates_too_large(story: Story) -> str:
    """Updates of more than a tenth of the weights, late in the run."""
    told = _told(story, "update_large")
    ratios = _finite(story.history.column("update_ratio"))
    late = ratios[len(ratios) // 4 :][-20:]
    if len(late) >= 3 and median(late) > 0.1:
        return f"a step moves the weights by {percent(median(late))} of their norm (usual: 0.1 %)"
    return told


def updates_too_small(story: Story) -> str:
    """Updates below 1e-7 of the weights."""
    told = _told(story, "update_small")
    ratios = _finite(story.history.column("update_ratio"))[-20:]
    if len(ratios) >= 3 and median(ratios) < 1e-7:
        return f"a step moves the weights by {number(median(ratios))} of their norm (usual: 1e-3)"
    return told


def replicas(story: Story) -> str:
    """Ranks whose weights differ."""
    return _told(story, "replicas")


def loss_flat(story: Story) -> str:
    """Told by the loss watch; or within 1 % of where it began, over 200 steps or more."""
    told = _told(story, "loss_flat")
    blocks = _loss_blocks(story) if story.history.steps[:1] == array("q", [1]) else []  # one that goes on is slow
    if not told and blocks and abs(blocks[-1] - blocks[0]) < 0.01 * abs(blocks[0]) and max(blocks) < 1.05 * blocks[0]:
        return f"the median loss was {number(blocks[0])} in the first tenth of the run and is {number(blocks[-1])} now"
    return told


def loss_rose(story: Story) -> str:
    """Told by the loss watch; or at the end 15 % above its best tenth."""
    told = _told(story, "loss_rising")
    blocks = _loss_blocks(story)
    if blocks and min(blocks) > 0 and blocks[-1] > 1.15 * min(blocks):
        best, last = min(blocks), blocks[-1]
        return f"the median loss of the last tenth is {number(last)}, {percent(last / best - 1)} above its best"
    return told


def loss_spikes(story: Story) -> str:
    """Told by the loss watch."""
    return _told(story, "loss_spike", "loss_outlier")


def loss_too_good(story: Story) -> str:
    """Told by the loss watch; or exactly constant, or below 1e-5."""
    told = _told(story, "loss_low", "loss_constant")
    losses = _losses(story)[-50:]
    if len(losses) == 50 and len(set(losses)) == 1:
        return f"the loss is exactly {number(losses[0])} in the last 50 steps"
    if len(losses) == 50 and 0 <= median(losses) < 1e-5:
        return f"the median loss of the last 50 steps is {number(median(losses))}"
    return told


def loss_not_finite(story: Story) -> str:
    """A loss that was NaN or Inf."""
    told = _told(story, "loss_nonfinite")
    if story.nonfinite_losses:
        return f"the loss was NaN or Inf in {count_of(story.nonfinite_losses, 'step')}"
    return told


def overfit(story: Story) -> str:
    """Told by the loss watch; or a validation loss 10 % above the training loss (SageMaker Debugger, Overfit: 0.1)."""
    told = _told(story, "overfit")
    losses = _losses(story)
    if story.validation_loss is None or len(losses) < _LEAST_STEPS:
        return told
    training = median(losses[-100:])
    if training > 0 and story.validation_loss > 1.1 * training:
        gap = percent(story.validation_loss / training - 1)
        return f"validation loss {number(story.validation_loss)}, training loss {number(training)}: a gap of {gap}"
    return told


def overtraining(story: Story) -> str:
    """Told by the loss watch."""
    return _told(story, "overtraining")


def bad_inputs(story: Story) -> str:
    """Told by the data watch."""
    return _told(story, *_INPUT_KINDS)


def imbalance(story: Story) -> str:
    """Told by the data watch."""
    return _told(story, "class_imbalance")


def always_clipped(story: Story) -> str:
    """clip.max_norm is in force in almost every step, and far below the norms."""
    steps, most = len(story.history), story.settings.get("clip.max_norm")
    if not most or steps < _LEAST_STEPS or story.max_norm_steps < 0.95 * steps:
        return ""
    usual = median(_finite(story.history.column("grad_norm")) or [0.0])
    if usual < 5 * most:
        return ""
    share = percent(story.max_norm_steps / steps)
    return f"{share} of the steps are clipped to {number(most)}; their usual norm is {number(usual)}"


def straggler(story: Story) -> str:
    """One rank's gradients are ready later than those of the others, by a tenth of a step or more."""
    shares = [(rank.busy_ratio, rank) for rank in story.ranks if rank.busy_ratio is not None]
    if len(shares) < 2 or len(story.history) < 20:
        return ""
    worst, rank = max(shares, key=lambda pair: pair[0])
    usual = median([share for share, other in shares if other is not rank])
    if worst < usual + 0.1:
        return ""
    lost = "" if rank.step_seconds is None else f", {seconds((worst - usual) * rank.step_seconds)} a step"
    where = f"rank {rank.rank} on {rank.identity.host}"
    return f"{where} computes for {percent(worst)} of a step, the others for {percent(usual)}: they wait for it{lost}"


def data_wait(story: Story) -> str:
    """A rank waits for its DataLoader for a tenth of its time or more, and for more than a moment."""
    waits = [(rank.data_wait_ratio, rank) for rank in story.ranks if rank.data_wait_ratio is not None]
    if not waits or len(story.history) < 20:
        return ""
    worst, rank = max(waits, key=lambda pair: pair[0])
    lost = worst * (rank.step_seconds or 0.0)
    if worst < 0.1 or lost < _LEAST_WAIT_SECONDS:
        return ""
    return f"rank {rank.rank} waits for its DataLoader for {percent(worst)} of a step, {seconds(lost)}"


def memory_grows(story: Story) -> str:
    """Memory that grows through the whole run, by a fifth or more after the first tenth."""
    for rank in story.ranks:
        held = _finite(rank.history.column("memory_bytes"))
        if len(held) < _LEAST_STEPS:
            continue
        blocks = _blocks(held[len(held) // _BLOCKS :])
        grows = sum(b > a for a, b in pairwise(blocks))
        if grows >= _BLOCKS - 2 and blocks[-1] > 1.2 * blocks[0] and blocks[-1] - blocks[0] > 64 << 20:
            return (
                f"rank {rank.rank} held {size(blocks[0])} after a tenth of the run, and {size(blocks[-1])} at its end"
            )
    return ""


def out_of_memory(story: Story) -> str:
    """An exception that says so."""
    return _ended_with(story, "out of memory", "OutOfMemory", "MemoryError")


def inplace(story: Story) -> str:
    """Autograd's own complaint."""
    return _ended_with(story, "modified by an inplace operation", "in-place operation", "is at version")


def killed(story: Story) -> str:
    """A rank whose journal has no end."""
    dead = [rank for rank in story.ranks if rank.state == "crashed"]
    if not dead:
        return ""
    first = min(dead, key=lambda rank: rank.beat_seconds)
    after = "before its first step" if first.last_step is None else f"after step {first.last_step:,}"
    memory = "" if first.memory_bytes is None else f", holding {size(first.memory_bytes)}"
    others = f" ({rank_list(sorted(rank.rank for rank in dead))} altogether)" if len(dead) > 1 else ""
    return f"rank {first.rank} on {first.identity.host} ended {after} without a word{memory}{others}"


def hung(story: Story) -> str:
    """Living ranks that make no steps, or that have no heartbeat."""
    still = [rank for rank in story.ranks if rank.state in ("stuck", "busy")]
    told = _ended_with(story, "timed out", "timeout", "Timeout")
    if not still:
        return told
    steps = sorted({rank.last_step or 0 for rank in story.ranks})
    apart = f"; ranks are between step {steps[0]:,} and {steps[-1]:,}" if len(steps) > 1 else ""
    return f"{rank_list(sorted(rank.rank for rank in still))} made no step any more{apart}"


def raised(story: Story) -> str:
    """An exception that no other rule knows."""
    if out_of_memory(story) or inplace(story) or hung(story):
        return ""
    told = _ended_with(story, "")
    return "" if killed(story) and lost_peer(told) else told  # they lost the rank that was killed


def dies_at_same_step(story: Story) -> str:
    """Two attempts or more that ended within a few steps of each other."""
    ends = [one.last_step for one in story.attempts if one.state in ("crashed", "exception") and one.last_step]
    if len(ends) < 2 or max(ends[-2:]) - min(ends[-2:]) > 2:
        return ""
    return f"attempts ended at steps {', '.join(f'{end:,}' for end in ends)}"


def only_watched(story: Story) -> str:
    """Incidents on which gradmon did not act."""
    would = sum(n for (_, reason, applied), n in story.actions.items() if not applied and reason != "max_norm")
    if not would:
        return ""
    identity = story.identity
    why = "mode: observe" if identity.mode == "observe" else f"topology {identity.topology}"
    return f"{count_of(would, 'action')} were due and not taken ({why})"


def own_errors(story: Story) -> str:
    """Failures of gradmon itself."""
    parts = ", ".join(f"{part} {count:,}" for part, count in sorted(story.errors.items()))
    return f"gradmon's own failures: {parts}" if parts else ""


def _nonfinite(story: Story) -> list[Incident]:
    return [one for one in story.incidents if one.reason != "spike"]


def _longest_streak(steps: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(how many in a row, the last of them)."""
    best, last, length = 0, 0, 0
    before: tuple[int, int] | None = None
    for attempt, step in steps:
        length = length + 1 if before == (attempt, step - 1) else 1
        before = attempt, step
        if length > best:
            best, last = length, step
    return best, last


def _scale(story: Story) -> str:
    scales = _finite(story.history.column("loss_scale"))
    return f"; loss scale {number(scales[-1])} at the end" if scales else ""


def _told(story: Story, *kinds: str) -> str:
    """The first event of these kinds, and how many."""
    found = [episode for episode in (*story.episodes, *story.findings) if episode.kind in kinds]
    if not found:
        return ""
    first = min(found, key=lambda episode: (episode.attempt, episode.first_step))
    count = sum(episode.count for episode in found)
    more = f" ({count_of(count - 1, 'more like it', 'more like it')})" if count > 1 else ""
    return f"step {first.first_step:,}: {shortened(first.message, 240)}{more}"


def _ended_with(story: Story, *words: str) -> str:
    ended: list[RankStory] = sorted(
        (rank for rank in story.ranks if rank.state == "exception" and not stopped_by_gradmon(rank.end_detail)),
        key=lambda rank: rank.beat_seconds,
    )
    for rank in ended:
        if any(word in rank.end_detail for word in words):
            after = "" if rank.last_step is None else f" after step {rank.last_step:,}"
            return f"rank {rank.rank} ended{after} with {shortened(rank.end_detail, 240) or 'an exception'}"
    return ""


def _losses(story: Story) -> list[float]:
    return _finite(story.losses[1])


def _loss_blocks(story: Story) -> list[float]:
    losses = _losses(story)
    return _blocks(losses) if len(losses) >= _LEAST_STEPS else []


def _blocks(values: Sequence[float]) -> list[float]:
    length = len(values) // _BLOCKS
    return [median(values[i * length : (i + 1) * length]) for i in range(_BLOCKS)]


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
