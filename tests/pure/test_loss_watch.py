"""What the losses tell: each thing once, by name, and nothing of healthy ones."""

from __future__ import annotations

import collections
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradmon
from gradmon import loss_watch
from gradmon.config import Config, LossConfig, load
from gradmon.loss_watch import LossWatch, Stretches
from gradmon.record import Finding

NAN, INF = math.nan, math.inf
CATALOGUE = Path(gradmon.__file__).parent / "diagnose" / "CATALOGUE.md"
STEPS = 4000


def fed(
    losses: Sequence[float | None], watch: LossWatch | None = None, config: LossConfig | None = None, start: int = 1
) -> list[tuple[int, Finding]]:
    """(Step, finding) of a training with these losses."""
    watch = watch or LossWatch(config or LossConfig())
    return [
        (step, finding)
        for step, loss in enumerate(losses, start=start)
        for finding in watch.update(step, loss, None, None, True)
    ]


def rules(found: Sequence[tuple[int, Finding]]) -> list[str]:
    return [finding.rule for _, finding in found]


def noisy(level: float, count: int, seed: int = 0, noise: float = 0.05) -> list[float]:
    chance = random.Random(seed)
    return [level * math.exp(chance.gauss(0, noise)) for _ in range(count)]


# --- healthy ---------------------------------------------------------------------------------------------------------

#: Loss at step t of so many, with chance. The second value is how often `loss_flat` may be told: each ends on a plateau
#: or not.
CURVES: dict[str, tuple[Callable[[int, random.Random], float | None], int]] = {
    "decay": (lambda t, r: (2 + 8 * (1 + t / 30) ** -1.2) * math.exp(r.gauss(0, 0.05)), 1),
    "decay with much noise": (lambda t, r: (2 + 8 * (1 + t / 30) ** -1.2) * math.exp(r.gauss(0, 0.3)), 1),
    "batches of one": (lambda t, r: (0.5 + 2 / (1 + t / 100)) * r.expovariate(1), 1),
    "to nothing": (lambda t, r: 3 * math.exp(-t / 400 + r.gauss(0, 0.3)), 0),
    "learnt at once": (lambda t, r: 3 * math.exp(-t / 10 + r.gauss(0, 0.1)) + 1e-3 * math.exp(r.gauss(0, 0.3)), 1),
    "slow": (lambda t, r: (3 - 0.5 * t / STEPS) * math.exp(r.gauss(0, 0.05)), 0),
    "plateau": (lambda t, r: 2.3 * math.exp(r.gauss(0, 0.02)), 1),
    "GAN, negative": (lambda t, r: -0.5 + math.sin(t / 200) + r.gauss(0, 0.3), 0),
    "policy gradient": (lambda t, r: r.gauss(0, 0.1) - t / STEPS, 0),
    "two tasks in turn": (lambda t, r: (5 if r.random() < 0.5 else 0.1) * math.exp(r.gauss(0, 0.1)), 1),
    "a rare large task": (lambda t, r: (5 if r.random() < 0.15 else 0.1) * math.exp(r.gauss(0, 0.1)), 1),
    "observed sometimes": (lambda t, r: (2 + 8 / (1 + t / 30)) * math.exp(r.gauss(0, 0.05)) if t % 7 == 0 else None, 0),
    "hinge, often 0": (lambda t, r: max(0.0, r.gauss(0.2, 0.3)), 1),
    "sum over tokens": (lambda t, r: 1e6 * (2 + 8 / (1 + t / 30)) * math.exp(r.gauss(0, 0.05)), 1),
}


@pytest.mark.parametrize("name", CURVES)
def test_healthy_curves_are_left_alone(name: str) -> None:
    curve, flat = CURVES[name]
    for seed in range(3):
        chance = random.Random(seed)
        told = collections.Counter(rules(fed([curve(t, chance) for t in range(STEPS)])))
        assert told.pop("loss_flat", 0) <= flat
        assert not told


# --- each rule -------------------------------------------------------------------------------------------------------


