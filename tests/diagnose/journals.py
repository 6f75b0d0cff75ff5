"""Real journals of runs that never were: what ranks write, through the real writer, for reports to be made of."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import fake_journals
from fake_journals import Landed, row

from gradmon.config import Config
from gradmon.journal import JournalWriter, journal_path
from gradmon.record import Detail, Event, RankIdentity, StepRecord

ROOT = Path(__file__).resolve().parents[2]
#: Unix time at which all these runs begin.
BEGAN = 1_760_000_000.0
PARAMETERS = (
    "token.weight",
    *(f"blocks.{i}.{part}.weight" for i in range(4) for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")),
    "norm.weight",
    "head.weight",
)
#: A setting that is a little different from the defaults.
CONFIG = Config().to_dict()


def identity(run="gpt-small", instance="i1", attempt=0, rank=0, world_size=1, **changes) -> RankIdentity:
    facts = {
        "local_rank": rank % 8,
        "host": f"node-{'abcdefgh'[rank // 8 % 8]}",
        "pid": 1000 + rank,
        "device": "NVIDIA H100",
        "started_seconds": BEGAN + 3600 * attempt,
    }
    return fake_journals.identity(run, instance, attempt, rank, world_size, **facts | changes)


def record(step: int, **changes) -> StepRecord:
    """A healthy step."""
    facts = {
        "wall_seconds": BEGAN + 0.1 * step,
        "grad_norm": 1.0,
        "grad_norm_applied": 1.0,
        "grad_norm_limit": 4.0 if step > 8 else None,
        "local_grad_norm": 1.2,
        "memory_bytes": 3 << 30,
    }
    return fake_journals.record(step, **facts | changes)


def nonfinite(step: int, *, rank: int | None, here: bool, **changes) -> StepRecord:
    """A skipped step that broke on `rank`; `here` if that one writes it."""
    own = {} if here else {"local_grad_norm": 1.2}
    facts = {"wall_seconds": BEGAN + 0.1 * step, "parameter": "blocks.2.mlp.up.weight", "memory_bytes": 3 << 30}
    facts |= {"grad_norm_limit": 4.0 if step > 8 else None, **own}
    return fake_journals.nonfinite(step, rank=rank, here=here, **facts | changes)


def spike(step: int, *, rank: int | None = 0, **changes) -> StepRecord:
    """A rescaled step."""
    facts = {
        "grad_norm": 30.0,
        "action": "rescale",
        "reason": "spike",
        "culprit_rank": rank,
        "parameter": "blocks.0.attn.qkv.weight",
    }
    return record(step, **facts | changes)


def event(of: StepRecord, message: str = "", **changes) -> Event:
    """What gradmon tells of a step, or of what it shows together with others."""
    facts = {
        "step": of.step,
        "wall_seconds": of.wall_seconds,
        "kind": of.reason,
        "action": of.action,
        "applied": of.applied,
        "rank": of.culprit_rank,
        "parameter": of.parameter,
        "message": message or f"{of.reason} on rank {of.culprit_rank}, {of.parameter}: {of.action}",
    }
    return Event(**facts | changes)


def detail(step: int, rows: Sequence[Sequence[float]], place="global") -> Detail:
    return Detail(step, place, array("d", [value for row in rows for value in row]).tobytes())


class WritingRank:
    """A rank that writes its journal; `end` it, or let its process be killed."""

    def __init__(
        self, directory: Path, who: RankIdentity, *, parameters=PARAMETERS, config=CONFIG, sample=None
    ) -> None:
        self.identity = who
        self.parameters = list(parameters)
        self.writer = JournalWriter(
            journal_path(directory, who),
            who,
            parameters=self.parameters,
            elements=[4096] * len(self.parameters),
            config=config,
            sample=lambda: sample or {"resident_memory_bytes": 3e9},
        )
        self.path = self.writer.path
        self._put = 0

    def step(self, one: StepRecord, *events: Event, details: Sequence[Detail] = ()) -> None:
        self.writer.put(Landed(one, events, details))
        self._put += 1
        if self._put % 200 == 0:
            self.flush()

    def tell(self, *events: Event) -> None:
        for one in events:
            self.writer.put(one)

    def flush(self) -> None:
        assert self.writer.flush(60)

    def end(self, end="finished", said: str = "") -> None:
        self.flush()
        self.writer.close(end, said)


#: (rank, step) -> the step, and what is told of it.
Script = Callable[[int, int], tuple[StepRecord, list[Event]]]


def write_run(directory: Path, script: Script, *, ranks=1, of=None, steps=300, first=1, details=True, **who) -> Path:
    """A run that finished, all of its ranks or some `of` them: the directory it lies in."""
    for number in range(ranks):
        rank = WritingRank(directory, identity(rank=number, world_size=of or ranks, **who))
        for step in range(first, first + steps):
            one, events = script(number, step)
            due = details and number == 0 and step % 50 == 0
            rank.step(one, *events, details=[detail(step, profile(one.grad_norm))] if due else ())
        rank.end()
    return directory


def profile(norm: float) -> list[list[float]]:
    """Rows of all PARAMETERS whose norms make up `norm`."""
    weights = [1 + 0.5 * math.sin(i) for i in range(len(PARAMETERS))]
    whole = math.sqrt(sum(weight**2 for weight in weights))
    return [row(norm * weight / whole if math.isfinite(norm) else 1.0) for weight in weights]


def healthy(seed: int = 0, *, noise_of_rank: int = 0) -> Script:
    """A small language model's training, as it should be."""
    shared = random.Random(seed)
    noises = [shared.gauss(0, 1) for _ in range(4096)]
    own = random.Random(seed + 1 + noise_of_rank)

    def script(rank: int, step: int) -> tuple[StepRecord, list[Event]]:
        norm = 0.35 * (1 + 9 * (1 + step / 20) ** -1.4) * math.exp(0.12 * noises[step % 4096])
        mean = 1.2 + 3.4 * math.exp(-step / 90) + 0.03 * noises[(step + 7) % 4096]
        warm = min(1.0, step / 50)
        made = record(
            step,
            grad_norm=norm,
            grad_norm_applied=norm,
            grad_norm_limit=4 * 0.35 * (1 + 9 * (1 + step / 20) ** -1.4) if step > 8 else None,
            local_grad_norm=norm * (1.25 + 0.1 * own.random()),
            learning_rate=6e-4 * warm * (0.55 + 0.45 * math.cos(step / 260)),
            loss=mean + 0.06 * own.gauss(0, 1),
            mean_loss=mean,
            step_seconds=0.12 * (1 + 0.08 * own.random()),
            busy_seconds=0.1 * (1 + 0.05 * own.random()),
            data_wait_seconds=0.0015,
            memory_bytes=int((31 + 1.4 * min(step, 60) / 60 + 0.4 * (rank % 8)) * 2**30),
            update_ratio=1e-3 if step % 100 == 0 else None,
        )
        return made, []

    return script


