"""What one look at all gradients costs, one process with all cores or one GPU: gradmon beside torch's clip and others.

Every row of a round reads gradients that were written anew just before, as backward writes them. Rows that are made of
several timings (a step with the clip minus the step without) are added up round by round; medians come last.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gpt2
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from gradmon import actions, stats
from gradmon.actions import OptimizerActions
from gradmon.config import MeasureConfig
from gradmon.detector import Limits

MAX_NORM = 1.0
#: Of a gradient's element: 124 M of them have a norm of 11, 9 M of 3.
DEVIATION = 1e-3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
#: Slow, and their ratios far from any bar: timed in every so-many-th round only.
RARE = {"naive": 4, "histogram": 4}
#: The GPU is kept busy while the host hands over its work, as in training; in cycles, about 25 ms.
_HEAD_START = 50_000_000

Times = dict[str, list[float]]


def many_small() -> list[tuple[int, ...]]:
    """2,000 tensors of 1,000 to 8,000 elements, vectors and matrices in turn."""
    sizes = torch.randint(1000, 8000, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    return [(size,) if i % 2 else (size // 64, 64) for i, size in enumerate(sizes)]


MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "GPT-2 small": gpt2.shapes,
    "many small tensors": many_small,
}


class Bench:
    """One model's parameters and gradients, and everything that is timed on them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.parameters = [torch.randn(s, device=device).mul_(0.02).requires_grad_() for s in shapes]
        self.source = [torch.randn(s, device=device).mul_(DEVIATION) for s in shapes]
        self.gradients = [g.clone() for g in self.source]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.fused = OptimizerActions(self.optimizer)
        self.general = OptimizerActions(torch.optim.SGD(self.parameters, lr=1e-5))
        self.stats_PK = stats.measure(self.gradients)
        self.verdict = self.judge()
        self.leave_alone = self.judge(math.inf)

    @torch.no_grad()
    def reset(self) -> None:
        torch._foreach_copy_(self.gradients, self.source)

    def judge(self, max_norm: float = MAX_NORM) -> actions.Verdict:
        norm = stats.total_norm(self.stats_PK)
        return actions.judge(norm, norm, Limits(math.inf, math.inf, max_norm))

    def clip(self) -> None:
        clip_grad_norm_(self.parameters, MAX_NORM)

    def print_loop(self) -> list[tuple[float, float]]:
        return [(g.min().item(), g.max().item()) for g in self.gradients]

    def naive(self) -> list[tuple[float, ...]]:
        """One operation per statistic and parameter, read on the host at the end of each parameter."""
        found = []
        for g in self.gradients:
            norm = torch.linalg.vector_norm(g, dtype=torch.float64)
            each = (norm.square(), g.abs().max(), g.min(), g.max(), g.isnan().sum(), g.isinf().sum(), (g == 0).sum())
            found.append(tuple(value.item() for value in each))
        return found

    def step(self) -> None:
        self.optimizer.step()

    def step_clipped(self) -> None:
        self.fused.before(self.verdict, 1.0)
        self.optimizer.step()
        self.fused.after()

    def step_left_alone(self) -> None:
        self.fused.before(self.leave_alone, 1.0)
        self.optimizer.step()
        self.fused.after()

    def clip_generally(self) -> None:
        self.general.before(self.verdict, 1.0)
        self.general.after()

    def work(self) -> dict[str, Callable[[], object]]:
        """Everything that is timed, by name, in the order of a round."""
        gradients = self.gradients
        return {
            "read": lambda: [torch.sum(g) for g in gradients],
            "clip": self.clip,
            "measure": lambda: stats.measure(gradients, extremes=False, zeros=False),
            "extremes": lambda: stats.measure(gradients, extremes=True, zeros=False),
            "everything": lambda: stats.measure(gradients, extremes=True, zeros=True),
            "judge": self.judge,
            "step_left_alone": self.step_left_alone,
            "step": self.step,
            "step_clipped": self.step_clipped,
            "general": self.clip_generally,
            "print": self.print_loop,
            "naive": self.naive,
            "histogram": lambda: [torch.histc(g, 64) for g in gradients],
            "copy": lambda: torch._foreach_copy_(gradients, self.source),
        }

    def check(self) -> None:
        """The clips really clip: a benchmark of a clip that leaves everything alone would be worth nothing."""
        for clip in (self.clip, self.step_clipped, self.clip_generally):
            self.reset()
            before = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients))))
            clip()
            after = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients))))
            if not (before > 1.5 * MAX_NORM and 0.99 * MAX_NORM < after < 1.01 * MAX_NORM):
                raise RuntimeError(f"{clip.__name__} took a norm of {before} to {after}, not to {MAX_NORM}")


