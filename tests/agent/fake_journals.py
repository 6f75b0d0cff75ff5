"""Fake ranks that write real journals, a simulated run worth looking at, and an agent in a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from array import array
from collections.abc import Sequence
from pathlib import Path

from gradmon.agent.launch import AgentOptions, wait_for_agent
from gradmon.journal import JournalWriter, journal_path
from gradmon.record import DETAIL_COLUMNS, Detail, Event, RankIdentity, StepRecord

ROOT = Path(__file__).resolve().parents[2]


def identity(run="demo", instance="i1", attempt=0, rank=0, world_size=1, **changes) -> RankIdentity:
    facts = {
        "local_rank": rank,
        "host": "node-a",
        "pid": os.getpid(),
        "device": "cpu",
        "mode": "guard",
        "topology": "ddp" if world_size > 1 else "single",
        "script": "train.py",
        "version": "0.1.0",
        "started_seconds": time.time(),
    }
    return RankIdentity(
        run=run, instance=instance, attempt=attempt, rank=rank, world_size=world_size, **facts | changes
    )


def record(step: int, **changes) -> StepRecord:
    facts = {
        "step": step,
        "wall_seconds": time.time(),
        "step_seconds": 0.1,
        "grad_norm": 1.0 + step / 1000,
        "grad_norm_applied": 1.0 + step / 1000,
        "grad_norm_limit": 4.0,
        "local_grad_norm": 1.5,
        "nan_count": 0,
        "inf_count": 0,
        "local_nan_count": 0,
        "local_inf_count": 0,
        "action": "none",
        "reason": "healthy",
        "applied": True,
        "culprit_rank": None,
        "parameter": None,
        "learning_rate": 1e-3,
        "learning_rate_scale": 1.0,
        "loss": 2.0,
        "memory_bytes": 300 << 20,
    }
    return StepRecord(**facts | changes)


def nonfinite(step: int, *, here: bool = True, rank: int = 0, **changes) -> StepRecord:
    """A skipped step whose gradients broke on `rank`; `here` if that is the rank that writes it."""
    return record(
        step,
        **{
            "grad_norm": math.nan,
            "grad_norm_applied": 0.0,
            "local_grad_norm": math.nan if here else 1.5,
            "nan_count": 64,
            "local_nan_count": 64 if here else 0,
            "action": "skip",
            "reason": "nonfinite",
            "culprit_rank": rank,
            "parameter": "blocks.3.mlp.weight",
            **changes,
        },
    )


def event(of: StepRecord, message: str = "") -> Event:
    said = message or f"{of.reason} on rank {of.culprit_rank}: {of.action}"
    return Event(of.step, of.wall_seconds, of.reason, of.action, of.applied, of.culprit_rank, of.parameter, said)


def row(norm: float = 1.0, **changes: float) -> list[float]:
    """Statistics of a parameter of 8 elements, as a row of a `Detail`; all but what is named is made up."""
    facts = {
        "sum_of_squares": norm**2,
        "nan_count": 0.0,
        "inf_count": 0.0,
        "zero_count": 2.0,
        "abs_max": norm / 2,
        "minimum": -norm / 2,
        "maximum": norm / 3,
        "update_ratio": 1e-3,
    }
    return [(facts | changes)[name] for name in DETAIL_COLUMNS]


#: A parameter without a gradient.
NO_GRADIENT = [math.nan] * len(DETAIL_COLUMNS)


def detail(step: int, *rows: list[float]) -> Detail:
    return Detail(step, "global", array("d", [value for one in rows for value in one]).tobytes())


class Landed:
    """A step whose numbers are there already."""

    def __init__(self, record: StepRecord, events: list[Event], details: Sequence[Detail] = ()) -> None:
        self._answer = record, events
        self._details = details

    def landed(self) -> bool:
        return True

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        return self._answer

    def details(self) -> list[Detail]:
        return list(self._details)

    def findings(self) -> list[Event]:
        return []


class FakeRank:
    """A living rank: holds its journal's lock until `end`, as the training process does."""

    def __init__(
        self,
        directory: Path,
        who: RankIdentity,
        sample=None,
        *,
        parameters: Sequence[str] = ("w",),
        elements: Sequence[int] | None = None,
        metrics: dict[str, object] | None = None,
    ) -> None:
        self.identity = who
        self.parameters = list(parameters)
        self.writer = JournalWriter(
            journal_path(directory, who),
            who,
            parameters=self.parameters,
            elements=[8] * len(self.parameters) if elements is None else elements,
            config={} if metrics is None else {"metrics": metrics},
            sample=lambda: sample if sample is not None else {"resident_memory_bytes": 300e6, "cpu_seconds": 12.5},
        )
        self.path = self.writer.path

    def step(self, *records: StepRecord, tell: bool = True) -> FakeRank:
        """Write steps, with an event for each that is not healthy."""
        for one in records:
            self.writer.put(Landed(one, [event(one)] if tell and not one.healthy else []))
        assert self.writer.flush(30)
        return self

    def detailed(self, *details: Detail) -> FakeRank:
        """Write healthy steps with their details."""
        for one in details:
            self.writer.put(Landed(record(one.step), [], [one]))
        assert self.writer.flush(30)
        return self

    def tell(self, *events: Event) -> FakeRank:
        for one in events:
            self.writer.put(one)
        assert self.writer.flush(30)
        return self

    def end(self, end="finished", detail: str = "") -> None:
        self.writer.close(end, detail)


