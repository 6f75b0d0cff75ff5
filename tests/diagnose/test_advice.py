"""The rule table: each rule speaks where its symptom is, with numbers, and a healthy run hears none of them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from journals import (
    WritingRank,
    detail,
    event,
    healthy,
    identity,
    kill_in_mid_write,
    nonfinite,
    profile,
    row,
    spike,
    troubled,
    write_run,
)

from gradmon.config import ClipConfig, Config
from gradmon.diagnose.advice import RULES, advice_table, advise
from gradmon.diagnose.story import read_story

STEPS = 300


def run(directory: Path, change: Callable = lambda rank, one: one, *, ranks=1, steps=STEPS, **options) -> None:
    """A healthy run in which `change` may replace a step, by another or by (step, events)."""
    usual = healthy()
    kept = {name: options.pop(name) for name in ("config", "sample") if name in options}
    end = options.pop("end", ("finished", ""))
    rows = options.pop("rows", None)
    count = options.pop("count", ())
    for number in range(ranks):
        rank = WritingRank(directory, identity(rank=number, world_size=ranks, **options), **kept)
        for step in range(1, steps + 1):
            changed = change(number, usual(number, step)[0])
            one, events = changed if isinstance(changed, tuple) else (changed, [])
            rank.step(one, *events, details=[detail(step, rows)] if rows and step % 50 == 0 else ())
        for name, labels in count:
            rank.writer.count(name, labels)
        rank.end(*(end if number == ranks - 1 else ("finished", "")))


def at(steps: range | tuple[int, ...], make: Callable) -> Callable:
    return lambda rank, one: make(rank, one.step) if one.step in steps else one


def told(kind: str, message="seen: 12 of it"):
    return lambda rank, one: (one, [event(one, message, kind=kind, action="none")]) if one.step == 150 else one


def with_loss(loss: Callable[[int], float]) -> Callable:
    def change(rank, one):
        value = loss(one.step)
        return dataclasses.replace(one, loss=value, mean_loss=value)

    return change


def fields(**changes) -> Callable:
    return lambda rank, one: dataclasses.replace(one, **changes)


def one_row(place: int, changed: list[float]) -> list[list[float]]:
    rows = profile(1.0)
    rows[place] = changed
    return rows


def noisy(level: Callable[[int], float]) -> Callable:
    rng = random.Random(3)
    return with_loss(lambda step: level(step) + 0.01 * rng.gauss(0, 1))


def twice(directory: Path) -> None:
    for attempt in (0, 1):
        run(directory, steps=100 + attempt, attempt=attempt, end=("exception", "ValueError: odd batch"))


def skipped_by_scaler(rank: int, step: int):
    return nonfinite(step, rank=None, here=False, reason="scaler_skip", loss_scale=2.0**-20)


ALWAYS_CLIPPED = Config(clip=ClipConfig(max_norm=0.01)).to_dict()

#: Rule -> a run that shows its symptom.
CASES: dict[str, Callable[[Path], object]] = {
    "one bad rank": lambda d: write_run(d, troubled(), ranks=2, steps=540),
    "NaN from one batch": lambda d: run(d, at((120,), lambda r, s: nonfinite(s, rank=0, here=True))),
    "broken for good": lambda d: run(d, at(range(270, 290), lambda r, s: nonfinite(s, rank=None, here=True))),
    "fp16 overflow": lambda d: run(d, at(range(100, 112), skipped_by_scaler)),
    "explodes early": lambda d: run(d, at((12, 20, 31), lambda r, s: spike(s, rank=None)), steps=500),
    "spikes": lambda d: run(d, at(range(250, 254), lambda r, s: spike(s))),
    "one parameter explodes": lambda d: run(d, at((220, 240, 260, 280), lambda r, s: spike(s))),
    "norms drift up": lambda d: run(d, told("drift")),
    "vanished gradients": lambda d: run(d, fields(grad_norm=1e-9), rows=profile(1e-9)),
    "dead units": lambda d: run(d, rows=one_row(4, row(0.1, zero_count=4000.0))),
    "frozen parameters": lambda d: run(d, rows=one_row(5, [math.nan] * 8)),
    "updates too large": lambda d: run(d, fields(update_ratio=0.4)),
    "updates too small": lambda d: run(d, fields(update_ratio=1e-9)),
    "replicas diverged": lambda d: run(d, told("replicas"), ranks=2),
    "always clipped": lambda d: run(d, fields(reason="max_norm", action="rescale"), config=ALWAYS_CLIPPED),
    "loss not finite": lambda d: run(d, with_loss(lambda s: math.nan if s == 99 else 2.0 / s)),
    "loss does not fall": lambda d: run(d, noisy(lambda s: 2.3)),
    "loss rises": lambda d: run(d, noisy(lambda s: 1 + abs(s - 150) / 100)),
    "loss spikes": lambda d: run(d, told("loss_spike")),
    "loss too good": lambda d: run(d, with_loss(lambda s: max(0.0, 2.0 - s / 100))),
    "overfit": lambda d: run(d, sample={"resident_memory_bytes": 1e9, "validation_loss": 2.9}),
    "overtraining": lambda d: run(d, told("overtraining")),
    "bad inputs": lambda d: run(d, told("data_range")),
    "class imbalance": lambda d: run(d, told("class_imbalance")),
    "in-place change": lambda d: run(
        d,
        end=(
            "exception",
            "RuntimeError: one of the variables needed for gradient computation has been modified by an inplace "
            "operation: [torch.FloatTensor [64, 64]], which is output 0 of ReluBackward0, is at version 2",
        ),
    ),
    "out of memory": lambda d: run(d, end=("exception", "OutOfMemoryError: CUDA out of memory")),
    "memory grows": lambda d: run(d, lambda r, one: dataclasses.replace(one, memory_bytes=(one.step + 99) << 23)),
    "killed": lambda d: kill_in_mid_write(d, after=50),
    "hang": lambda d: run(d, end=("exception", "DistBackendError: ALLREDUCE timed out after 600 s"), ranks=2),
    "exception": lambda d: run(d, end=("exception", "ValueError: expected 3 channels, got 4")),
    "dies at the same step": twice,
    "straggler": lambda d: run(
        d, lambda r, one: dataclasses.replace(one, busy_seconds=0.11 if r == 1 else 0.07), ranks=3, steps=60
    ),
    "data wait": lambda d: run(d, fields(data_wait_seconds=0.05)),
    "only watched": lambda d: run(
        d, at((120,), lambda r, s: nonfinite(s, rank=0, here=True, applied=False)), mode="observe"
    ),
    "gradmon's own failures": lambda d: run(d, count=[("gradmon_errors_total", ("journal",))]),
}  # fmt: skip


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_each_rule_speaks_where_its_symptom_is(tmp_path, rule):
    CASES[rule](tmp_path)
    found = {advice.rule: advice for advice in advise(read_story(tmp_path))}
    assert rule in found
    assert any(c.isdigit() for c in found[rule].evidence)
    assert found[rule].causes
    assert found[rule].cures


@pytest.mark.parametrize(("ranks", "steps", "seed"), [(1, 3, 0), (1, 300, 1), (1, 3000, 2), (4, 400, 3)])
def test_a_healthy_run_is_left_in_peace(tmp_path, ranks, steps, seed):
    write_run(tmp_path, healthy(seed), ranks=ranks, steps=steps)
    story = read_story(tmp_path)
    assert len(story.history) == steps
    assert advise(story) == []


def test_a_few_steps_of_search_by_a_scaler_are_no_reason(tmp_path):
    run(tmp_path, at((1, 2, 3, 250), skipped_by_scaler))
    story = read_story(tmp_path)
    assert len(story.scaler_skips) == 4
    assert advise(story) == []


def test_a_lone_spike_is_no_reason(tmp_path):
    run(tmp_path, at((250,), lambda r, s: spike(s)))
    story = read_story(tmp_path)
    assert len(story.incidents) == 1
    assert advise(story) == []


def test_urgent_advice_comes_first_and_points_to_the_command(tmp_path):
    write_run(tmp_path, troubled(), ranks=2, steps=700)
    bundle = tmp_path / "gpt-small/i1/0/rank-00001-step-0000120.bundle"
    bundle.touch()
    advice = advise(read_story(tmp_path))
    assert [one.rule for one in advice] == ["one bad rank", "spikes", "one parameter explodes"]
    assert advice[0].urgent
    assert advice[0].evidence == "rank 1 on node-a caused 4 of 4 non-finite steps"
    assert advice[0].cures[0].startswith("replay it (above): reproduced means the data or the code")
    bundle.unlink()
    assert advise(read_story(tmp_path))[0].cures[0].startswith("no incident's bundle lies here")


def test_the_table_names_what_practitioners_do():
    table = advice_table()
    lines = table.splitlines()
    assert len(lines) == 2 + len(RULES)
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
    assert len({rule.name for rule in RULES}) == len(RULES)
    by_name = {rule.name: " ".join((*rule.causes, *rule.cures)) for rule in RULES}
    for rule, remedies in {
        "spikes": ("lower the learning rate", "and watch", "clip", "simpler or shallower model", "weight decay"),
        "explodes early": ("warm", "clip", "Xavier", "He ", "doctor"),
        "vanished gradients": ("He initialisation", "Xavier", "LeakyReLU", "SELU", "simpler or shallower model"),
        "dead units": ("LeakyReLU", "SELU", "in-place ReLU", "reused tensor"),
        "in-place change": ("in-place ReLU", "reused tensor", "inplace=False"),
        "one parameter explodes": ("shared weights", "detach", "scale by"),
        "overfit": ("weight decay and dropout", "data augmentation", "early stopping", "simpler or shallower model"),
        "overtraining": ("early stopping",),
        "one bad rank": ("gradmon replay", "ECC", "swap the node"),
        "NaN from one batch": ("gradmon replay", "epsilon"),
        "fp16 overflow": ("bf16", "GradScaler"),
        "replicas diverged": ("non-deterministic", "same code"),
        "norms drift up": ("lower the learning rate", "weight decay"),
        "memory grows": ("loss.item()",),
        "out of memory": ("micro-batch",),
    }.items():
        for remedy in remedies:
            assert remedy in by_name[rule], rule
