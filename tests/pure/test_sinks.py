"""Each sink with its real library, read back with that library; and what happens where one fails or hangs."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from read_sinks import json_lines, wandb_rows
from test_journal import identity, record

from gradmon import sinks
from gradmon.config import SinksConfig
from gradmon.record import STEP_FIELDS, Event, StepRecord
from gradmon.sinks import JsonLines, Outlets, Sink, TensorBoard, WandB, all_sinks, values_of

EVENT = Event(3, 4.5, "nonfinite", "skip", True, 1, "blocks.0.weight", "NaN in the gradients of blocks.0.weight")


class Listening:
    """What Outlets tell."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []
        self.lines: list[tuple[str, int]] = []

    def outlets(self, *used: Sink, rank: int = 0, opened: Callable[[], None] = lambda: None) -> Outlets:
        return Outlets(used, identity(rank), self._failed, lambda text, level: self.lines.append((text, level)), opened)

    def _failed(self, part: str, error: Exception) -> None:
        self.failures.append((part, str(error)))


class Keeping:
    """A sink of a user's."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.threads: set[str] = set()

    def open(self, who: Any) -> str:
        self.calls.append(("open", who.run))
        return "a list"

    def step(self, made: StepRecord) -> None:
        self.calls.append(made)
        self.threads.add(threading.current_thread().name)

    def event(self, event: Event) -> None:
        self.calls.append(event)

    def close(self) -> None:
        self.calls.append("close")


def test_every_number_of_a_step_is_a_value() -> None:
    whole = {f.name: 2.0 for f in dataclasses.fields(StepRecord) if f.type in ("float", "float | None", "int | None")}
    made = record(**{**whole, "step": 7, "grad_norm": math.nan, "loss": math.inf, "step_seconds": 0.5})
    values = values_of(made)
    assert all(type(value) is float for value in values.values())
    assert {"gradmon/grad_norm", "gradmon/grad_norm_applied", "gradmon/loss", "gradmon/learning_rate"} <= values.keys()
    assert {"gradmon/learning_rate_scale", "gradmon/noise_scale_ratio", "gradmon/update_ratio"} <= values.keys()
    assert math.isnan(values["gradmon/grad_norm"]), "NaN must not hide"
    assert values["gradmon/loss"] == math.inf
    assert values["gradmon/step_duration_seconds"] == 0.5
    labels = {"step", "wall_seconds", "action", "reason", "applied", "culprit_rank", "parameter", "micro_step"}
    named = {f"gradmon/{field}" for field in STEP_FIELDS} - {f"gradmon/{label}" for label in {*labels, "left_out"}}
    assert values.keys() == named - {"gradmon/step_seconds"} | {"gradmon/step_duration_seconds"}
    assert "gradmon/loss" not in values_of(record(1)), "what was not measured is no value"


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "made" / "steps.jsonl"
    sink = JsonLines(path)
    assert not path.parent.exists(), "nothing happens before open"
    assert sink.open(identity()) == str(path)
    odd = record(1, grad_norm=math.nan, grad_norm_applied=math.inf, loss=-math.inf, parameter='ü "\n')
    sink.step(odd)
    sink.event(EVENT)
    first, second = json_lines(path)  # before close
    assert list(first) == ["kind", "run", *STEP_FIELDS]
    assert (first["kind"], first["run"], first["step"], first["parameter"]) == ("step", "run", 1, 'ü "\n')
    assert (first["grad_norm"], first["grad_norm_applied"], first["loss"]) == ("NaN", "Infinity", "-Infinity")
    assert first["local_grad_norm"] is None
    assert (second.pop("kind"), second.pop("run"), second.pop("reason")) == ("event", "run", EVENT.kind)
    assert Event(kind=EVENT.kind, **second) == EVENT
    sink.close()
    sink.open(identity())  # the next attempt
    sink.step(record(2))
    sink.close()
    assert [line["step"] for line in json_lines(path)] == [1, 3, 2]


_WRITE = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_journal import identity, record
from gradmon.sinks import JsonLines
sink = JsonLines({path!r})
sink.open(identity())
for step in range(1, 4):
    sink.step(record(step))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # as a full disk: a line is cut
for step in (4, 5):
    try:
        sink.step(record(step))
        raise SystemExit("the limit was not reached")
    except OSError:
        pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
step = 5
while True:
    step += 1
    sink.step(record(step))
    print(step, flush=True)
"""


