"""What gradmon's detector and the published rules see: false alarms on healthy norms, and faults found.

    python tests/bench/detection.py [--quick] [--jobs 2]

Prints one Markdown document; progress goes to stderr. Nothing is asserted: bars are printed beside the numbers. Only
norms are simulated, not a training that answers to what a rule does. Steps are counted from 1.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from published import RULES, Clip, Rule

from gradmon.config import ClipConfig
from gradmon.detector import ACTIVE_FROM, DIFFERENCES, WINDOW, Detector, RunningMedian

LEVEL = 0.5
"""Of the regime that faults are put into."""
FACTORS = (3, 5, 10, 30, 100)
RATES = (1.01, 1.02, 1.05, 1.1)
LATE = 300
"""Healthy steps before a late fault."""
COLLAPSE_AT = 1100
LOOKED_AT = 200
"""Steps after a fault in which it may still be found, or healthy steps be mistreated."""


class Gradmon(Rule):
    """gradmon's detector behind the interface of the published rules."""

    name = "gradmon"
    skips_exactly = True

    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector(ClipConfig())

    def judge(self, norm: float, loss: float | None = None) -> float:
        limits = self.detector.limits()
        self.detector.update(norm, loss)
        if not math.isfinite(norm):
            self.flagged = True
            return 0.0
        self.flagged = norm > limits.spike_above
        return limits.rescale_to / norm if self.flagged else 1.0

    @property
    def trend(self) -> bool:
        """Whether a drift or vanished gradients are told of."""
        return self.detector.drifting or self.detector.vanished


JUDGES: tuple[type[Rule], ...] = (Gradmon, *RULES)
ORDINARY = "noise 10 %"


# Healthy norms


def noise(kind: str, steps: int, generator: random.Random) -> list[float]:
    """In log space: independent of step to step, and a slow wander of 0.05 (AR(1), 0.9 per step)."""
    independent: Callable[[], float] = {
        ORDINARY: lambda: generator.gauss(0, 0.10),
        "heavy tails": lambda: 0.10 * generator.gauss(0, 1) / math.sqrt(generator.gammavariate(1.5, 2) / 3),
        "noise 40 %": lambda: generator.gauss(0, 0.40),
    }[kind]
    found, wander = [], generator.gauss(0, 0.05)
    for _ in range(steps):
        wander = 0.9 * wander + generator.gauss(0, 0.05 * math.sqrt(1 - 0.9**2))
        found.append(independent() + wander)
    return found


