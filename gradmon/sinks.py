"""Where steps and events also go, beside the journal: JSON lines, TensorBoard, Weights & Biases, or a sink of yours.

    attach(model, optimizer, sinks=[JsonLines("steps.jsonl"), TensorBoard("runs"), WandB("my-project")])

Only rank 0 writes: what is global stands in its journal, and so do its own numbers. Each sink has a thread of its own,
which opens it when the first step has landed. So whatever a sink waits for, a disk, a service, the import of its
library, neither training nor journal wait for it, and none holds up another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gradmon.config import ConfigError, SinksConfig
from gradmon.record import STEP_FIELDS, Event, RankIdentity, StepRecord

#: Items that may wait for a sink before further ones are dropped, and counted.
QUEUE_LIMIT = 10_000
#: How long the end of training waits for what the sinks still have to write.
CLOSE_SECONDS = 30.0
PREFIX = "gradmon/"
#: The events' name among the values.
EVENT = PREFIX + "event"
#: The optimizer step, W&B's horizontal axis.
STEP = PREFIX + "step"
#: Fields of a step that say when, which or why; all others are values.
_NOT_VALUES = frozenset(
    {"step", "wall_seconds", "action", "reason", "applied", "culprit_rank", "parameter", "micro_step", "left_out"}
)
#: The field of a step -> its name outside; called as the field, unless Prometheus has a better name for it.
VALUE_NAMES = {
    field: PREFIX + ("step_duration_seconds" if field == "step_seconds" else field)
    for field in STEP_FIELDS
    if field not in _NOT_VALUES
}


def values_of(record: StepRecord) -> dict[str, float]:
    """`gradmon/grad_norm` and the like -> value, of all that was measured in this step; NaN and Inf as they are."""
    values = ((name, getattr(record, field)) for field, name in VALUE_NAMES.items())
    return {name: float(value) for name, value in values if value is not None}


@runtime_checkable
class Sink(Protocol):
    """Takes steps and events of a run; all calls come from one thread, on rank 0.

    Whatever a method raises is counted and warned of, and nothing else happens: training goes on, the journal and the
    other sinks too. One that could not be opened is called no more.
    """

    def open(self, identity: RankIdentity) -> str:
        """Get ready for this run; on an object's next `attach` for the next. Returns where it writes, for a person."""

    def step(self, record: StepRecord) -> None:
        """One optimizer step, in their order."""

    def event(self, event: Event) -> None:
        """Something worth telling, after the step that showed it."""

    def close(self) -> None:
        """Nothing more will come. Not called if the process is killed."""


class JsonLines:
    """One object per line, appended: `{"kind": "step", "run": ..., ...}` with the fields of a `StepRecord`, or
    `{"kind": "event", ...}` with those of an `Event`, whose kind is called `reason` here, as a step's is.

    JSON has no NaN: it is the string "NaN", and Inf is "Infinity" or "-Infinity", as in protobuf's mapping.
    Each line is written at once, whole, and survives SIGKILL.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()
        self._descriptor = -1
        self._run = ""
        self._torn = False

    def open(self, identity: RankIdentity) -> str:
        """Append to what is there."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._descriptor).st_size
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        self._run = identity.run
        return str(self._path)

    def step(self, record: StepRecord) -> None:
        """Append it."""
        self._append("step", dataclasses.asdict(record))

    def event(self, event: Event) -> None:
        """Append it."""
        fields = dataclasses.asdict(event)
        self._append("event", {"reason": fields.pop("kind"), **fields})

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append(self, kind: str, fields: dict[str, Any]) -> None:
        line = {"kind": kind, "run": self._run, **{name: _as_json(value) for name, value in fields.items()}}
        text = ("\n" if self._torn else "") + json.dumps(line, allow_nan=False) + "\n"
        data = text.encode()
        self._torn = True  # until it is there whole: a full disk may take a part of it
        written = os.write(self._descriptor, data)
        if written < len(data):
            raise OSError(f"{self._path}: only {written} of a line's {len(data)} bytes were written; is the disk full?")
        self._torn = False