def explode(rank: FakeRank, step: int) -> None:
    """Four spikes of this rank in a row, with the back-off they cause, and a NaN after them."""
    culprit = {"culprit_rank": rank.identity.rank, "parameter": "blocks.3.mlp.weight"}
    for place in range(4):
        action = "skip" if place else "rescale"
        rank.step(record(step + place, grad_norm=900.0, reason="spike", action=action, **culprit))
    said = "4 spikes within 16 steps: learning rate lowered to x0.3"
    rank.tell(
        Event(
            step + 3, time.time(), "spike_streak", "backoff", True, culprit["culprit_rank"], culprit["parameter"], said
        )
    )
    rank.step(nonfinite(step + 4, rank=rank.identity.rank))


_DEAD = """
import os, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from fake_journals import FakeRank, identity, nonfinite, record
rank = FakeRank(Path({directory!r}), identity(**{who!r}))
for step in range({first}, {first} + {steps}):
    rank.step(nonfinite(step, rank={who!r}.get("rank", 0)) if step in {broken!r} else record(step))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def rank_process(directory: Path, steps: int = 5, first: int = 1, broken=(), **who):
    """A rank in a process of its own; SIGKILL it to see what a killed rank leaves."""
    code = _DEAD.format(
        paths=[str(Path(__file__).parent), str(ROOT)],
        directory=str(directory),
        who=who,
        steps=steps,
        first=first,
        broken=tuple(broken),
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_rank(directory: Path, **what) -> None:
    """What a rank leaves that was killed after some steps."""
    with rank_process(directory, **what) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()


def simulate(ranks: list[FakeRank], first: int, last: int, seed: int = 7, step_seconds: float = 0.12) -> None:
    """Steps of a small language model's training: a NaN on rank 1 at step 150, a spike at 230 and 231 with a back-off.

    The wall times lie in the past, as if the last step had ended just now.
    """
    rng = random.Random(seed)
    scale = 1.0
    now = time.time()
    norms = [_norm(step, rng) for step in range(1, last + 1)]
    for step in range(1, last + 1):
        norm = norms[step - 1]
        median = sorted(norms[max(0, step - 65) : step])[min(step, 65) // 2]
        scale = min(1.0, scale * 1.02) if step > 1 else 1.0
        if step == 232:
            scale *= 0.5
        shared = {
            "wall_seconds": now - (last - step) * step_seconds,
            "step_seconds": step_seconds * (1 + 0.1 * rng.random()),
            "grad_norm": norm,
            "grad_norm_applied": norm,
            "grad_norm_limit": 4 * median if step > 8 else None,
            "learning_rate_scale": scale,
            **_FULL,
        }
        kind = {150: "nonfinite", 230: "spike", 231: "spike"}.get(step, "healthy")
        if kind == "spike":
            shared |= {"grad_norm": norm * 30, "grad_norm_applied": median, "action": "rescale", "reason": "spike"}
            shared |= {"parameter": "blocks.0.attn.qkv.weight", "culprit_rank": 0}
        for rank in ranks:
            number = rank.identity.rank
            local = norm * (1.25 + 0.1 * rng.random()) * (30 if kind == "spike" and number == 0 else 1)
            own = {
                "local_grad_norm": local,
                "loss": 1.2 + 3.4 * math.exp(-step / 90) + 0.06 * rng.gauss(0, 1) + 0.02 * number,
                "memory_bytes": int((310 + 14 * min(step, 60) / 60 + 9 * number) * 2**20),
            }
            if kind == "nonfinite":
                one = nonfinite(
                    step,
                    here=number == 1,
                    rank=1,
                    **_only_time(shared),
                    loss=own["loss"],
                    memory_bytes=own["memory_bytes"],
                )
            else:
                one = record(step, **shared, **own)
            if step >= first:
                full = [detail(step, *(row(norm) for _ in rank.parameters))] if step % 10 == 0 else []
                rank.writer.put(Landed(one, _told(one), full))
    for rank in ranks:
        assert rank.writer.flush(30)


#: What a step with full statistics has beside the norms.
_FULL = {
    "grad_abs_max": 0.5,
    "grad_min": -0.5,
    "grad_max": 0.4,
    "zero_count": 16,
    "element_count": 64,
    "local_grad_norm_rms": 1.4,
    "local_grad_norm_max": 1.6,
    "healthy_ranks": 2,
    "mean_loss": 2.0,
    "max_loss": 2.5,
    "loss_scale": 65536.0,
    "noise_scale_ratio": 1.5,
    "update_ratio": 1e-3,
}


def _norm(step: int, rng: random.Random) -> float:
    return 0.35 * (1 + 9 * (1 + step / 20) ** -1.4) * math.exp(0.12 * rng.gauss(0, 1))


def _only_time(shared: dict) -> dict:
    kept = ("wall_seconds", "step_seconds", "grad_norm_limit", "learning_rate_scale")
    return {name: shared[name] for name in kept}


def _told(one: StepRecord) -> list[Event]:
    if one.reason == "nonfinite":
        seen = f"{one.nan_count} NaN and 0 Inf gradient elements on rank 1, {one.parameter}: skipped the step"
        return [event(one, seen)]
    if one.reason == "spike":
        seen = f"gradient norm {one.grad_norm:.3g} above the limit {one.grad_norm_limit:.3g} on rank 0, {one.parameter}"
        events = [event(one, f"{seen}: rescaled to {one.grad_norm_applied:.3g}")]
        if one.step == 231:
            done = "2 spikes in a row: learning rate lowered to x0.5, back to x1 by x1.02 per healthy step"
            events.append(Event(one.step, one.wall_seconds, "spike_streak", "backoff", True, 0, one.parameter, done))
        return events
    return []


class AgentProcess:
    """`run_agent` in a process of its own. `context` trusts the certificate of one that serves HTTPS."""

    def __init__(self, directory: Path, *, linger=None, prelude="", context=None, user=None, **options) -> None:
        self.directory = directory
        self._context = context
        chosen = AgentOptions(**{"port": 0, **options}, linger_seconds=linger)
        code = (
            f"{prelude}\nimport sys; from pathlib import Path\nfrom gradmon.agent import AgentOptions, run_agent\n"
            f"sys.exit(run_agent(Path({str(directory)!r}), {chosen!r}))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT, user=user
        )

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def address(self) -> str:
        """Where it serves."""
        address = wait_for_agent(self.directory, 20)
        assert address is not None, self.end()
        return address

    def get(self, path: str, accept: str = "") -> str:
        return get(self.address + path, accept, self._context)

    def json(self, path: str):
        return json.loads(self.get(path))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and wait: (exit code, what it logged)."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, timeout: float = 20) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=timeout)
        return self.process.returncode, log


def get(url: str, accept: str = "", context=None) -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20, context=context) as answer:
        return answer.read().decode()


def until(condition, timeout: float = 20):
    """The first true answer of `condition`, asked until `timeout`."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"still {answer!r} after {timeout} s"
        time.sleep(0.05)