def clock(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that the device worked, and seconds until the host could go on."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        took = time.perf_counter() - started
        return took, took
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    started = time.perf_counter()
    work()
    host = time.perf_counter() - started
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def rounds(bench: Bench, seconds: float) -> tuple[Times, Times]:
    """Times of every work in every round, device and host; every other round goes backwards."""
    works = bench.work()
    device_times: Times = {name: [] for name in works}
    host_times: Times = {name: [] for name in works}
    end = time.monotonic() + seconds
    longest = 0.0
    for number in range(1 + MOST_ROUNDS):
        started = time.monotonic()
        if number > FEWEST_ROUNDS + 1 and started + longest > end:  # the fourth is the first with the rare ones
            break
        gc.collect()
        gc.disable()
        for name, work in list(works.items())[:: 1 if number % 2 else -1]:
            took = host = math.nan
            if number % RARE.get(name, 1) == 0:
                bench.reset()
                took, host = clock(work, bench.device)
            if number:  # the first round warms up
                device_times[name].append(took)
                host_times[name].append(host)
        gc.enable()
        longest = max(longest, time.monotonic() - started)
    return device_times, host_times


def peak_bytes(bench: Bench, *, extremes: bool, zeros: bool) -> int:
    """What one measurement allocates through torch at its peak, results included."""

    def measure() -> Tensor:
        return stats.measure(bench.gradients, extremes=extremes, zeros=zeros)

    measure()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = measure()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = measure()
    del kept
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def run(device_name: str, seconds: float, threads: int | None = None) -> dict[str, Any]:
    """Raw times of all models on one device, ready for JSON."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(device_name)
    shares = {"GPT-2 small": 0.75, "many small tensors": 0.25}
    found: dict[str, Any] = {}
    for name, shapes in MODELS.items():
        print(f"micro, {device_name}: {name}", file=sys.stderr, flush=True)
        bench = Bench(shapes(), device)
        bench.check()
        device_times, host_times = rounds(bench, seconds * shares[name])
        found[name] = {
            "tensors": len(bench.gradients),
            "elements": sum(g.numel() for g in bench.gradients),
            "device": device_times,
            "host": host_times,
            "peak_bytes": {
                "norm": peak_bytes(bench, extremes=False, zeros=False),
                "extremes": peak_bytes(bench, extremes=True, zeros=False),
                "everything": peak_bytes(bench, extremes=True, zeros=True),
            },
        }
        del bench
        gc.collect()
    return {"threads": torch.get_num_threads(), "models": found}


#: Label of each row, with what it is made of.
ROWS = {
    "plain": "plain read of the same bytes (`torch.sum` per tensor)",
    "clip": "`clip_grad_norm_` (foreach, the default)",
    "print": "print loop: min and max per parameter, `.item()`",
    "naive": "naive full statistics: 7 operations per parameter, `.item()`",
    "histogram": "histogram per parameter (`torch.histc`, 64 bins)",
    "norm_clip": "**gradmon norm + clip** (fused AdamW)",
    "measure": "- of it: norm and finiteness",
    "judge": "- of it: total norm and verdict",
    "added": "- of it: what the verdict adds to the fused step",
    "full_clip": "**gradmon full + clip**: extremes in every step, zeros every {zeros}th",
    "extremes": "- of it: norm, finiteness and extremes",
    "zeros": "- of it: a {zeros}th of counting zeros",
    "every_zero": "gradmon full + clip, zeros in every step too",
    "cadence": "gradmon at its own cadence: extremes every {detail}th step, zeros every {zeros}th; with the clip",
    "default": "**gradmon as it comes**: the same, and no step is clipped (healthy, no `max_norm`)",
    "unclipped": "- of it: what a verdict that leaves the step alone adds to it",
    "general": "gradmon norm + clip for any other optimizer (gradients are multiplied)",
    "step": "for scale: the fused AdamW step itself",
}
#: Most that a row may cost, relative to the clip. Printed, never asserted.
BARS = {"cpu": {"norm_clip": 0.5, "full_clip": 0.9}, "cuda": {"full_clip": 0.75}}


def rows(times: Times) -> dict[str, list[float]]:
    """Seconds of every row of ROWS, round by round."""
    config = MeasureConfig()
    detail, zeros = 1 / max(1, config.detail_every), 1 / max(1, config.zeros_every)
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for values in zip(*times.values(), strict=True):
        t = dict(zip(times, values, strict=True))
        judged, added = t["judge"], t["step_clipped"] - t["step"]
        counting, looking = zeros * (t["everything"] - t["extremes"]), detail * (t["extremes"] - t["measure"])
        row = {
            "plain": t["read"],
            "norm_clip": t["measure"] + judged + added,
            "added": added,
            "full_clip": t["extremes"] + counting + judged + added,
            "zeros": counting,
            "every_zero": t["everything"] + judged + added,
            "cadence": t["measure"] + looking + counting + judged + added,
            "default": t["measure"] + looking + counting + judged + t["step_left_alone"] - t["step"],
            "unclipped": t["step_left_alone"] - t["step"],
            "general": t["measure"] + judged + t["general"],
        }
        for name in ROWS:
            found[name].append(row[name] if name in row else t[name])
    return found


def median(values: Sequence[float]) -> float:
    """Over the rounds in which there is a value."""
    return statistics.median([v for v in values if not math.isnan(v)] or [math.nan])


def table(result: dict[str, Any], device: str) -> list[str]:
    """Markdown: one line per row, two columns per model."""
    models = result["models"]
    config = MeasureConfig()
    made = {name: rows(model["device"]) for name, model in models.items()}
    titles = [f"{name}, ms | ratio" for name in models]
    lines = [f"| | {' | '.join(titles)} | bar |", "|---|" + "---:|" * (2 * len(models)) + "---|"]
    for row, label in ROWS.items():
        cells, ratios = [label.format(detail=config.detail_every, zeros=config.zeros_every)], []
        for name in models:
            values = made[name][row]
            ratio = median([v / c for v, c in zip(values, made[name]["clip"], strict=True)])
            ratios.append(ratio)
            cells += [f"{1e3 * median(values):.3g}", f"{ratio:.3f}"]
        bar = BARS[device].get(row)
        verdicts = ", ".join("met" if ratio <= bar else "**missed**" for ratio in ratios) if bar else ""
        cells.append(f"<= {bar}: {verdicts}" if bar else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table(result: dict[str, Any]) -> list[str]:
    """Markdown: peak of one measurement beside the promise."""
    lines = [
        "| memory allocated by one measurement, peak | norm | with extremes | everything | bar |",
        "|---|---:|---:|---:|---|",
    ]
    for name, model in result["models"].items():
        bar = (1 << 20) + 64 * model["tensors"] * len(stats.STATISTICS)
        cells = [f"{peak / 1024:.0f} KiB" for peak in model["peak_bytes"].values()]
        met = "met" if max(model["peak_bytes"].values()) <= bar else "**missed**"
        lines.append(f"| {name} | {' | '.join(cells)} | <= {bar / 1024:.0f} KiB: {met} |")
    return lines


def cuda_table(result: dict[str, Any]) -> list[str]:
    """Markdown: bandwidth of the kernel, and how long the host is held."""
    lines = ["| on the GPU | " + " | ".join(result["models"]) + " | bar |", "|---|" + "---:|" * 2 + "---|"]
    copies, shares, hosts = [], [], []
    for model in result["models"].values():
        size = 4 * model["elements"]
        copy, kernel = (median(model["device"][name]) for name in ("copy", "everything"))
        copies.append(f"{2 * size / copy / 1e9:.0f} GB/s")
        shares.append(copy / kernel / 2)
        names = ("everything", "clip")
        hosts.append(" / ".join(f"{1e3 * median(model['host'][name]):.2f} ms" for name in names))
    bar = ", ".join("met" if share >= 0.8 else "**missed**" for share in shares)
    lines.append(f"| copy on the device, read + written | {' | '.join(copies)} | |")
    lines.append(f"| gradmon's read, share of that | {' | '.join(f'{s:.0%}' for s in shares)} | >= 80 %: {bar} |")
    lines.append(f"| host time of gradmon's measurement / of the clip | {' | '.join(hosts)} | |")
    return lines