def _as_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class TensorBoard:
    """Values as scalars, events as texts.

    Args:
        directory: what `tensorboard --logdir` is given; the run gets a folder of its name in it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory).absolute()
        self._writer: Any = None

    def open(self, identity: RankIdentity) -> str:
        """A new file beside those of earlier attempts, which TensorBoard joins."""
        writer = _library("torch.utils.tensorboard", "SummaryWriter", extra="tensorboard")
        directory = self._directory / identity.run
        self._writer = writer(str(directory), flush_secs=5)
        return f"TensorBoard in {directory}"

    def step(self, record: StepRecord) -> None:
        """A scalar per value."""
        for name, value in values_of(record).items():
            self._writer.add_scalar(name, value, record.step, record.wall_seconds)

    def event(self, event: Event) -> None:
        """A text."""
        self._writer.add_text(EVENT, _text_of(event), event.step, event.wall_seconds)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """Values and events as rows of a Weights & Biases run, over `gradmon/step`.

    If the script has a run when the first step has landed, they go into it, with its next row: its own count of steps
    stays as it is, and of several steps between two of its rows the newest is kept, of events all. What comes after
    the script has finished its run, its last step as a rule, is left out. Without one, a run is made, and finished at
    the end; it is continued by the attempts after it. WANDB_MODE=offline and W&B's other variables are honoured.

    Args:
        project: of the run that is made if the script has none.
    """

    def __init__(self, project: str) -> None:
        self._project = project
        self._wandb: Any = None
        self._run: Any = None
        self._own = False
        self._told: tuple[int, str] = (-1, "")

    def open(self, identity: RankIdentity) -> str:
        """Find the script's run, or make one, which does not become `wandb.run`."""
        _library("wandb", "init", extra="wandb")
        self._wandb = import_module("wandb")
        self._run = self._wandb.run
        self._own = self._run is None
        if self._own:
            quiet = self._wandb.Settings(reinit="create_new", console="off", silent=True)
            self._run = self._wandb.init(
                project=self._project,
                name=identity.run,
                id=f"{identity.run}-{identity.instance}"[:128],
                resume="allow",
                settings=quiet,
            )
        self._define()
        where = None if self._run.offline else self._run.url
        return f"Weights & Biases, run {self._run.name} in {where or Path(self._run.dir).parent}"

    def step(self, record: StepRecord) -> None:
        """A row."""
        self._log({STEP: record.step, **values_of(record)})

    def event(self, event: Event) -> None:
        """A row of its own, or in the script's run a part of the next."""
        text = _text_of(event)
        if not self._own and self._is_there():
            row, told = self._told
            with contextlib.suppress(Exception):  # W&B's mode "shared" has no count of rows
                now = self._run.step
                text = f"{told}\n{text}" if now == row else text
                self._told = (now, text)
        self._log({STEP: event.step, EVENT: text})

    def close(self) -> None:
        """Finish the run that was made here."""
        if self._own:
            self._run.finish()

    def _log(self, row: dict[str, Any]) -> None:
        if self._own:
            self._run.log(row)
        elif self._is_there():
            self._run.log(row, commit=False)

    def _is_there(self) -> bool:
        """True while the script has a run; it may have begun another."""
        now = self._wandb.run
        if now is not None and now is not self._run:
            self._run = now
            self._define()
        return now is not None

    def _define(self) -> None:
        self._run.define_metric(STEP)
        self._run.define_metric(PREFIX + "*", step_metric=STEP)


def _text_of(event: Event) -> str:
    return f"step {event.step}, {event.kind}: {event.message}"


