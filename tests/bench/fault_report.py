"""What the runs show: excess loss by fault and mitigation, what was done in them, and whether gradmon meets its gates.

Excess: validation loss minus that of the same seed's clean run without anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fault_runs import Job, Result
from injections import INJECTIONS
from mitigations import MITIGATIONS

Results = Mapping[Job, Result]


@dataclass(frozen=True)
class Gate:
    """What must hold of one cell of the table."""

    injection: str
    mitigation: str
    limit: float | None
    """Most excess loss, mean over the seeds; None: not one intervention, and the clean run's bits."""

    def __str__(self) -> str:
        what = "no intervention, same bits" if self.limit is None else f"excess <= {self.limit:g}"
        return f"{self.injection} / {self.mitigation}: {what}"


GATES = (
    Gate("clean", "gradmon", None),
    Gate("clean", "rollback", None),
    Gate("spikes", "gradmon", 0.01),
    Gate("corrupted", "gradmon", 0.02),
    Gate("early", "gradmon", 0.01),
    Gate("nan", "gradmon", 0.01),
    Gate("inf", "gradmon", 0.01),
    Gate("lr_glitch", "gradmon", 0.25),
    Gate("lr_glitch", "rollback", 0.12),
    Gate("ddp_clean", "gradmon", None),
    Gate("ddp_clean", "leave_out", None),
    Gate("rank_nan", "gradmon", 0.01),
    Gate("rank_nan_fifth", "gradmon", 0.16),
    Gate("rank_nan_fifth", "leave_out", 0.06),
    Gate("rank_dead", "leave_out", 0.12),
)


@dataclass(frozen=True)
class Verdict:
    """A gate, held against the runs."""

    gate: Gate
    met: bool
    seen: str

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'} {self.gate}; {self.seen}"


def judge(results: Results, gates: tuple[Gate, ...] = GATES) -> list[Verdict]:
    """Of every gate whose runs are there."""
    return [_judge(gate, cell) for gate in gates if (cell := Cell.of(results, gate.injection, gate.mitigation))]


def vacuous(results: Results, gates: tuple[Gate, ...] = GATES) -> list[Gate]:
    """Gates that a run without anything meets too, where such runs are there: its fault does not bite."""
    limited = [gate for gate in gates if gate.limit is not None]
    cells = [(gate, Cell.of(results, gate.injection, "none")) for gate in limited]
    return [gate for gate, cell in cells if cell and _judge(gate, cell).met]


@dataclass(frozen=True)
class Cell:
    """All seeds of one fault and mitigation."""

    runs: Mapping[Job, Result]
    baselines: Mapping[Job, Result]

    @staticmethod
    def of(results: Results, injection: str, mitigation: str) -> Cell | None:
        """None without runs."""
        runs = {job: r for job, r in results.items() if (job.injection, job.mitigation) == (injection, mitigation)}
        return Cell(runs, {job: results[job.baseline] for job in runs}) if runs else None

    @property
    def excess(self) -> list[float]:
        """By seed; NaN where there is no loss."""
        return [r.validation - self.baselines[job].validation for job, r in sorted(self.runs.items(), key=_by_seed)]

    @property
    def interventions(self) -> int:
        return sum(sum(r.counts.values()) for r in self.runs.values())

    @property
    def same_bits(self) -> bool:
        return all(r.digest == self.baselines[job].digest for job, r in self.runs.items())

    def loss(self) -> str:
        """Mean and spread of the excess, or how the run ended instead."""
        failed = sum(bool(r.failed) for r in self.runs.values())
        if failed:
            return f"failed{_share(failed, len(self.runs))}"
        ends = [f"NaN from step {_span(r.dead for r in self.runs.values())}"] if self._any("dead") else []
        if self._any("stopped"):
            ends.append(f"stopped at step {_span(r.stopped for r in self.runs.values())}")
        excess = [e for e in self.excess if math.isfinite(e)]
        if self._any("dead") and len(excess) < len(self.runs):
            return "; ".join(ends)
        return "; ".join([_mean_and_spread(excess), *ends])

    def done(self) -> str:
        """What was done, per run: `9 skipped, 4.3 clipped`."""
        names = ("skipped", "clipped", "left_out", "backoff", "rollback", "stop", "errors")
        totals = {name: sum(r.counts.get(name, 0) for r in self.runs.values()) for name in names}
        said = [
            f"{round(total / len(self.runs), 1):g} {name.replace('_', ' ')}" for name, total in totals.items() if total
        ]
        return ", ".join(said) or "-"

    def _any(self, end: str) -> bool:
        return any(getattr(r, end) is not None for r in self.runs.values())


def _by_seed(item: tuple[Job, Result]) -> int:
    return item[0].seed


def _judge(gate: Gate, cell: Cell) -> Verdict:
    ended = any(r.failed or r.stopped is not None for r in cell.runs.values())
    if gate.limit is None:
        met = not ended and not cell.interventions and cell.same_bits
        return Verdict(gate, met, f"{cell.done()}; {'same bits' if cell.same_bits else 'OTHER BITS'}")
    mean = statistics.fmean(cell.excess)  # NaN where any run has none
    return Verdict(gate, not ended and mean <= gate.limit, f"{cell.loss()} ({cell.done()})")


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{spread}"


def _share(some: int, of: int) -> str:
    return "" if some == of else f" ({some} of {of})"


def _span(steps: Iterator[int | None]) -> str:
    known = sorted({step for step in steps if step is not None})
    return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def tables(results: Results) -> list[str]:
    """Markdown: excess losses, then what was done, then what the faults look like where nothing is done."""
    injections = [name for name in INJECTIONS if any(job.injection == name for job in results)]
    mitigations = [name for name in MITIGATIONS if any(job.mitigation == name for job in results)]
    shown = [name for name in injections if any(Cell.of(results, name, m) for m in mitigations)]
    head = ["| |" + "".join(f" {MITIGATIONS[name][0]} |" for name in mitigations), "|---|" + "---:|" * len(mitigations)]

    def rows(show: str) -> list[str]:
        cells = {i: [Cell.of(results, i, m) for m in mitigations] for i in shown}
        return [
            f"| {INJECTIONS[i].title} |" + "".join(f" {getattr(cell, show)() if cell else ''} |" for cell in cells[i])
            for i in shown
        ]

    return [
        *["## Excess validation loss", "", *head, *rows("loss"), ""],
        *["## What was done, per run", "", *head, *rows("done"), ""],
        *["## Gradient norms without anything", "", *_norms(results, shown), ""],
    ]


def _norms(results: Results, injections: list[str]) -> list[str]:
    rows = [
        "| | healthy steps, median | most before the first fault | broken steps, median | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in injections:
        cell = Cell.of(results, name, "none")
        if cell is None:
            continue
        healthy, most, broken = (
            statistics.fmean(getattr(r, field) for r in cell.runs.values())
            for field in ("healthy_norm", "most_healthy_norm", "fault_norm")
        )
        seen = f"{broken:.3g} | x{broken / healthy:.3g}" if math.isfinite(broken) else "- | -"
        rows.append(f"| {INJECTIONS[name].title} | {healthy:.3f} | {most:.3f} | {seen} |")
    return rows