def test_json_lines_survive_a_full_disk_and_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    code = _WRITE.format(path=str(path), tests=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [child.stdout.readline() for _ in range(200)][-1]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert int(seen) == 205
    path.write_bytes(path.read_bytes() + b'{"kind": "st')  # a power cut tears even that
    sink = JsonLines(path)
    sink.open(identity())
    sink.step(record(9000))
    sink.close()
    whole, torn = [], []
    for line in path.read_text().splitlines():
        try:
            whole.append(json.loads(line)["step"])
        except ValueError:
            torn.append(line)
    assert len(torn) == 2, "of the full disk and of the power cut; each spoils no line beside it"
    assert whole[:3] == [1, 2, 3]
    assert whole[3:-1] == list(range(6, 6 + len(whole) - 4))
    assert whole[-2] >= 205, "what was written when it was killed is there"
    assert whole[-1] == 9000


def test_tensorboard(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    assert str(tmp_path / "run") in sink.open(identity())
    for step, norm in ((1, 2.5), (2, math.nan), (3, math.inf), (4, 1e39)):
        sink.step(record(step, wall_seconds=100.0 + step, grad_norm=norm, loss=0.5))
    sink.event(EVENT)
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    assert set(read.Tags()["scalars"]) == values_of(record(1, loss=0.5)).keys()
    norms = read.Scalars("gradmon/grad_norm")
    assert [(n.step, n.wall_time) for n in norms] == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 104.0)]
    assert norms[0].value == 2.5
    assert math.isnan(norms[1].value)
    assert [n.value for n in norms[2:]] == [math.inf, math.inf], "TensorBoard's scalars are float32"
    assert [n.value for n in read.Scalars("gradmon/loss")] == [0.5] * 4
    (text,) = read.Tensors("gradmon/event/text_summary")
    assert (text.step, text.wall_time) == (3, 4.5)
    assert EVENT.message in text.tensor_proto.string_val[0].decode()


_WANDB = """
import math, os, sys
sys.path.insert(0, {tests!r})
from test_journal import identity, record
from gradmon.record import Event
from gradmon.sinks import WandB
import wandb

EVENT = {event!r}

print("own")
sink = WandB("mine")
print(sink.open(identity()))
assert wandb.run is None, "the script must not find a run that it has not made"
for step, norm in ((1, 2.5), (2, math.nan)):
    sink.step(record(step, grad_norm=norm))
sink.event(EVENT)
sink.step(record(3, grad_norm=math.inf))
sink.close()

run = wandb.init(project="theirs", name="script", settings=wandb.Settings(console="off", silent=True))
sink = WandB("mine")
print(sink.open(identity()))
sink.step(record(1, grad_norm=1.0))
wandb.log({{"theirs": 1}}, step=5)
sink.step(record(2, grad_norm=2.0))
sink.step(record(3, grad_norm=math.nan))
sink.event(EVENT)
sink.event(EVENT)
wandb.log({{"theirs": 2}}, step=6)
sink.event(EVENT)
sink.step(record(4))
wandb.log({{"theirs": 3}}, step=7)
sink.close()
assert wandb.run is run, "the script's run is the script's to finish"
run.finish()
sink.step(record(5))  # nowhere to go, and no error
"""


def test_wandb(tmp_path: Path) -> None:
    code = _WANDB.format(tests=str(Path(__file__).parent), event=EVENT)
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folders = {("script" if "run-one" not in p.name else "own"): p for p in tmp_path.glob("wandb/offline-run-*")}
    assert f"run run in {folders['own']}" in done.stdout
    assert "run script in" in done.stdout

    rows, metrics, exits = wandb_rows(folders["own"])
    assert exits == 1, "finished"
    assert [row["gradmon/step"] for row in rows] == [1, 2, 3, 3]
    assert rows[0]["gradmon/grad_norm"] == 2.5
    assert math.isnan(rows[1]["gradmon/grad_norm"])
    assert rows[2]["gradmon/event"].endswith(EVENT.message)
    assert rows[3]["gradmon/grad_norm"] == math.inf
    assert {(m.name or m.glob_name, m.step_metric) for m in metrics} >= {("gradmon/*", "gradmon/step")}

    rows, metrics, exits = wandb_rows(folders["script"])
    assert exits == 1
    theirs = [row for row in rows if "theirs" in row]
    assert [(row["_step"], row["theirs"]) for row in theirs] == [(5, 1), (6, 2), (7, 3)], "their steps, as they count"
    norms = {row["gradmon/step"]: row["gradmon/grad_norm"] for row in rows if "gradmon/grad_norm" in row}
    assert norms[1] == 1.0
    assert math.isnan(norms[3]), "the newest of two steps between rows of the script's"
    assert set(norms) == {1, 3, 4}
    told = [row["gradmon/event"].count(EVENT.message) for row in rows if "gradmon/event" in row]
    assert told == [2, 1], "none is lost, none is told twice"