def _library(module: str, name: str, *, extra: str) -> Any:
    """`name` of a module that gradmon does not depend on; a folder in its place, as W&B leaves them, has none."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the library {extra} is missing ({error}); pip install 'gradmon[{extra}]'") from error


def all_sinks(settings: SinksConfig, given: Iterable[Sink]) -> list[Sink]:
    """Those of the settings, and those given to `attach`; nothing is opened yet.

    Raises:
        TypeError: one is no sink.
    """
    sinks: list[Sink] = []
    if settings.jsonl is not None:
        sinks.append(JsonLines(settings.jsonl))
    if settings.tensorboard is not None:
        sinks.append(TensorBoard(settings.tensorboard))
    if settings.wandb is not None:
        sinks.append(WandB(settings.wandb))
    if not isinstance(given, Iterable):
        raise TypeError(f"sinks must be a list of sinks (got {given!r}); put it into brackets")
    for sink in given:
        if isinstance(sink, type) or not isinstance(sink, Sink):
            raise TypeError(f"sinks must hold objects with open, step, event and close (got {sink!r})")
        sinks.append(sink)
    return sinks


class SinkError(Exception):
    """A sink has raised, or lies behind; the text names it and says what happened."""


class Outlets:
    """All sinks of a rank, at work. Never raises.

    Args:
        sinks: what to write to; on any rank but 0 they are left alone.
        identity: who this rank is.
        failed: told of each failure, as (part, error).
        say: a line for a person, and its level.
        opened: called whenever a library may have been loaded, on the sink's thread.
    """

    def __init__(
        self,
        sinks: Iterable[Sink],
        identity: RankIdentity,
        failed: Callable[[str, Exception], None],
        say: Callable[[str, int], None],
        opened: Callable[[], None] = lambda: None,
    ) -> None:
        def ready(where: str) -> None:
            opened()
            say(f"steps and events also go to {where}", logging.INFO)

        self._outlets = [_Outlet(s, identity, failed, ready) for s in (sinks if identity.rank == 0 else ())]

    def put(self, item: StepRecord | Event) -> None:
        """Hand it to every sink; costs a queue operation for each."""
        for outlet in self._outlets:
            outlet.put(item)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Have all of it written, for so many seconds at most. A second call does nothing."""
        deadline = time.monotonic() + timeout
        outlets, self._outlets = self._outlets, []
        for outlet in outlets:
            outlet.end()
        for outlet in outlets:
            outlet.wait(deadline)


class _Outlet:
    """One sink and its thread."""

    def __init__(
        self,
        sink: Sink,
        identity: RankIdentity,
        failed: Callable[[str, Exception], None],
        ready: Callable[[str], None],
    ) -> None:
        self._sink = sink
        self._name = type(sink).__name__
        self._identity = identity
        self._tell, self._ready = failed, ready
        self._queue: queue.SimpleQueue[StepRecord | Event | None] = queue.SimpleQueue()
        self._first: SinkError | None = None
        self._thread = threading.Thread(target=self._run, name=f"gradmon-sink-{self._name}", daemon=True)
        self._thread.start()

    def put(self, item: StepRecord | Event) -> None:
        if not self._thread.is_alive():
            return
        if self._queue.qsize() < QUEUE_LIMIT:
            self._queue.put(item)
        else:
            self._failed(
                SinkError(f"{self._name} lies {QUEUE_LIMIT} steps and events behind, further ones are dropped")
            )

    def end(self) -> None:
        self._queue.put(None)

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._first = None
            self._failed(SinkError(f"{self._name} was not done in time, the last steps may be missing there"))

    def _run(self) -> None:
        """Until the end, or until it can't be opened."""
        item = self._queue.get()
        if item is None:
            return
        try:
            where = self._sink.open(self._identity)
        except Exception as error:
            self._raised(error)
            return
        self._ready(where)
        while item is not None:
            try:
                if isinstance(item, StepRecord):
                    self._sink.step(item)
                else:
                    self._sink.event(item)
            except Exception as error:
                self._raised(error)
            item = self._queue.get()
        try:
            self._sink.close()
        except Exception as error:
            self._raised(error)

    def _raised(self, error: Exception) -> None:
        self._failed(SinkError(f"{self._name}: {type(error).__name__}: {error}").with_traceback(error.__traceback__))

    def _failed(self, error: SinkError) -> None:
        """Each is counted; the first alone is said, whatever numbers stand in the next."""
        self._first = self._first or error
        with contextlib.suppress(Exception):
            self._tell("sink", self._first)
