"""Does gradmon save runs? Real training with faults injected, with nothing done, with published guards, with gradmon.

    python tests/bench/faults.py [--seeds 3] [--only corrupted,lr_glitch] [--mitigations none,gradmon] [--steps 500]
                                 [--json runs.json] [--reuse runs.json] [--out results.md] [--final-norm] [--jobs 2]
    python tests/bench/faults.py --subset

Prints a Markdown document, progress to stderr, and ends with exit code 1 if a gate is missed. `--subset` is for CI: one
seed of a shorter run, gates of its own, some 2 minutes on two busy cores.

`--reuse` takes the runs that gradmon has no part in from an earlier `--json` of the same code, corpus and machine:
while gradmon is tuned only its own runs are made again. Its settings can be tried through the environment:
`GRADMON_CLIP__RESCALE_FIRST=0 python tests/bench/faults.py --only corrupted,early --mitigations gradmon --seeds 1`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import bytegpt
import torch
from fault_report import GATES, Gate, Results, judge, tables, vacuous
from fault_runs import Job, Result, run_all
from injections import INJECTIONS
from mitigations import GRADMON, MITIGATIONS
from overhead import machine

#: What is worth a run: guards of one process, and those that speak of ranks.
_PUBLISHED = ("none", "clip", "zclip", "skipstep", "skipstep_clip")
_ONE_PROCESS = (*_PUBLISHED, "gradmon", "rollback")
MATRIX: Mapping[str, Sequence[str]] = {
    **{name: _ONE_PROCESS for name, injection in INJECTIONS.items() if injection.ranks == 1},
    "control": ("none",),
    "ddp_clean": ("none", "gradmon", "leave_out"),
    "rank_nan": (*_PUBLISHED, "gradmon", "leave_out"),
    "rank_nan_fifth": (*_PUBLISHED, "gradmon", "leave_out"),
    "rank_dead": (*_PUBLISHED, "gradmon", "no_stop", "leave_out"),
}

#: CI makes the runs of one seed, without what another run covers: Inf goes NaN's way, spikes past step 100 are the easy
#: case of early ones. Limits are for 300 steps: the mean of seeds 0 to 2 and three times their spread, since another
#: processor rounds differently, which is much like another seed. Corrupted batches alone have one seed of the three far
#: from the others; theirs is half of what such batches cost without anything.
SUBSET_STEPS = 300
SUBSET_GATES = (
    Gate("clean", "gradmon", None),
    Gate("corrupted", "gradmon", 0.045),
    Gate("nan", "gradmon", 0.015),
    Gate("lr_glitch", "gradmon", 0.25),
    Gate("lr_glitch", "rollback", 0.15),
    Gate("ddp_clean", "leave_out", None),
    Gate("rank_dead", "leave_out", 0.06),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument("--only", default="", help=f"injections, with commas between: {', '.join(INJECTIONS)}")
    parser.add_argument("--mitigations", default="", help=f"with commas between: {', '.join(MITIGATIONS)}")
    parser.add_argument("--steps", type=int, default=bytegpt.STEPS, help="of a run (default: %(default)s)")
    parser.add_argument("--final-norm", action="store_true", help="a model that can't explode, see bytegpt.py")
    parser.add_argument("--jobs", type=int, default=2, help="runs of one process at once (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to keep every run; written as they end")
    parser.add_argument("--reuse", type=Path, help="an earlier --json")
    parser.add_argument("--out", type=Path, help="where to write the Markdown too")
    parser.add_argument("--subset", action="store_true", help="what CI runs")
    args = parser.parse_args()
    if args.subset:
        results, gates = run_subset(args.jobs), SUBSET_GATES
    else:
        only = _names(parser, args.only, INJECTIONS)
        jobs = plan(only, _names(parser, args.mitigations, MITIGATIONS), args.seeds, args.steps, args.final_norm)
        results, gates = make(jobs, args.jobs, args.reuse, args.json), GATES
    lines = document(results, gates)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return int(any(not verdict.met for verdict in judge(results, gates)) or bool(vacuous(results, gates)))


def _names(parser: argparse.ArgumentParser, given: str, known: Mapping[str, object]) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def plan(
    only: Sequence[str], mitigations: Sequence[str], seeds: int, steps: int, final_norm: bool = False
) -> list[Job]:
    """Every run asked for, and the clean ones they are compared with.

    Nothing named is everything. A pair that is not in the matrix is run where no other is named.
    """
    pair = len(only) == len(mitigations) == 1
    wanted = [
        Job(injection, mitigation, seed, steps, final_norm)
        for seed in range(seeds)
        for injection in only or INJECTIONS
        for mitigation in mitigations or MATRIX[injection]
        if pair or mitigation in MATRIX[injection]
    ]
    return list(dict.fromkeys([*(job.baseline for job in wanted), *wanted]))


def make(jobs: Sequence[Job], processes: int, reuse: Path | None = None, keep: Path | None = None) -> Results:
    """Run what is not known yet."""
    known = _known(reuse) if reuse else {}
    results = {job: known[job] for job in jobs if job in known and job.mitigation not in GRADMON}
    left = [job for job in jobs if job not in results]
    if results:
        _say(f"{len(results)} runs taken from {reuse}")
    bytegpt.corpus()  # an unfit Python is told of before anything starts
    progress = _Progress(len(left))

    def tell(job: Job, result: Result) -> None:
        results[job] = result
        progress.show(job, result, results.get(job.baseline))
        if keep:
            _keep(keep, results)

    run_all(left, processes, tell)
    return {job: results[job] for job in jobs}


def run_subset(processes: int = 2) -> Results:
    """What CI runs: the gates' runs, and those without anything, which must miss them."""
    gated = [(gate.injection, gate.mitigation) for gate in SUBSET_GATES]
    pairs = dict.fromkeys([*gated, *((injection, "none") for injection, _ in gated)])
    jobs = [Job(injection, mitigation, 0, SUBSET_STEPS) for injection, mitigation in pairs]
    return make(list(dict.fromkeys([*(job.baseline for job in jobs), *jobs])), processes)