@pytest.mark.parametrize("stand_in", [None, types.ModuleType("wandb")], ids=["missing", "a folder of that name"])
def test_a_missing_library_is_one_warning_with_the_cure(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    heard, kept = Listening(), Keeping()
    outlets = heard.outlets(WandB("project"), kept, TensorBoard("runs"))
    for step in range(5):
        outlets.put(record(step))
    outlets.close()
    assert [part for part, _ in heard.failures] == ["sink", "sink"], "once each"
    said = " ".join(text for _, text in heard.failures)
    assert "pip install 'gradmon[wandb]'" in said
    assert "pip install 'gradmon[tensorboard]'" in said
    assert len(kept.calls) == 7, "open, five steps, close"


def test_outlets_hand_over_in_order_on_a_thread_of_the_sinks(caplog: pytest.LogCaptureFixture) -> None:
    heard, kept, opened = Listening(), Keeping(), []
    outlets = heard.outlets(kept, opened=lambda: opened.append(1))
    outlets.put(record(1))
    outlets.put(EVENT)
    outlets.put(record(2))
    outlets.close()
    outlets.close()
    outlets.put(record(3))
    assert kept.calls == [("open", "run"), record(1), EVENT, record(2), "close"]
    assert kept.threads == {"gradmon-sink-Keeping"}
    assert heard.lines == [("steps and events also go to a list", logging.INFO)]
    assert (heard.failures, opened) == ([], [1])


def test_only_rank_0_writes() -> None:
    heard, kept = Listening(), Keeping()
    outlets = heard.outlets(kept, rank=1)
    outlets.put(record(1))
    outlets.close()
    assert kept.calls == []


def test_without_a_step_nothing_is_opened() -> None:
    heard, kept = Listening(), Keeping()
    heard.outlets(kept).close()
    assert kept.calls == []


def test_a_sink_that_raises_is_counted_each_time_and_said_once() -> None:
    class Raising(Keeping):
        def step(self, made: StepRecord) -> None:
            if made.step % 2:
                raise RuntimeError(f"no step {made.step}")
            super().step(made)

    heard, raising, kept = Listening(), Raising(), Keeping()
    outlets = heard.outlets(raising, kept)
    for step in range(1, 7):
        outlets.put(record(step))
    outlets.close()
    assert heard.failures == [("sink", "Raising: RuntimeError: no step 1")] * 3
    assert [c.step for c in raising.calls if isinstance(c, StepRecord)] == [2, 4, 6], "it is asked again"
    assert [c.step for c in kept.calls if isinstance(c, StepRecord)] == [1, 2, 3, 4, 5, 6]
    assert raising.calls[-1] == "close"


def test_a_sink_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class Hanging(Keeping):
        def open(self, who: Any) -> str:
            gate.wait(60)
            return super().open(who)

    monkeypatch.setattr(sinks, "QUEUE_LIMIT", 4)
    heard, hanging, kept = Listening(), Hanging(), Keeping()
    outlets = heard.outlets(hanging, kept)
    for step in range(1, 9):
        outlets.put(record(step))
        deadline = time.monotonic() + 10
        while len(kept.calls) < step + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(kept.calls) == 9, "all that came, while the other hangs"
    assert len(heard.failures) in (3, 4), "one has been taken from its queue, or is about to be"
    assert heard.failures[0] == ("sink", "Hanging lies 4 steps and events behind, further ones are dropped")
    outlets.close(timeout=0.1)
    assert heard.failures[-1] == ("sink", "Hanging was not done in time, the last steps may be missing there")
    gate.set()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([JsonLines], r"sinks must hold objects with open, step, event and close \(got <class 'gradmon.sinks.JsonLi"),
        (["steps.jsonl"], r"sinks must hold objects with open, step, event and close \(got 'steps.jsonl'\)"),
        (JsonLines("x"), r"sinks must be a list of sinks \(got <gradmon.sinks.JsonLines .*>\); put it into brackets"),
    ],
)
def test_what_is_no_sink_is_named(given: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        all_sinks(SinksConfig(), given)


def test_sinks_of_the_settings_come_with_those_given(tmp_path: Path) -> None:
    kept = Keeping()
    settings = SinksConfig(jsonl=str(tmp_path / "a.jsonl"), tensorboard=str(tmp_path), wandb="project")
    assert [type(sink) for sink in all_sinks(settings, [kept])] == [JsonLines, TensorBoard, WandB, Keeping]
    assert all_sinks(SinksConfig(), ()) == []
