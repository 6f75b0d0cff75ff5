"""The published rules against their formulas, computed here once more from the whole history."""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from published import RULES, AdaGC, AutoClip, Clip, LlmC, Megatron, Rule, SkipStep, ZClip

NAN, INF = math.nan, math.inf


def healthy(count: int, level: float = 0.5, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [level * math.exp(generator.gauss(0, 0.1)) for _ in range(count)]


def judged(rule: Rule, norms: list[float], losses: list[float] | None = None) -> list[tuple[float, bool]]:
    found = []
    for i, norm in enumerate(norms):
        factor = rule.judge(norm) if losses is None else rule.judge(norm, losses[i])
        found.append((factor, rule.flagged))
    return found


def factors(rule: Rule, norms: list[float], losses: list[float] | None = None) -> list[float]:
    return [factor for factor, _ in judged(rule, norms, losses)]


def flags(rule: Rule, norms: list[float], losses: list[float] | None = None) -> list[int]:
    return [i for i, (_, flagged) in enumerate(judged(rule, norms, losses)) if flagged]


def torch_clip(norm: float, max_norm: float) -> float:
    """What torch multiplies a gradient of ones by when it believes this norm."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.ones(1, dtype=torch.float64)
    torch.nn.utils.clip_grads_with_norm_([parameter], max_norm, torch.tensor(norm, dtype=torch.float64))
    return float(parameter.grad)


def test_clip_is_torchs() -> None:
    norms = [0.0, 0.5, 1.0, 2.0, 40.0, INF, NAN]
    assert factors(Clip(), norms) == pytest.approx([torch_clip(n, 1.0) for n in norms], nan_ok=True)
    assert flags(Clip(), [0.9, 3.9, 4.1, NAN, 50.0]) == [2, 4], "cut to less than a quarter"


def test_autoclip_is_the_percentile_of_all_norms_so_far() -> None:
    norms = healthy(80) + [15.0, *healthy(20, 0.05, seed=1)]
    expected = [torch_clip(n, float(np.percentile(norms[: i + 1], 10))) for i, n in enumerate(norms)]
    assert factors(AutoClip(), norms) == pytest.approx(expected)
    assert sum(f < 1 for f in expected[10:80]) > 50, "it clips most healthy steps"
    assert flags(AutoClip(), norms) == [80], "and calls only the spike anomalous"


def test_autoclip_turns_every_gradient_into_nan_after_one() -> None:
    norms = [*healthy(30), NAN, *healthy(300, seed=1)]
    found = factors(AutoClip(), norms)
    assert np.isnan(np.percentile(norms[:31], 10)) and math.isnan(torch_clip(0.5, NAN)), "as published"
    assert not any(map(math.isnan, found[:30]))
    assert all(map(math.isnan, found[30:]))
    assert flags(AutoClip(), [*norms, 500.0]) == [], "in silence"


def zclip(norms: list[float]) -> list[tuple[float, bool]]:
    """Factor and z > 2.5 of each step, by the formulas."""
    mean, var = statistics.fmean(norms[:25]), statistics.pvariance(norms[:25])
    found = [(min(1.0, 1.0 / (n + 1e-6)), False) for n in norms[:25]]
    for n in norms[25:]:
        sigma = math.sqrt(var)
        z = (n - mean) / (sigma + 1e-6)
        x = mean + 2.5 * sigma * 2.5 / z if z > 2.5 else n
        c = min(x, 1.0)
        found.append((c / (n + 1e-6) if n > c else 1.0, z > 2.5))
        mean = 0.97 * mean + 0.03 * x
        var = 0.97 * var + 0.03 * (x - mean) ** 2
    return found


@pytest.mark.parametrize("level", [0.5, 5.0])
def test_zclip_is_its_formula(level: float) -> None:
    norms = healthy(60, level) + [30 * level, 3 * level] + healthy(60, level, seed=1)
    found, expected = judged(ZClip(), norms), zclip(norms)
    assert [f for f, _ in found] == pytest.approx([f for f, _ in expected])
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert found[60][1] and found[60][0] < 1 / 20
    assert not any(flag for _, flag in found[:25])
    if level == 5.0:
        assert all(f < 1 for f, _ in found), "all are clipped to 1.0; that is no flag"


def test_zclip_after_a_nan_is_a_fixed_clip_for_ever() -> None:
    norms = [*healthy(60), NAN, *healthy(300, seed=1), 500.0, 0.5]
    found = judged(ZClip(), norms)
    assert found[60] == (1.0, False), "the NaN goes into the weights"
    assert [f for f, _ in found[61:361]] == [min(1.0, 1 / (n + 1e-6)) for n in norms[61:361]]
    assert found[361] == (pytest.approx(1 / 500), False), "it no longer sees a spike"
    early = judged(ZClip(), [0.5, NAN, *healthy(300), 500.0])
    assert not any(flag for _, flag in early)


def test_zclip_locks_in_after_a_level_shift() -> None:
    found = flags(ZClip(), healthy(200) + healthy(1000, 1.5, seed=1))
    assert sum(i >= 200 for i in found) > 900


def olmo_skips(values: list[float]) -> list[bool]:
    skipped = []
    for i, value in enumerate(values):
        previous = torch.tensor(values[max(0, i - 128) : i], dtype=torch.float64)
        if i + 1 < 64:
            skipped.append(False)
            continue
        std, mean = torch.std_mean(previous)
        skipped.append(not bool(value - mean <= 6 * std))
    return skipped


def test_skipstep_is_its_formula() -> None:
    norms = healthy(100) + [15.0] * 4 + [*healthy(200, seed=1), 4.0, 0.001]
    expected = olmo_skips(norms)
    assert factors(SkipStep(), norms) == [0.0 if skip else 1.0 for skip in expected]
    assert flags(SkipStep(), norms) == [i for i, skip in enumerate(expected) if skip]
    assert expected[100] and not expected[103], "a spike widens the window's deviation for the ones after it"
    assert flags(SkipStep(), [*healthy(63), 50.0, 0.5]) == [63]
    assert flags(SkipStep(), [*healthy(62), 50.0]) == [], "inactive while fewer than 64 are known"


def test_skipstep_skips_128_healthy_steps_after_a_nan() -> None:
    norms = [*healthy(200), NAN, *healthy(300, seed=1)]
    assert flags(SkipStep(), norms) == list(range(200, 329))
    assert not SkipStep.skips_exactly, "0 x NaN: the NaN step is not skipped but written into the weights"


def test_skipstep_judges_loss_and_norm() -> None:
    norms, losses = healthy(150), healthy(150, 2.0, seed=1)
    losses[120] = 30.0
    norms[140] = 30.0
    assert flags(SkipStep(), norms, losses) == [120, 140]


def llmc_scores(values: list[float]) -> list[float]:
    scores = []
    for i, value in enumerate(values):
        last = values[max(0, i - 127) : i + 1]
        scores.append((value - statistics.fmean(last)) / statistics.pstdev(last) if i >= 128 else NAN)
    return scores


def test_llmc_is_its_formula() -> None:
    norms = healthy(200) + [15.0, *healthy(20, seed=2), 15.0, *healthy(200, seed=1), 1.0]
    scores = llmc_scores(norms)
    expected = [i for i, z in enumerate(scores) if z > 7]
    assert expected and scores[221] < 9 < scores[200], "the value is part of its own window"
    assert flags(LlmC(), norms) == expected
    assert factors(LlmC(), norms) == pytest.approx(
        [0.0 if z > 7 else min(1.0, 1 / n) for n, z in zip(norms, scores, strict=True)]
    )
    assert flags(LlmC(), [*healthy(127), 50.0]) == [], "silent while it fills"
    assert flags(LlmC(), [*healthy(128), 50.0]) == [128]


def test_llmc_never_skips_again_after_a_nan() -> None:
    norms = [*healthy(200), NAN, *healthy(500, seed=1), 500.0]
    found = judged(LlmC(), norms)
    assert found[200] == (1.0, False), "the NaN goes into the weights"
    assert not any(flag for _, flag in found)
    losses = healthy(702, 2.0)
    losses[-1] = 50.0
    assert flags(LlmC(), norms, losses) == [701], "each has sums of its own"


def test_megatron_is_ten_times_the_first_hundreds_maximum() -> None:
    norms = healthy(99) + [0.9, 8.9, 9.0, NAN, INF, 0.5, 9.1]
    assert flags(Megatron(), norms) == [101, 105]
    assert set(factors(Megatron(), norms)) == {1.0}, "it reports, and changes no gradient"
    assert flags(Megatron(), [40.0, NAN, *healthy(1000), 15.0]) == [], "what warm-up reached is its yardstick for ever"
    late = [NAN, *healthy(100), 15.0]
    assert flags(Megatron(), late) == [101], "a NaN is none of the hundred"


def adagc(norms: list[float]) -> list[float]:
    gamma = min(min(n, n / (n + 1e-6)) for n in norms[:100])
    found = [min(1.0, 1.0 / (n + 1e-6)) for n in norms[:100]]
    for n in norms[100:]:
        h = min(1.0, 1.05 * gamma / n)
        gamma = 0.98 * gamma + 0.02 * h * n
        found.append(h)
    return found


@pytest.mark.parametrize("level", [0.5, 5.0])
def test_adagc_is_its_formula(level: float) -> None:
    norms = healthy(150, level) + [30 * level] + healthy(100, level, seed=1)
    expected = adagc(norms)
    assert factors(AdaGC(), norms) == pytest.approx(expected)
    assert flags(AdaGC(), norms) == [i for i, h in enumerate(expected) if i >= 100 and h < 0.25]
    assert 150 in flags(AdaGC(), norms)


def test_adagc_clips_nothing_any_more_after_a_nan() -> None:
    found = judged(AdaGC(), [*healthy(150), NAN, *healthy(300, seed=1), 500.0])
    assert any(f < 1 for f, _ in found[100:150])
    assert found[150:] == [(1.0, False)] * 302


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_number_is_an_error(rule: type[Rule]) -> None:
    strange = [0.0, 0.0, 1e300, INF, NAN, 1e-320, 0.5, -0.0]
    for head in ([], healthy(130), [0.0] * 130, [0.5] * 130):
        judged(rule(), [*head, *strange, *healthy(130)], [*head, *strange, *healthy(130)])
    assert rule.name and len({r.name for r in RULES}) == len(RULES)