class _Progress:
    """A line per run, with the time that is left."""

    def __init__(self, runs: int) -> None:
        self._runs, self._done = runs, 0
        self._began = time.monotonic()

    def show(self, job: Job, result: Result, baseline: Result | None) -> None:
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._runs - self._done)
        if result.failed:
            outcome = f"FAILED: {result.failed.strip().splitlines()[-1]}"
        else:
            outcome = f"loss {result.validation:.4f}"
            outcome += f" ({result.validation - baseline.validation:+.4f})" if baseline else ""
            outcome += "".join(f", {count} {name}" for name, count in result.counts.items())
            outcome += f", dead at {result.dead}" if result.dead else ""
            outcome += f", stopped at {result.stopped}" if result.stopped else ""
        _say(f"[{self._done}/{self._runs}] {job}: {outcome}; {result.seconds:.1f} s, {left:.0f} s left")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def document(results: Results, gates: tuple[Gate, ...]) -> list[str]:
    """Markdown of everything."""
    some = next(iter(results))
    seeds = sorted({job.seed for job in results})
    lines = [
        "# Faults in real training",
        "",
        f"{machine()}; one thread per process; {some.steps} steps, seeds {', '.join(map(str, seeds))}"
        f"{', with a norm before the head' if some.final_norm else ''}",
        "",
        "Validation loss minus that of the same seed's clean run without anything; mean and standard deviation over "
        "the seeds.",
        "",
        *_settings(),
        *tables(results),
        "## Gates",
        "",
        *(f"- {verdict}" for verdict in judge(results, gates)),
        *(f"- MISSED {gate}: also met without anything, so it says nothing" for gate in vacuous(results, gates)),
    ]
    failures = [f"{job}:\n{result.failed}" for job, result in results.items() if result.failed]
    return lines + (["", "## Failed runs", "", "```", *failures, "```"] if failures else [])


def _settings() -> list[str]:
    """What the environment sets in gradmon: figures of such a run are not those of the defaults."""
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("GRADMON_")]
    return [f"Not the defaults: {', '.join(found)}", ""] if found else []


def _fingerprint() -> str:
    """Of everything that shapes runs without gradmon."""
    here = Path(__file__).parent
    names = ("bytegpt.py", "injections.py", "mitigations.py", "fault_runs.py", "published.py")
    parts = [*((here / name).read_bytes() for name in names), *(t.numpy().tobytes() for t in bytegpt.corpus())]
    parts.append(f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _keep(path: Path, results: Results) -> None:
    runs = [{**dataclasses.asdict(job), **dataclasses.asdict(result)} for job, result in results.items()]
    whole = path.with_suffix(".whole")
    whole.write_text(json.dumps({"machine": machine(), "fingerprint": _fingerprint(), "runs": runs}, indent=1))
    whole.replace(path)


def _known(path: Path) -> dict[Job, Result]:
    """Runs of an earlier time, if they would come out the same now; failed ones are made again."""
    with contextlib.suppress(FileNotFoundError):
        kept = json.loads(path.read_text())
        if kept["fingerprint"] != _fingerprint():
            _say(f"{path} is of other code, corpus, torch or processor: not taken")
            return {}
        jobs = [Job(*(run.pop(f.name) for f in dataclasses.fields(Job))) for run in kept["runs"]]
        return {job: Result(**run) for job, run in zip(jobs, kept["runs"], strict=True) if not run["failed"]}
    return {}


if __name__ == "__main__":
    sys.exit(main())
