"""Whole training steps with gradmon and without, in neighbouring blocks of one process, so that a machine that slows
down slows both: the ratio of each pair of blocks is taken, and the median of those ratios.

Where wrapping is cheap every block wraps the model in a new DDP object, so that the steps without gradmon have DDP's
own reduction and no hook of ours; the GPT-2 keeps one DDP object, in which a detached gradmon passes gradients through.
Steps are counted on over the blocks, so that cadences come as in a long run.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpt2
import torch
import torch.distributed as dist
from own_time import WAIT, WATCHES, OwnTime
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradmon
from gradmon.config import MeasureConfig
from gradmon.demo import train

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scenario:
    title: str
    model: str
    ranks: int
    threads: int | None
    """Per rank; None for all cores."""
    steps: int
    """Timed steps in a block."""
    warm_up: int
    """Untimed steps at the start of a block."""
    most_pairs: int
    rewrap: bool
    batch: int = 0
    """Sequences per rank, for the GPT-2."""
    length: int = 0
    device: str = "cpu"


SCENARIOS = {
    "one": Scenario("demo model, 1 process", "demo", 1, 1, 25, 3, 16, rewrap=True),
    "ddp": Scenario("demo model, DDP on 2 gloo ranks", "demo", 2, 1, 25, 3, 20, rewrap=True),
    "gpt2": Scenario("GPT-2 small, 4 x 256 tokens, DDP on 2 gloo ranks", "gpt2", 2, 1, 1, 0, 4, False, 4, 256),
    "gpu": Scenario("GPT-2 small in bf16, 16 x 1024 tokens", "gpt2", 1, None, 10, 3, 16, True, 16, 1024, "cuda"),
}


class Trainer:
    """One rank's model, data and optimizer."""

    def __init__(self, scenario: Scenario, own: OwnTime) -> None:
        self.scenario = scenario
        self.own = own
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = torch.device(scenario.device)
        self.generator = torch.Generator().manual_seed(self.rank)
        torch.manual_seed(0)
        demo = scenario.model == "demo"
        self.text = train.load_text()[0] if demo else None
        self.loss_of: Callable[..., Tensor] = (lambda model, *batch: model(*batch)) if demo else gpt2.loss_of
        self.module: nn.Module = (train.Model() if demo else gpt2.GPT2()).to(self.device)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        self.state: dict[str, Any] | None = None
        self.numbers: list[int] = []
        """Of the timed steps with gradmon."""
        self.attached_steps = 0
        self._wrapped: nn.Module | None = None
        self._sources: dict[int, Any] = {}

    def run(self, attached: bool, steps: int | None = None, warm_up: int | None = None) -> float:
        """A block; seconds per timed step of the slowest rank."""
        model = self._wrap()
        watching = gradmon.attach(model, self.optimizer) if attached else None
        if watching is not None and self.state is not None:
            watching.load_state_dict(self.state)
            # The first batches of a run are all looked at; a block is not the begin of one.
            watching._watches._batches._sources.update(self._sources)
        self._train(model, self.scenario.warm_up if warm_up is None else warm_up, watching)
        self._meet()
        self.own.on = attached
        steps = self.scenario.steps if steps is None else steps
        started = time.perf_counter()
        self._train(model, steps, watching)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor((time.perf_counter() - started) / steps)
        self.own.on = False
        if dist.is_initialized():
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if watching is not None:
            self.state = watching.state_dict()
            self._sources = watching._watches._batches._sources
            watching.detach()
        return float(took)

    def _train(self, model: nn.Module, steps: int, watching: Any) -> None:
        mixed = self.device.type == "cuda"
        for _ in range(steps):
            inputs, targets = self._draw()
            with torch.autocast("cuda", torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = self.loss_of(model, inputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if watching is not None:
                watching.observe(loss=loss)
                self.attached_steps += 1
                if self.own.on:
                    self.numbers.append(watching.step)
                    self.own.end_step()

    def _draw(self) -> Batch:
        if self.text is not None:
            return train.draw(self.text, self.generator)
        shape = (self.scenario.batch, self.scenario.length + 1)
        tokens = torch.randint(gpt2.VOCABULARY, shape, generator=self.generator).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def _wrap(self) -> nn.Module:
        if not dist.is_initialized():
            return self.module
        if self._wrapped is None or self.scenario.rewrap:
            self._wrapped = None
            gc.collect()  # the old wrapper takes its hooks with it
            self._wrapped = DistributedDataParallel(self.module)
        return self._wrapped

    def _meet(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()


def worker(part: str, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
    """One rank; rank 0 saves the result so far after each pair of blocks."""
    scenario = SCENARIOS[part]
    end = time.monotonic() + seconds
    if scenario.threads is not None:
        torch.set_num_threads(scenario.threads)
    if scenario.ranks > 1:
        dist.init_process_group("gloo")
    own = OwnTime()
    trainer = Trainer(scenario, own)
    say = _Progress(part, trainer.rank)
    trainer.run(False, 1, scenario.warm_up)
    trainer.run(True, 1, 0)  # the first step of a run has full statistics
    pairs: list[tuple[float, float]] = []
    longest = 0.0
    while len(pairs) < scenario.most_pairs and _agreed(not pairs or time.monotonic() + 1.1 * longest < end):
        started = time.monotonic()
        order = (False, True) if len(pairs) % 2 == 0 else (True, False)
        took = {attached: trainer.run(attached) for attached in order}
        pairs.append((took[False], took[True]))
        longest = max(longest, time.monotonic() - started)
        say(f"pair {len(pairs)}: {took[False]:.4g} s without, {took[True]:.4g} s with")
        if trainer.rank == 0:
            save(_result(scenario, trainer, pairs))
    if scenario.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _agreed(go_on: bool) -> bool:
    """Rank 0 decides."""
    decision = torch.tensor(int(go_on))
    if dist.is_initialized():
        dist.broadcast(decision, 0)
    return bool(decision)


def _result(scenario: Scenario, trainer: Trainer, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    own = trainer.own
    return {
        "title": scenario.title,
        "parameters": sum(p.numel() for p in trainer.module.parameters()),
        "tensors": sum(1 for _ in trainer.module.parameters()),
        "threads": torch.get_num_threads(),
        "steps": scenario.steps,
        "pairs": pairs,
        "numbers": trainer.numbers,
        "own": own.steps,
        "puts": own.puts,
        "writer": own.writer_seconds / trainer.attached_steps,
        "missing": own.missing,
    }


class _Progress:
    def __init__(self, part: str, rank: int) -> None:
        self._part, self._silent = part, rank > 0

    def __call__(self, line: str) -> None:
        if not self._silent:
            print(f"steps, {self._part}: {line}", file=sys.stderr, flush=True)


# --- the tables ------------------------------------------------------------------------------------------------------


class Summary:
    """One scenario's raw times as the lines of the table; seconds."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.without = statistics.median(a for a, _ in raw["pairs"])
        self.with_ = statistics.median(b for _, b in raw["pairs"])
        self.ratios = sorted(b / a for a, b in raw["pairs"])
        every = MeasureConfig().detail_every
        detailed = [every > 0 and (n == 1 or n % every == 0) for n in raw["numbers"]]
        self.plain = [own for own, detail in zip(raw["own"], detailed, strict=True) if not detail]
        self.detailed = [own for own, detail in zip(raw["own"], detailed, strict=True) if detail]
        self.every = max(1, every)

    def mean(self, part: str, clock: int = 0) -> float:
        """Per step in a long run: ordinary steps and those with full statistics weighted by their cadence."""
        plain = statistics.fmean(own.get(part, (0.0, 0.0))[clock] for own in self.plain) if self.plain else 0.0
        if not self.detailed:
            return plain
        detailed = statistics.fmean(own.get(part, (0.0, 0.0))[clock] for own in self.detailed)
        return plain + (detailed - plain) / self.every

    @property
    def parts(self) -> set[str]:
        return {part for own in self.raw["own"] for part in own}

    def own(self, clock: int = 0) -> float:
        """All of gradmon's own work per step; waits are not work."""
        return sum(self.mean(part, clock) for part in self.parts - {WAIT})

    def watches(self) -> float:
        """Of it, those over data, loss and weights, and keeping batches for an incident."""
        return sum(self.mean(part) for part in self.parts if part.startswith(WATCHES))

    def typical(self, detailed: bool) -> float | None:
        """Median wall time of own work in one kind of step."""
        chosen = self.detailed if detailed else self.plain
        totals = [sum(wall for part, (wall, _) in own.items() if part != WAIT) for own in chosen]
        return statistics.median(totals) if totals else None


def table(results: list[dict[str, Any]], bars: dict[str, str]) -> list[str]:
    """Markdown, one column per scenario."""
    columns = [Summary(raw) for raw in results]
    lines = ["| per step | " + " | ".join(c.raw["title"] for c in columns) + " |", "|---|" + "---:|" * len(columns)]

    def add(label: str, value: Callable[[Summary], str]) -> None:
        lines.append(f"| {label} | {' | '.join(value(c) for c in columns)} |")

    add("parameters in tensors", lambda c: f"{c.raw['parameters']:,} in {c.raw['tensors']}")
    add("pairs of blocks x steps; threads per rank", lambda c: f"{_count(c)}; {c.raw['threads']}")
    add("without gradmon, median", lambda c: _time(c.without))
    add("with gradmon, median", lambda c: _time(c.with_))
    add("ratio, median of pairs", lambda c: f"{statistics.median(c.ratios):.4f}{_bar(c, 'ratio', bars)}")
    add("ratio, middle half of pairs", _middle)
    add("**gradmon's own work on the training thread**, mean", lambda c: _time(c.own()))
    add("... as a share of the step", lambda c: f"{c.own() / c.without:.2%}{_bar(c, 'share', bars)}")
    add("... of it watching data, loss and weights, mean", lambda c: _time(c.watches()))
    add("... ... as a share of the step", lambda c: f"{c.watches() / c.without:.2%}{_bar(c, 'watches', bars)}")
    add("... in processor time (noise of others left out)", lambda c: _time(c.own(1)))
    add("... in an ordinary step, median", lambda c: _time(c.typical(False)))
    add("... in a step with full statistics, median", lambda c: _time(c.typical(True)))
    add(f"{WAIT}, mean (not in the above)", lambda c: _time(c.mean(WAIT)))
    add("handing a step to the journal, median / p99", _puts)
    add("journal's thread, beside training (processor time)", lambda c: _time(c.raw["writer"]))
    lines += ["", "Where the own work goes, mean per step, wall / processor time, parts without what they call:", ""]
    lines += [
        "| part | " + " | ".join(c.raw["title"] for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    parts = set[str]().union(*(c.parts for c in columns)) - {WAIT}
    for part in sorted(parts, key=lambda p: -max(c.mean(p) / c.own() for c in columns)):
        add(part, lambda c, part=part: _both(c, part) if part in c.parts else "-")
    missing = sorted(set[str]().union(*(c.raw["missing"] for c in columns)))
    return [*lines, *(["", f"Not timed, because gradmon no longer has it: {', '.join(missing)}."] if missing else [])]


def _bar(summary: Summary, kind: str, bars: dict[str, str]) -> str:
    limits = {"gpt2 share": 0.02, "gpu ratio": 1.01}
    limits |= {f"{part} watches": 0.005 for part in SCENARIOS}
    limit = limits.get(bars.get(summary.raw["title"], "") + " " + kind)
    if limit is None:
        return ""
    values = {"share": summary.own, "watches": summary.watches}
    value = values[kind]() / summary.without if kind in values else statistics.median(summary.ratios)
    shown = f"{limit:.1%}" if kind in values else f"{limit}"
    return f" (<= {shown}: {'met' if value <= limit else '**missed**'})"


def _count(summary: Summary) -> str:
    return f"{len(summary.ratios)} x {summary.raw['steps']}"


def _middle(summary: Summary) -> str:
    quarter = len(summary.ratios) // 4
    return f"{summary.ratios[quarter]:.4f} to {summary.ratios[-1 - quarter]:.4f}"


def _puts(summary: Summary) -> str:
    puts = sorted(summary.raw["puts"]) or [0.0]
    return f"{_time(statistics.median(puts))} / {_time(puts[int(0.99 * len(puts))])}"


def _both(summary: Summary, part: str) -> str:
    return f"{_time(summary.mean(part))} / {_time(summary.mean(part, 1))}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if abs(seconds) >= 1e-3 else f"{1e6 * seconds:.0f} us"