def test_nan_is_told_once_names_its_ranks_and_leaves_no_trace() -> None:
    healthy = noisy(2.0, 600)
    watch, clean = LossWatch(LossConfig()), LossWatch(LossConfig())
    for step, loss in enumerate(healthy, start=1):
        assert not watch.update(step, loss, [loss] * 4, None, True)
        clean.update(step, loss, [loss] * 4, None, True)
    found = watch.update(601, NAN, [2.0, NAN, 2.0, INF], None, False)
    assert [(f.rule, f.where, f.severity) for f in found] == [("loss_nonfinite", "ranks 1, 3", "error")]
    assert "nan on ranks 1, 3" in found[0].message
    assert not watch.update(602, INF, None, None, False), "told once while it lasts"
    assert watch.state_dict()["window"] == clean.state_dict()["window"], "no NaN and no Inf has entered"
    assert not fed(noisy(2.0, 300, 1), watch, start=603)
    (again,) = watch.update(903, NAN, [NAN, NAN], None, False)
    assert again.where == ""
    assert "all ranks" in again.message


def test_spike_is_told_once_per_burst() -> None:
    losses = noisy(2.0, 200)
    limit = 2 * 1.5
    assert max(losses) < limit
    found = fed([*losses, *noisy(8.0, 20, 1), *noisy(2.0, 400, 2)])
    assert rules(found) == ["loss_spike"]
    ((step, finding),) = found
    assert step == 201
    assert finding.measured is not None and finding.threshold is not None
    assert finding.measured > finding.threshold >= limit * 0.95
    assert not fed([*losses, limit * 0.9, *losses])


def test_spike_needs_the_noise_to_stand_out_of() -> None:
    """The same loss is a spike in a calm run and none in a noisy one."""
    config = LossConfig(flat_steps=0)
    assert rules(fed([*noisy(2.0, 200), 5.0], config=config)) == ["loss_spike"]
    assert not fed([*noisy(2.0, 200, noise=0.4), 5.0], config=config)


def test_spike_is_found_in_negative_losses_too() -> None:
    chance = random.Random(0)
    losses = [chance.gauss(-1, 0.1) for _ in range(200)]
    assert rules(fed([*losses, 4.0])) == ["loss_spike"]
    assert not fed([*losses, -0.2])


def test_level_shift_is_relearned() -> None:
    """A spike after a lasting level shift is told again: nothing locks in."""
    config = LossConfig(flat_steps=0, rise=0)
    found = fed([*noisy(2.0, 200), *noisy(10.0, 400, 1), *noisy(40.0, 3, 2)], config=config)
    assert [(step, finding.rule) for step, finding in found] == [(201, "loss_spike"), (601, "loss_spike")]


def test_fall_and_floor() -> None:
    found = fed([*noisy(2.0, 200), *noisy(0.05, 50, 1)])
    assert [(step, f.rule) for step, f in found] == [(203, "loss_low")], "three in a row"
    assert "from 1.99 to 0.05" in found[0][1].message
    assert not fed([*noisy(2.0, 200), 0.05, 0.05, *noisy(2.0, 100, 1)]), "two are not enough"
    assert not fed([2 * 0.9**n for n in range(60)]), "a fall that has been going on is learning"
    floored = fed([1e-7 * (1 + n / 100) for n in range(40)])
    assert [(step, f.rule, f.threshold) for step, f in floored] == [(32, "loss_low", 1e-5)]
    assert not fed([-1e-7 * (1 + n / 100) for n in range(40)])


def test_constant() -> None:
    assert [(s, f.rule) for s, f in fed([math.log(10)] * 300)] == [(20, "loss_constant")]
    assert not fed([*[2.0] * 19, 2.1, *[2.0] * 19])
    watch = LossWatch(LossConfig())
    assert not [f for s in range(60) for f in watch.update(s, 2.0, None, None, False)], "steps that were skipped"


def test_flat_says_whether_it_ever_fell() -> None:
    never = fed(noisy(2.3, 3000))
    assert [(f.rule, f.severity) for _, f in never] == [("loss_flat", "warning")]
    assert 900 < never[0][0] <= 1000
    assert "has not fallen" in never[0][1].message
    fallen = fed([*(10 * math.exp(-t / 300) + 2 for t in range(2000)), *noisy(2.0, 3000)])
    assert [(f.rule, f.severity) for _, f in fallen] == [("loss_flat", "info")]
    again = fed([*noisy(2.3, 1500), *noisy(1.5, 1500)])
    assert rules(again) == ["loss_flat", "loss_flat"], "a new plateau"
    assert not fed(noisy(2.3, 3000), config=LossConfig(flat_steps=0))


