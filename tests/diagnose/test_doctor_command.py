"""`gradmon doctor module:factory`: what may be named, what is printed, and the exit code."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradmon.diagnose.doctor import command

SUBJECT = """
import torch
from torch import nn

torch.manual_seed(0)

def net():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

def broken_net():
    model = net()
    nn.init.constant_(model[0].bias, -50.0)
    return model

def batch():
    return torch.randn(64, 8), torch.arange(64) % 4

def all():
    return net(), batch(), lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])

def with_optimizer():
    model, data, loss = all()
    return model, data, loss, torch.optim.SGD(model.parameters(), lr=1e4)

def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)

def no_optimizer(model, rate):
    return None

class Loader:
    def __iter__(self):
        yield batch()

def empty():
    return []

def sized(width):
    return nn.Linear(width, 4)

def wide():
    return torch.randn(64, 9), torch.arange(64) % 4

def number():
    return 3

ready = net()
loader = [batch(), batch()]
criterion = nn.CrossEntropyLoss
def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


@pytest.fixture(autouse=True)
def _subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "subject.py").write_text(SUBJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("subject", None)


def test_arguments_do_without_torch() -> None:
    """The command line is built where there is no torch, too."""
    code = (
        "import argparse, sys; from gradmon.diagnose.doctor import command;"
        " command.add_arguments(argparse.ArgumentParser()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "False\n"


def doctor(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["subject:all"],
        ["subject:net", "--data", "subject:batch"],
        ["subject:ready", "--data", "subject:loader"],
        ["subject:net", "--data", "subject:Loader", "--loss", "subject:criterion"],
        ["subject:net", "--data", "subject:batch", "--loss", "subject:loss", "--optimizer", "subject:optimizer"],
        ["subject:all", "--optimizer", "torch.optim:AdamW", "--lr-range"],
    ],
)
def test_what_may_be_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(*argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("gradmon doctor: ")
    assert "420 parameters, first loss 1." in out
    assert ("lr_range" in out) == ("--lr-range" in argv)


def test_findings_are_told_and_set_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("subject:broken_net", "--data", "subject:batch") == 1
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("WARN   dead_relu  1"))
    after = lines[lines.index(first) + 1 :]
    assert "100% of the 32 units" in after[0]
    assert any(line.strip().startswith("cure") and "LeakyReLU" in line for line in after)
    assert any("SageMaker Debugger, DeadRelu" in line for line in after)


def test_the_optimizer_of_the_factory_is_audited(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("subject:with_optimizer") == 1
    assert "ERROR  learning_rate_high" in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("subject:broken_net", "--data", "subject:batch", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["parameters"] == 420
    dead = next(finding for finding in told["findings"] if finding["rule"] == "dead_relu")
    assert dead["where"] == "1"
    assert dead["measured"] == 1.0
    assert dead["threshold"] == 0.5
    assert doctor("subject:all", "--json") == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["subject"], "must be module:name"),
        (["nowhere:net"], "no module nowhere"),
        (["subject:nit"], "has no 'nit'"),
        (["subject:sized", "--data", "subject:batch"], r"needs arguments \(width\)"),
        (["subject:number", "--data", "subject:batch"], r"must return a torch.nn.Module or \(model.*got int"),
        (["subject:net"], "--data module:loader"),
        (["subject:net", "--data", "subject:number"], "--data subject:number must give a batch.*got a int"),
        (["subject:net", "--data", "subject:empty"], "has no batch"),
        (["subject:net", "--data", "subject:wide"], "does not run on this batch"),
        (["subject:all", "--optimizer", "subject:no_optimizer"], "must take the model alone"),
        (["subject:all", "--optimizer", "subject:number"], "failed with TypeError"),
        (["subject:all", "--loss", "subject:loader"], "--loss subject:loader must be a function"),
        (["subject:all", "--loss-scale", "-1"], "loss_scale must be above 0"),
    ],
)
def test_wrong_use_is_one_sentence_with_the_cure(argv: list[str], message: str) -> None:
    """The command line turns these into exit code 2."""
    with pytest.raises(ValueError, match=message) as raised:
        doctor(*argv)
    assert len(str(raised.value).splitlines()) == 1