#: Norm without noise, by step and number of steps.
SHAPES: dict[str, Callable[[int, int], float]] = {
    "flat": lambda t, steps: LEVEL,
    "decay x100": lambda t, steps: 0.1 * (1 + 99 * (1 + t / 30) ** -1.6),
    "warm-up": lambda t, steps: (1 + 9 * math.exp(-t / 30)) * (1 + t / 500 if t < 1000 else 3 * (t / 1000) ** -0.3) / 5,
    "level x3": lambda t, steps: LEVEL * (3 if t >= steps // 2 else 1),
    "level /3": lambda t, steps: LEVEL / (3 if t >= steps // 2 else 1),
    "cyclic": lambda t, steps: LEVEL * 2 ** math.sin(2 * math.pi * t / 1500),
}
CONVERGENCE = "convergence: Adam on all data, falls smoothly, then jitters"
#: Shape and noise of each regime; None: norms come from a training.
REGIMES: dict[str, tuple[str, str] | None] = {
    "flat": ("flat", ORDINARY),
    "flat, heavy tails": ("flat", "heavy tails"),
    "flat, noise 40 %": ("flat", "noise 40 %"),
    "decay x100": ("decay x100", ORDINARY),
    "decay x100, heavy tails": ("decay x100", "heavy tails"),
    "warm-up": ("warm-up", ORDINARY),
    "level x3": ("level x3", ORDINARY),
    "level /3": ("level /3", ORDINARY),
    "cyclic": ("cyclic", ORDINARY),
    CONVERGENCE: None,
}


def healthy(regime: str, steps: int, seed: int) -> list[float]:
    """Norms of a run in which nothing is wrong."""
    kinds = REGIMES[regime]
    if kinds is None:
        return least_squares(steps, seed)
    shape = SHAPES[kinds[0]]
    return [shape(t, steps) * math.exp(n) for t, n in enumerate(noise(kinds[1], steps, random.Random(seed)))]


def least_squares(steps: int, seed: int, rate: float = 0.03) -> list[float]:
    """Norms of Adam on a least-squares problem with the whole of its data in every step, rounding of 1e-7 included.

    Once gradients are near the rounding, Adam's divisor has shrunk so far that its steps are too long: the norm grows
    by a fifth per step, a hundredfold and more, until the divisor has caught up.
    """
    generator = random.Random(seed)
    data = [[generator.gauss(0, 0.5**k) for k in range(4)] for _ in range(32)]
    curvature = [[2 * sum(row[i] * row[j] for row in data) / 32 for j in range(4)] for i in range(4)]
    weights = [generator.gauss(0, 1) for _ in range(4)]
    mean, square = [0.0] * 4, [0.0] * 4
    norms = []
    for step in range(1, steps + 1):
        gradient = [
            sum(c * w for c, w in zip(row, weights, strict=True)) + 1e-7 * generator.gauss(0, 1) for row in curvature
        ]
        norms.append(math.hypot(*gradient))
        for i, g in enumerate(gradient):
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.999 * square[i] + 0.001 * g * g
            divisor = math.sqrt(square[i] / (1 - 0.999**step)) + 1e-8
            weights[i] -= rate * mean[i] / (1 - 0.9**step) / divisor
    return norms


# What is counted


def false_alarms(regime: str, steps: int, seed: int) -> list[int]:
    """Flagged healthy steps of each judge, and how often gradmon tells of a drift or of vanished gradients."""
    norms = healthy(regime, steps, seed)
    counts = []
    trends = 0
    for kind in JUDGES:
        judge, flagged, before = kind(), 0, False
        for norm in norms:
            judge.judge(norm)
            flagged += judge.flagged
            if isinstance(judge, Gradmon):
                trends += judge.trend and not before
                before = judge.trend
        counts.append(flagged)
    return [*counts, trends]


def first_limit_alone(norms: Sequence[float]) -> int:
    """Healthy steps that gradmon's detector would flag without its second limit, the one for smooth training."""
    levels, jumps = RunningMedian(WINDOW), RunningMedian(DIFFERENCES)
    flagged, last = 0, math.nan
    for level in map(math.log, norms):
        if len(levels) >= ACTIVE_FROM:
            caution = math.log(max(1.0, 32 / len(levels)))
            sigma = max(0.05, 1.4826 * jumps.median() / math.sqrt(2))
            flagged += level > levels.median() + max(math.log(4) + caution, 6 * sigma)
        if len(levels):
            jumps.append(abs(level - last))
        levels.append(level)
        last = level
    return flagged


def after(kind: type[Rule], norms: Iterable[float]) -> Rule:
    """A judge that has seen these norms."""
    judge = kind()
    for norm in norms:
        judge.judge(norm)
    return judge


def flags(judge: Rule, norms: Iterable[float]) -> list[bool]:
    """Judges on; which of these norms are flagged."""
    found = []
    for norm in norms:
        judge.judge(norm)
        found.append(judge.flagged)
    return found


def spikes(seed: int) -> dict[str, list[float]]:
    """Whether each judge flags a lone spike, by where and how large; a later spike after a first; a burst."""
    norms = healthy("flat", LATE + 21, seed)
    found: dict[str, list[float]] = {}

    def flagged(row: str, history: Sequence[float], values: Sequence[float]) -> None:
        found[row] = []
        for kind in JUDGES:
            seen = flags(copy.deepcopy(_memory(kind, tuple(history))), values)
            found[row].append(sum(seen) / len(seen))

    for step, factor in ((12, 30), (12, 100), (20, 10), (20, 30), (20, 100)):
        flagged(f"x{factor} in step {step}", norms[: step - 1], [factor * LEVEL])
    for step, name in ((40, "in step 40"), (LATE + 1, "late")):
        for factor in FACTORS:
            flagged(f"x{factor} {name}", norms[: step - 1], [factor * LEVEL])
    history = norms[:LATE]
    flagged("x5 of what the step's own norm was, late", history, [5 * norms[LATE]])
    flagged("x10, five steps after a x30", [*history[:-5], 30 * LEVEL, *history[-4:]], [10 * LEVEL])
    flagged("burst: each of 20 steps x30", history, [30 * n for n in norms[LATE : LATE + 20]])
    falling, shape = healthy("decay x100", 40, seed), SHAPES["decay x100"]
    for step, factor in ((12, 30), (40, 5), (40, 10)):
        row = f"x{factor} in step {step} of decay x100"
        flagged(row, falling[: step - 1], [factor * shape(step - 1, 40)])
    _memory.cache_clear()
    return found


@functools.lru_cache(maxsize=64)
def _memory(kind: type[Rule], history: tuple[float, ...]) -> Rule:
    return after(kind, history)


def ramp(kind: type[Rule], rate: float, seed: int, regime: str = "flat", start: int = LATE) -> float:
    """How many times its level the norm is when it is seen that it rises; infinite if that takes more than 1000.

    Seen: three flags in a row, as a lone one may be a false alarm, or that a drift is told of.
    """
    length = int(math.log(1000) / math.log(rate)) + 1
    norms = healthy(regime, start + length, seed)
    judge = after(kind, norms[:start])
    row = 0
    for k in range(length):
        judge.judge(norms[start + k] * rate ** (k + 1))
        row = row + 1 if judge.flagged else 0
        if row == 3 or (isinstance(judge, Gradmon) and judge.detector.drifting):
            return rate ** (k + 1)
    return math.inf


def after_nan(kind: type[Rule], seed: int) -> tuple[bool, float, float, bool]:
    """A NaN step, then healthy ones, then a spike.

    Returns:
        Whether the weights survive the NaN step; shares of the healthy steps after it whose gradients are lost (skipped
        or turned into NaN), and that are cut to less than a tenth below what the rule did before it; whether a x30 is
        flagged at last.
    """
    norms = healthy("flat", LATE + LOOKED_AT, seed)
    judge, unharmed = after(kind, norms[:LATE]), after(kind, norms[:LATE])
    factor = judge.judge(math.nan)
    survives = factor == 0 and judge.skips_exactly
    lost = unlike = 0
    for norm in norms[LATE:]:
        factor, usual = judge.judge(norm), unharmed.judge(norm)
        lost += math.isnan(factor) or (factor == 0 and usual != 0)
        unlike += not (math.isnan(factor) or factor == 0) and abs(factor - usual) > 0.1
    judge.judge(30 * LEVEL)
    return survives, lost / LOOKED_AT, unlike / LOOKED_AT, judge.flagged


def others(kind: type[Rule], seed: int) -> tuple[float, int, int]:
    """Share of 200 steps at a thousandth of the norm until it is seen (1: never); flags after a level x3, and x12."""
    norms = healthy("flat", COLLAPSE_AT + LOOKED_AT, seed)
    judge = after(kind, norms[:COLLAPSE_AT])
    row, gone = 0, LOOKED_AT
    for k, norm in enumerate(norms[COLLAPSE_AT:]):
        judge.judge(norm / 1000)
        row = row + 1 if judge.flagged else 0
        if row == 3 or (isinstance(judge, Gradmon) and judge.detector.vanished):
            gone = k
            break
    shifted = [sum(flags(after(kind, norms[:LATE]), [f * n for n in norms[LATE : LATE + 800]])) for f in (3, 12)]
    return gone / LOOKED_AT, shifted[0], shifted[1]


def microseconds(kind: type[Rule], steps: int = 10_000) -> float:
    """Processor time of one step, the median of five runs; a history of that length for the rules that keep all."""
    norms = healthy("flat", steps, 0)
    times = []
    for _ in range(5):
        judge = kind()
        begin = time.process_time()
        for norm in norms:
            judge.judge(norm, 2.0)
        times.append((time.process_time() - begin) / steps * 1e6)
    return statistics.median(times)


# Tables


def head(first: str) -> list[str]:
    """Of a table with a column per judge."""
    names = [f"**{kind.name}**" if kind is Gradmon else kind.name for kind in JUDGES]
    return [f"| {first} | " + " | ".join(names) + " | bar |", "|---" + "|---:" * len(JUDGES) + "|---|"]


def row(name: str, cells: Iterable[str], bar: str = "") -> str:
    """Of such a table."""
    return f"| {name} | " + " | ".join(cells) + f" | {bar} |"


def judged(met: bool, text: str) -> str:
    """A bar and whether gradmon meets it."""
    return f"{text}: {'met' if met else '**missed**'}"


def alarm_table(pool: ProcessPoolExecutor, steps: int, seeds: int) -> list[str]:
    """False alarms."""
    lines = head("healthy regime")
    runs = [(regime, steps, seed) for regime in REGIMES for seed in range(seeds)]
    counts = list(pool.map(_false_alarms, runs))
    trends = []
    for regime in REGIMES:
        some = [count for run, count in zip(runs, counts, strict=True) if run[0] == regime]
        rates = [sum(column) * 10_000 / steps / seeds for column in zip(*some, strict=True)]
        lines.append(row(regime, [f"{r:.1f}" for r in rates[:-1]], judged(rates[0] <= 5, "<= 5")))
        trends.append(f"{regime.partition(':')[0]} {rates[-1]:.1f}")
        print(lines[-1], file=sys.stderr, flush=True)
    told = ", ".join(t for t in trends if not t.endswith(" 0.0")) or "none"
    alone = sum(pool.map(_alone, [(CONVERGENCE, steps, seed) for seed in range(seeds)])) * 10_000 / steps / seeds
    return [
        *lines,
        "",
        f"Drifts and vanished gradients that gradmon tells of (events, nothing is done), per 10,000 steps: {told}; "
        f"elsewhere none. Without gradmon's second limit, the one for smooth training, convergence would have "
        f"{alone:.0f} false alarms.",
    ]


def _false_alarms(run: tuple[str, int, int]) -> list[int]:
    return false_alarms(*run)


def _alone(run: tuple[str, int, int]) -> int:
    return first_limit_alone(healthy(*run))


#: Rows of the spike table that are only told: nobody asks for them.
_NO_GOAL = {
    "x3 in step 40", "x3 late", "x10 in step 20", "x5 of what the step's own norm was, late",
    "x5 in step 40 of decay x100", "x10 in step 40 of decay x100",
}  # fmt: skip


def spike_table(pool: ProcessPoolExecutor, trials: int) -> list[str]:
    """Steps flagged of those that are to be."""
    found = list(pool.map(spikes, range(1000, 1000 + trials)))
    lines = head("flagged, of the steps that are wrong")
    for name in found[0]:
        shares = [statistics.fmean(column) for column in zip(*(trial[name] for trial in found), strict=True)]
        wanted = name not in _NO_GOAL
        bar = judged(shares[0] == 1, "100 %") if wanted else ""
        lines.append(row(name, [f"{100 * share:.3g} %" for share in shares], bar))
    return lines


def _ramp(run: tuple[type[Rule], float, int, str, int]) -> float:
    return ramp(*run)


def ramp_table(pool: ProcessPoolExecutor, seeds: int) -> list[str]:
    """How far ramps get."""
    lines = head("norm over its level when its rise is seen: median, highest")
    for regime, start in (("flat", LATE), ("decay x100", 3000)):
        for rate in RATES:
            cells = []
            for kind in JUDGES:
                runs = [(kind, rate, seed, regime, start) for seed in range(1000, 1000 + seeds)]
                found = list(pool.map(_ramp, runs))
                cells.append(f"{_times(statistics.median(found))}, {_times(max(found))}")
                if kind is Gradmon:
                    bar = judged(max(found) < 12, "< x12")
            lines.append(row(f"{regime}, then {rate:g} per step", cells, bar))
    return lines


def _times(ratio: float) -> str:
    return f"x{ratio:.3g}" if math.isfinite(ratio) else "never"


def nan_table(seeds: int) -> list[str]:
    """After a NaN, a collapse, a shift of the level."""
    found = {kind: [after_nan(kind, seed) for seed in range(seeds)] for kind in JUDGES}
    rest = {kind: [others(kind, seed) for seed in range(seeds)] for kind in JUDGES}

    def means(results: Mapping[type[Rule], Sequence[tuple[float, ...]]], place: int) -> list[float]:
        return [statistics.fmean(result[place] for result in results[kind]) for kind in JUDGES]

    survives, lost, unlike, seen = (means(found, place) for place in range(4))
    gone, three, twelve = (means(rest, place) for place in range(3))
    lines = head("what comes after a fault")
    lines += [
        row("weights survive a NaN step", [_yes(v) for v in survives], judged(survives[0] == 1, "yes")),
        row(
            f"{LOOKED_AT} healthy steps after the NaN: lost (skipped, or turned into NaN)",
            [f"{100 * v:.3g} %" for v in lost],
            judged(lost[0] == 0, "0"),
        ),
        row("... clipped otherwise than without it", [f"{100 * v:.3g} %" for v in unlike], judged(unlike[0] == 0, "0")),
        row("... a x30 after those is flagged", [_yes(v) for v in seen], judged(seen[0] == 1, "yes")),
        row(
            "norm falls to a thousandth: seen after, steps",
            [f"{LOOKED_AT * v:.0f}" if v < 1 else "never" for v in gone],
            judged(gone[0] < 1, "seen"),
        ),
        row("level x3 for good: steps flagged of the next 800", [f"{v:.3g}" for v in three]),
        row("level x12 for good: steps flagged of the next 800", [f"{v:.3g}" for v in twelve]),
    ]
    return lines


def _yes(share: float) -> str:
    return {0.0: "no", 1.0: "yes"}.get(share, f"{100 * share:.3g} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps and trials, in a few seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    args = parser.parse_args()
    seeds, steps, trials = (3, 4000, 40) if args.quick else (10, 10_000, 400)
    with ProcessPoolExecutor(args.jobs) as pool:
        alarms = alarm_table(pool, steps, seeds)
        found = spike_table(pool, trials)
        ramps = ramp_table(pool, seeds)
    print("\n".join(document(alarms, found, ramps, nan_table(seeds), (seeds, steps, trials))))


def document(
    alarms: list[str], found: list[str], ramps: list[str], after_faults: list[str], size: tuple[int, int, int]
) -> list[str]:
    """The tables with what must be known to read them."""
    seeds, steps, trials = size
    costs = ", ".join(f"{kind.name} {microseconds(kind):.1f}" for kind in JUDGES if kind is not Clip)
    return [
        "# What detectors see",
        "",
        machine(),
        "",
        "## False alarms per 10,000 healthy steps",
        "",
        f"{seeds} seeds x {steps:,} steps. A rule that only clips (AutoClip, AdaGC, Clip) has no word for an anomaly: "
        "counted is what it cuts to less than a quarter. A constant clip to 1.0 within ZClip and llm.c is not counted.",
        "",
        *alarms,
        "",
        "## Spikes and bursts",
        "",
        f"Flat where not said otherwise, {ORDINARY}, {trials} trials. xN: the norm is N times the level. Late: after "
        f"{LATE} steps.",
        "",
        *found,
        "",
        "## Ramps",
        "",
        f"{seeds} seeds. Seen: three flags in a row, or a drift is told of.",
        "",
        *ramps,
        "",
        "## What stays",
        "",
        *after_faults,
        "",
        f"Microseconds per step with a loss, processor time: {costs}.",
    ]


def machine() -> str:
    """Date, processor, cores, Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    today = datetime.date.today().isoformat()
    return f"{today}; {processor}, {os.cpu_count()} shared cores; Python {platform.python_version()}"


if __name__ == "__main__":
    main()