def test_rising_above_the_best() -> None:
    found = fed([*noisy(2.0, 700), *(2 + t / 400 for t in range(800))])
    assert rules(found) == ["loss_rising"]
    ((step, finding),) = found
    assert 700 < step < 1000
    assert finding.measured is not None and finding.measured > 2.1


def test_rising_of_a_loss_that_has_learnt_nearly_all_is_no_matter() -> None:
    config = LossConfig(flat_steps=160)
    learnt = [*(5 * math.exp(-t / 20) + 0.001 for t in range(300)), *noisy(0.002, 300)]
    assert "loss_rising" not in rules(fed(learnt, config=config))


def ranks(step: int, losses: Sequence[float | None], watch: LossWatch) -> list[Finding]:
    known = [loss for loss in losses if loss is not None]
    return watch.update(step, sum(known) / len(known), losses, None, True)


def test_outlier_among_ranks() -> None:
    chance, watch, found = random.Random(0), LossWatch(LossConfig(rise=0)), []
    for step in range(1, 200):
        losses = [2 * math.exp(chance.gauss(0, 0.1)) for _ in range(8)]
        if step > 100:
            losses[5] *= 3
        found += [(step, f.rule, f.where) for f in ranks(step, losses, watch)]
    assert found == [(108, "loss_outlier", "rank 5")]


@pytest.mark.parametrize(("factor", "told"), [(3.0, ["rank 1"]), (1.5, []), (0.2, ["rank 0"])])
def test_of_two_ranks_the_higher_one_is_to_blame(factor: float, told: list[str]) -> None:
    watch = LossWatch(LossConfig())
    assert [f.where for step in range(40) for f in ranks(step, [2 + step % 3, (2 + step % 3) * factor], watch)] == told


def test_a_rank_that_stands_out_now_and_then_is_not_told() -> None:
    watch = LossWatch(LossConfig(spike_ratio=0))
    for step in range(400):
        losses: list[float | None] = [2.0 + (step + r) % 5 / 10 for r in range(4)]
        losses[2] = 9.0 if step % 3 == 0 else 2.0
        losses[3] = None
        assert not ranks(step, losses, watch)


def test_a_low_rank_among_many_and_very_many_ranks() -> None:
    chance, watch, found = random.Random(0), LossWatch(LossConfig(flat_steps=0)), []
    for step in range(1200):
        losses = [2 * math.exp(chance.gauss(0, 0.2)) for _ in range(200)]
        losses[77] = 0.1
        found += [f.where for f in ranks(step, losses, watch)]
    assert found == ["rank 77"]