_OF_THE_STEP = (
    "wall_seconds",
    "step_seconds",
    "grad_norm_limit",
    "learning_rate",
    "loss",
    "mean_loss",
    "memory_bytes",
    "busy_seconds",
    "data_wait_seconds",
)


def troubled(seed: int = 0, *, bad_rank: int = 1) -> Script:
    """The same with a NaN on one rank again and again from step 120 on, and two bursts of spikes with a back-off."""
    usual = healthy(seed)

    def script(rank: int, step: int) -> tuple[StepRecord, list[Event]]:
        one, _ = usual(rank, step)
        kept = {name: getattr(one, name) for name in _OF_THE_STEP}
        if 230 <= step < 262:
            scale = min(1.0, 0.3 * 1.05 ** (step - 230))
            norms = {name: getattr(one, name) for name in ("grad_norm", "grad_norm_applied", "local_grad_norm")}
            return record(step, **kept, **norms, learning_rate_scale=scale), []
        if step in (120, 310, 333, 520):
            broken = nonfinite(step, rank=bad_rank, here=rank == bad_rank, micro_step=2, **kept)
            where = f"on rank {bad_rank}, {broken.parameter}, micro-step 2"
            return broken, [event(broken, f"64 NaN and 0 Inf gradient elements {where}: skipped the step")]
        if 226 <= step < 230 or 600 <= step < 603:
            norms = {"grad_norm": 18.0 + step % 5, "grad_norm_applied": 0.42}
            big = spike(step, rank=0, **kept, **norms, local_grad_norm=30.0 if rank == 0 else 0.6)
            seen = f"gradient norm {big.grad_norm:.3g} above the limit {big.grad_norm_limit or 0:.3g} on rank 0"
            told = [event(big, f"{seen}, {big.parameter}: rescaled to 0.42")]
            if step == 229:
                said = "4 spikes within 16 steps: learning rate lowered to x0.3, back to x1 by x1.05 per healthy step"
                told.append(event(big, said, kind="spike_streak", action="backoff"))
            return big, told
        return one, []

    return script


_PROCESS = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from journals import WritingRank, healthy, identity
rank = WritingRank(Path({directory!r}), identity(**{who!r}))
script = healthy()
step = 0
while True:
    step += 1
    one, events = script(rank.identity.rank, step)
    rank.step(one, *events)
    if step == {ready}:
        rank.flush()
        print("ready", flush=True)
"""


def kill_in_mid_write(directory: Path, *, after: int = 400, **who) -> None:
    """A rank in a process of its own that writes as fast as it can, until SIGKILL."""
    paths = [str(Path(__file__).parent), str(ROOT / "tests" / "agent"), str(ROOT)]
    code = _PROCESS.format(paths=paths, directory=str(directory), who=who, ready=after)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
    finally:
        process.kill()
        process.communicate()
