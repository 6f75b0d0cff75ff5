"""Sinks under real training: what they hold is what the journal holds, and the weights know nothing of them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import toy
from read_sinks import json_lines, wandb_rows
from test_torchrun import Node, finish, node

import gradmon
from gradmon.journal import JournalView, read_journal
from gradmon.record import Event, StepRecord
from gradmon.sinks import JsonLines, TensorBoard

__all__ = ["node"]


def told(path: Path) -> tuple[list[StepRecord], list[Event]]:
    """The records that a file of JSON lines holds; in which NaN is a string."""
    names = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    steps, events = [], []
    for line in json_lines(path):
        fields = {k: names.get(v, v) if isinstance(v, str) else v for k, v in line.items()}
        kind, _run = fields.pop("kind"), fields.pop("run")
        if kind == "step":
            steps.append(StepRecord(**fields))
        else:
            events.append(Event(kind=fields.pop("reason"), **fields))
    return steps, events


def assert_same(path: Path, journal: JournalView) -> None:
    """repr, since NaN is not equal to itself."""
    steps, events = told(path)
    assert steps
    assert [repr(made) for made in steps] == [repr(made) for _, made in journal.steps]
    assert [repr(event) for event in events] == [repr(event) for _, event in journal.events]


class Failing:
    """A sink of a user's with an error in it."""

    def open(self, _identity: Any) -> str:
        return "nowhere"

    def step(self, record: StepRecord) -> None:
        raise KeyError(record.step)

    def event(self, _event: Event) -> None:
        raise KeyError("event")

    def close(self) -> None:
        raise KeyError("close")


def state_of_random_numbers() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


def test_weights_and_random_numbers_know_nothing_of_sinks(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(*sinks: Any) -> tuple[list[torch.Tensor], Any, JournalView]:
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        model = toy.build()
        optimizer = toy.optimizer_for("fused_adamw", model.parameters())
        monitor = gradmon.attach(model, optimizer, sinks=sinks)
        for _step in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(8, toy.FEATURES)).square().mean()
            loss.backward()
            optimizer.step()
            monitor.observe(loss=loss)
        numbers = state_of_random_numbers()
        monitor.detach()
        assert monitor.journal_path is not None
        return [p.detach().clone() for p in model.parameters()], numbers, read_journal(monitor.journal_path)

    caplog.set_level("INFO", "gradmon")
    path = directory / "steps.jsonl"
    plain, plain_numbers, without = train()
    caplog.clear()
    weights, numbers, journal = train(Failing(), JsonLines(path), TensorBoard(directory / "boards"))
    assert toy.equal(weights, plain)
    assert numbers == plain_numbers
    assert_same(path, journal)
    assert len(journal.steps) == 20
    assert list((directory / "boards").glob("*/events.out.tfevents.*"))
    assert ("gradmon_errors_total", ("sink",)) not in without.counters
    assert journal.counters["gradmon_errors_total", ("sink",)] >= 15, "the last few may come when the journal is closed"
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1, "one, of 21 failures"
    assert (
        "own sink failed, training goes on: SinkError: Failing: KeyError: 1 at test_sinks_training.py:" in warnings[0]
    )
    lines = {r.message.removeprefix("steps and events also go to ") for r in caplog.records if "also go" in r.message}
    assert lines == {"nowhere", str(path), f"TensorBoard in {directory / 'boards' / journal.identity.run}"}


def test_a_nan_is_seen(directory: Path) -> None:
    path = directory / "steps.jsonl"
    job = toy.Job(str(directory), steps=12, nan=((0, 9),), config={"sinks": {"jsonl": str(path)}})
    outcome = toy.train(job)
    assert outcome.journal is not None
    assert_same(path, outcome.journal)
    steps, events = told(path)
    assert [made.step for made in steps if math.isnan(made.grad_norm)] == [9]
    assert (9, "nonfinite", "skip") in [(event.step, event.kind, event.action) for event in events]
    assert '"grad_norm": "NaN"' in path.read_text()


def test_no_sink_no_training(directory: Path) -> None:
    model = toy.build()
    with pytest.raises(
        TypeError, match=r"sinks must hold objects with open, step, event and close \(got 'steps.jsonl'"
    ):
        gradmon.attach(model, toy.optimizer_for("sgd", model.parameters()), sinks=["steps.jsonl"])


def test_a_job_of_two_ranks(node: Node) -> None:
    """No detach: the process just ends, and what W&B does at exit must not come before gradmon's last step."""
    gate, path = node.directory / "gate", node.directory / "steps.jsonl"
    node.environment |= {
        "GRADMON_AGENT": "off",
        "GRADMON_SINKS__JSONL": str(path),
        "GRADMON_SINKS__TENSORBOARD": str(node.directory / "boards"),
        "GRADMON_SINKS__WANDB": "project",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(node.directory),
    }
    job = node.torchrun(script=("--steps", "16", "--nan-at", "10", "--wait-for", str(gate)))
    assert job.stdout is not None
    output = ""
    for line in job.stdout:
        output += line
        if "Weights & Biases, run script" in line or "own sink failed" in line:
            break
    gate.touch()
    output += finish(job)
    (journal,) = node.journals.glob("*/*/*/rank-00000.db")
    assert_same(path, read_journal(journal))
    steps, events = told(path)
    assert [made.step for made in steps] == list(range(1, 17))
    assert [made.step for made in steps if math.isnan(made.grad_norm)] == [10]
    assert [(e.step, e.rank) for e in events if e.kind == "nonfinite"] == [(10, 1)], "rank 0 tells of rank 1"
    assert output.count(f"[rank 0] steps and events also go to {path}") == 1
    assert output.count("also go to") == 3, "of rank 0 alone, once per sink"
    assert "own sink failed" not in output

    (run,) = node.directory.glob("wandb/offline-run-*")
    rows, _metrics, exits = wandb_rows(run)
    assert exits == 1
    assert [row["gradmon/step"] for row in rows if "gradmon/grad_norm" in row] == list(range(1, 17))
    assert sum("gradmon/event" in row for row in rows) == len(events)
    assert list(node.directory.glob("boards/script/events.out.tfevents.*"))