def validated(values: Sequence[float], config: LossConfig | None = None) -> tuple[LossWatch, list[tuple[int, str]]]:
    """A training at loss 1, validated every 20 steps."""
    watch, found, losses = LossWatch(config or LossConfig()), [], noisy(1.0, 20 * len(values))
    for step, loss in enumerate(losses, start=1):
        validation = values[step // 20 - 1] if step % 20 == 0 else None
        found += [(step, f.rule) for f in watch.update(step, loss, None, validation, True)]
    return watch, found


def test_overfit_is_a_gap_that_no_longer_helps() -> None:
    assert validated([2.0, 1.8, 1.6, 1.5, 1.4, 1.35])[1] == [], "a gap, but it gets better"
    assert validated([1.05, 1.04, 1.06, 1.07, 1.06])[1] == [], "no gap"
    assert validated([1.3, 1.2, 1.25, 1.3, 1.35])[1] == [(100, "overfit")]


def test_overtraining_asks_for_an_end() -> None:
    watch, found = validated([1.0, 0.9, 0.895, 0.9, 0.899, 0.91])
    assert found == []
    assert not watch.should_stop, "four without a new best"
    watch, found = validated([1.0, 0.9, 0.895, 0.9, 0.899, 0.91, 0.9])
    assert found == [(140, "overtraining")]
    assert watch.should_stop
    assert "step 40" in watch.why_stop
    watch.update(141, 1.0, None, 0.8, True)
    assert not watch.should_stop, "a new best after all"
    never = validated([1.0] * 30, LossConfig(overtraining_patience=0))[0]
    assert not never.should_stop
    assert not LossWatch(LossConfig()).should_stop


def test_validation_that_is_not_finite() -> None:
    watch, found = validated([1.0, NAN, NAN, 0.9, NAN])
    assert found == [(40, "loss_nonfinite"), (100, "loss_nonfinite")]
    assert watch.state_dict()["best_validation"] == 0.9


OFF = LossConfig(
    nonfinite=False,
    spike_ratio=0,
    low_ratio=0,
    low_floor=0,
    flat_steps=0,
    rise=0,
    constant_steps=0,
    overfit_gap=0,
    overtraining_patience=0,
    outlier_ratio=0,
)


def all_wrong(config: LossConfig) -> set[str]:
    watch, told = LossWatch(config), set()
    losses = [*noisy(2.0, 1200), NAN, 20.0, *[1.0] * 40, *noisy(0.01, 400, 1), *noisy(3.0, 400, 2), *noisy(30.0, 9)]
    for step, loss in enumerate(losses):
        by_rank = [loss, loss, 3 * loss]
        told |= {f.rule for f in watch.update(step, loss, by_rank, 50.0 + step if step % 100 == 0 else None, True)}
    return told


def test_every_rule_can_be_switched_off() -> None:
    assert all_wrong(LossConfig()) == set(loss_watch.RULES), "all is wrong with it"
    assert all_wrong(OFF) == set()
    Config(loss=OFF)  # in range


# --- state -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([2.0, 2.1, 1.9, 2.2, 30.0, 0.01, NAN, INF, -1.0, None]), max_size=200), st.data())
def test_goes_on_from_its_state(losses: list[float | None], data: st.DataObject) -> None:
    """Also from JSON; whatever the losses are, nothing fails and every value is plain."""
    config = LossConfig(flat_steps=32, overtraining_patience=2)
    cut = data.draw(st.integers(0, len(losses)))
    whole, first, second = LossWatch(config), LossWatch(config), LossWatch(config)

    def feed(watch: LossWatch, begin: int, part: Sequence[float | None]) -> list[str]:
        return [
            str(finding)
            for step, loss in enumerate(part, start=begin)
            for finding in watch.update(step, loss, None if loss is None else [loss, 2.0], loss, step % 5 > 0)
        ]

    expected = feed(whole, 0, losses)
    found = feed(first, 0, losses[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert found + feed(second, cut, losses[cut:]) == expected
    assert second.why_stop == whole.why_stop


def test_rebaseline_forgets() -> None:
    watch = LossWatch(LossConfig())
    fed(noisy(2.0, 300), watch)
    watch.rebaseline()
    assert watch.state_dict() == LossWatch(LossConfig()).state_dict()
    assert not fed(noisy(20.0, 300), watch)


def test_state_of_an_older_version_starts_anew() -> None:
    watch = LossWatch(LossConfig())
    watch.load_state_dict({})
    assert not fed(noisy(2.0, 100), watch)


def test_stretches() -> None:
    stretches = Stretches(3)
    seen = [stretches.begins("a", on) for on in (True, True, False, False, True, False, False, False, True)]
    assert seen == [True, False, False, False, False, False, False, False, True]


# --- the list in the docs --------------------------------------------------------------------------------------------


def test_catalogue_names_settings_that_exist_and_their_defaults() -> None:
    """Every `section.setting` in it is one; a default behind it, `section.setting: 3`, is the default."""
    text = CATALOGUE.read_text()
    values = {
        f"{section}.{name}": value
        for section, inner in Config().to_dict().items()
        if isinstance(inner, dict)
        for name, value in inner.items()
    }
    named = re.findall(r"`((?:loss|data|weights|measure|trend|stop|clip)\.[a-z_]+)(?:: ([^`]+))?`", text)
    assert len(named) > 30
    for setting, default in named:
        assert setting in values, setting
        if default:
            assert load({setting.split(".")[0]: {setting.split(".")[1]: json.loads(default)}}, environ={})
            assert values[setting] == json.loads(default), setting
    watched = {name for name in values if name.startswith(("loss.", "data.", "weights."))}
    assert watched <= {setting for setting, _ in named}, "each setting of the watches is explained"


def test_catalogue_names_every_rule() -> None:
    from gradmon import data_watch, weight_watch

    text = CATALOGUE.read_text()
    for rule in (*loss_watch.RULES, *data_watch.RULES, *weight_watch.RULES):
        assert f"`{rule}`" in text, rule
