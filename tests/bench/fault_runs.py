"""One run: a training with a fault and something done about it. And many of them, in processes that stay up.

Runs of one process go to a pool, runs of two ranks one after the other to a pair of gloo processes. A run that raises
is a failed run, not the end of the benchmark.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import bytegpt
import torch
import torch.distributed as dist
from injections import INJECTIONS, RATE, SPIKE, break_element, noise
from mitigations import MITIGATIONS, Nothing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
import ranks

#: Seconds that a run of two ranks may take.
_RANK_SECONDS = 600


@dataclass(frozen=True)
class Job:
    """What to run; names are those of INJECTIONS and MITIGATIONS."""

    injection: str
    mitigation: str
    seed: int
    steps: int = bytegpt.STEPS
    final_norm: bool = False

    @property
    def baseline(self) -> Job:
        """The run of the same seed in which nothing goes wrong and nothing is done."""
        return dataclasses.replace(self, injection=INJECTIONS[self.injection].baseline, mitigation="none")

    def __str__(self) -> str:
        return f"{self.injection} / {self.mitigation} / seed {self.seed}"


@dataclass
class Result:
    """What came of a run."""

    validation: float = math.nan
    """Unscaled loss on the held-out bytes after the last step made; NaN where the weights are."""
    digest: str = ""
    """Of all weights."""
    counts: dict[str, int] = field(default_factory=dict)
    """skipped, clipped, left_out: steps. backoff, rollback, stop, errors: how often gradmon told of one."""
    stopped: int | None = None
    """Step before which gradmon ended the run."""
    dead: int | None = None
    """Step after which the weights were not finite; the run ends there."""
    healthy_norm: float = math.nan
    """Median of the healthy steps in the last nine tenths."""
    most_healthy_norm: float = math.nan
    """Of the steps before the first fault."""
    fault_norm: float = math.nan
    """Median of the broken steps, of the finite ones among them."""
    seconds: float = math.nan
    events: list[str] = field(default_factory=list)
    """What gradmon told, each with its step."""
    failed: str = ""
    """Why there is no result."""


def run(job: Job, directory: str) -> Result:
    """Train here; on two ranks both are called."""
    torch.set_num_threads(1)
    quiet = logging.getLogger("gradmon")
    if not quiet.handlers:
        quiet.addHandler(logging.NullHandler())  # what it says is in its journal
    began = time.perf_counter()
    try:
        training = _Training(job, Path(directory))
        training.go()
        result = training.result()
    except Exception:
        result = Result(failed=traceback.format_exc())
    return dataclasses.replace(result, seconds=time.perf_counter() - began)


class _Training:
    def __init__(self, job: Job, directory: Path) -> None:
        self._job = job
        self._injection = INJECTIONS[job.injection]
        self._schedule = self._injection.schedule(job.steps)
        self._rank = dist.get_rank() if self._injection.ranks > 1 else 0
        torch.manual_seed(job.seed)
        self._model = bytegpt.ByteGPT(final_norm=job.final_norm)
        self._trained: nn.Module = self._model
        if self._injection.ranks > 1:
            self._trained = DistributedDataParallel(self._model)
        self._mitigation: Nothing = MITIGATIONS[job.mitigation][1]()
        self._optimizer = self._mitigation.optimizer(self._model.parameters())
        self._stopped: int | None = None
        self._dead: int | None = None
        self._directory = directory

    def go(self) -> None:
        """Until the end, or until gradmon stops it, or until the weights are lost."""
        job = self._job
        generator = torch.Generator().manual_seed(1000 + job.seed)
        self._mitigation.start(self._trained, self._optimizer, self._directory)
        try:
            for step in range(1, job.steps + 1):
                batch = bytegpt.draw(generator)
                try:
                    self._step(step, batch)
                except SystemExit:  # gradmon.TrainingStopped
                    self._stopped = step
                    break
                if not self._alive():  # they never recover: the rest of the run is saved
                    self._dead = step
                    break
        finally:
            self._mitigation.finish()

    def _step(self, step: int, batch: tuple[Tensor, Tensor]) -> None:
        job, optimizer, world_size = self._job, self._optimizer, self._injection.ranks
        kind = self._schedule.get(step) if self._rank == world_size - 1 else None
        inputs, targets = noise(batch[0], job.seed, step) if kind == "noise" else batch
        for group in optimizer.param_groups:
            group["lr"] = bytegpt.learning_rate(step, job.steps) * (RATE if kind == "rate" else 1.0)
        inputs, targets = (whole.chunk(world_size)[self._rank] for whole in (inputs, targets))
        weight = bytegpt.LOSS_SCALE * {"spike": SPIKE, "nan_loss": math.nan}.get(kind or "", 1.0)
        loss = bytegpt.loss_of(self._trained, inputs, targets) * weight
        optimizer.zero_grad()
        loss.backward()
        if kind in ("nan_element", "inf_element"):
            break_element(self._model, kind, sorted(self._schedule).index(step))
        loss = loss.detach()
        self._mitigation.before_step(loss)
        if kind != "not_taken":
            optimizer.step()
        self._mitigation.after_step(loss)

    def _alive(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self._model.parameters())

    def result(self) -> Result:
        """Validate, and sum up."""
        norms = dict(enumerate(self._mitigation.norms, start=1))
        first = min(self._schedule, default=self._job.steps + 1)
        alive = self._alive()
        return Result(
            validation=bytegpt.validate(self._model) if alive else math.nan,
            digest=bytegpt.digest(self._model.parameters()),
            counts={name: int(count) for name, count in self._mitigation.counts.items() if count},
            stopped=self._stopped,
            dead=self._dead,
            healthy_norm=_median(n for s, n in norms.items() if s not in self._schedule and self._job.steps // 10 < s),
            most_healthy_norm=max((n for s, n in norms.items() if s < first), default=math.nan),
            fault_norm=_median(n for s, n in norms.items() if s in self._schedule),
            events=self._mitigation.events,
        )


def _median(norms: Iterator[float]) -> float:
    finite = [n for n in norms if math.isfinite(n)]
    return statistics.median(finite) if finite else math.nan


def run_all(jobs: Sequence[Job], processes: int, tell: Callable[[Job, Result], None]) -> dict[Job, Result]:
    """Run them all.

    Args:
        jobs: in any order.
        processes: of the pool for runs of one process.
        tell: called after each run.
    """
    found: dict[Job, Result] = {}

    def take(job: Job, result: Result) -> None:
        found[job] = result
        shutil.rmtree(home / _folder(job), ignore_errors=True)
        tell(job, result)

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        home = Path(folder)
        single = [job for job in jobs if INJECTIONS[job.injection].ranks == 1]
        context = ranks.context()
        if single:
            with ProcessPoolExecutor(min(processes, len(single)), mp_context=context) as pool:
                waiting = {pool.submit(run, job, str(home / _folder(job))): job for job in single}
                for future in as_completed(waiting):
                    error = future.exception()  # of a process that died
                    take(waiting[future], future.result() if error is None else Result(failed=repr(error)))
        double = [job for job in jobs if INJECTIONS[job.injection].ranks == 2]
        ranks.SECONDS = _RANK_SECONDS
        pair = ranks.Ranks(2)
        try:
            for job in double:
                take(job, _run_on_ranks(pair, job, str(home / _folder(job))))
        finally:
            pair.stop()
    return found


def _run_on_ranks(pair: ranks.Ranks, job: Job, directory: str) -> Result:
    """Rank 0's result; a failure where a rank failed or the replicas no longer agree."""
    try:
        results: list[Result] = pair.run(run, job, directory)
    except Exception as error:  # a rank that died or hung
        return Result(failed=f"{type(error).__name__}: {error}")
    for result in results:
        if result.failed:
            pair.stop()  # the other rank may be out of step
            return result
    if len({result.digest for result in results}) > 1 and results[0].dead is None:
        return dataclasses.replace(results[0], failed="the ranks no longer hold the same weights")
    return results[0]


def _folder(job: Job) -> str:
    return f"{job.injection}-{job.mitigation}-{job.seed}"
