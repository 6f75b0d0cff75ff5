"""What people met who used the commands for the first time: each test is a fault that one of them ran into."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journals import WritingRank, event, healthy, identity, kill_in_mid_write, record, write_run
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_replay import incident, norm_of

from gradmon.cli import main
from gradmon.diagnose.bundle import load_bundle
from gradmon.diagnose.doctor import Diagnosis, ModelError, diagnose
from gradmon.diagnose.replay import Replay, replay

pytestmark = pytest.mark.usefixtures("one_thread")


def replayed(path: Path, make: Callable[[], nn.Module]) -> Replay:
    return replay(load_bundle(path), make())


def said(answer: Replay) -> str:
    return " ".join(answer.text().split())


# --- replay -----------------------------------------------------------------------------------------------------------


class Cosine(nn.Module):
    """A cosine by hand: a vector of length 0 has none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.embed(a), self.embed(b)
        return (1 - (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))).mean()


def test_the_sample_is_named_where_there_is_one_number_for_each(tmp_path: Path) -> None:
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    assert Cosine()(a, b).isfinite()
    a[4] = 0
    answer = said(replayed(incident(tmp_path, Cosine(), lambda m: m(a, b)), Cosine))
    assert "div gave NaN out of finite inputs (0 / 0) in sample 4 of the batch" in answer


class Distance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.embed(a) - self.embed(b)).square().sum(-1, keepdim=True).sqrt().mean()


def test_the_sample_is_named_where_the_backward_broke(tmp_path: Path) -> None:
    a, b = torch.arange(5), torch.arange(5) + 5
    b[2] = a[2]
    answer = said(replayed(incident(tmp_path, Distance(), lambda m: m(a, b)), Distance))
    assert "sqrt backward gave Inf out of finite inputs (the slope of sqrt at 0) in sample 2 of the batch" in answer


class TwoMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2)
        scores = scores.masked_fill(torch.ones(4, 4).tril() == 0, -math.inf)  # causal
        scores = scores.masked_fill(~real[:, None], -math.inf)  # padding
        return (scores.softmax(-1) @ v).square().mean()


def test_all_masks_that_closed_a_row_are_named(tmp_path: Path) -> None:
    x, real = torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)
    real[0, 3:] = False
    assert TwoMasks()(x, real).isfinite(), "padding on the right leaves each token its first"
    real[1, :1] = False
    answer = said(replayed(incident(tmp_path, TwoMasks(), lambda m: m(x, real)), TwoMasks))
    assert "softmax made NaN out of -Inf in sample 1" in answer
    assert "# causal" in answer
    assert "# padding" in answer


def line() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = line()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


def test_gradients_that_were_never_zeroed_are_no_broken_hardware(tmp_path: Path) -> None:
    model, x = Squares(), torch.randn(8, 4)
    model(x).backward()
    usual = norm_of(model)
    for _ in range(30):  # no zero_grad()
        model(x).backward()
    path = incident(tmp_path, model, lambda m: m(x), usual)
    answer = replayed(path, Squares)
    assert answer.norm == pytest.approx(usual, rel=1e-5)
    assert answer.verdict == "not reproduced"
    assert answer.why.index("zero_grad()") < answer.why.index("suspect hardware")
    assert "the weights are those after the step" in answer.why


def test_other_weights_accuse_nobody(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    broken = Squares()
    with torch.no_grad():
        broken.net[0].weight.fill_(math.nan)
    bundle = load_bundle(incident(tmp_path, broken, lambda m: m(x)))
    bundle.weights = None
    answer = replay(bundle, Squares())
    assert answer.verdict == "not reproduced"
    assert "hardware" not in answer.why
    assert "give --weights CHECKPOINT" in answer.text()


def test_weights_that_the_step_itself_broke_are_not_its_cause(tmp_path: Path) -> None:
    """In `mode: observe` the step is applied before the bundle is saved."""
    model, a, b = Cosine(), torch.randn(6, 8), torch.randn(6, 8)
    a[4] = 0
    bundle = load_bundle(incident(tmp_path, model, lambda m: m(a, b), applied=False))
    bundle.weights = {name: torch.full_like(value, math.nan) for name, value in (bundle.weights or {}).items()}
    answer = replay(bundle, Cosine())
    assert "div gave NaN out of finite inputs (0 / 0) in sample 4" in answer.text()
    assert "the weights themselves are broken" not in answer.text()
    assert "mode: guard would have kept them whole" in answer.text()
    bundle.records = [dataclasses.replace(bundle.record, step=bundle.step - 1)]
    assert "parameter embed.weight holds NaN" in replay(bundle, Cosine()).text(), "an earlier step had broken them"


def test_weights_that_are_given_go_before_the_bundle_s(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    broken = Squares()
    with torch.no_grad():
        broken.net[0].weight.fill_(math.nan)
    bundle = load_bundle(incident(tmp_path, broken, lambda m: m(x)))
    assert "parameter net.0.weight holds NaN" in replay(bundle, Squares()).text()
    assert replay(bundle, Squares(), weights=Squares().state_dict()).verdict == "not reproduced"


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x).squeeze(1), y)


def test_weights_that_a_learning_rate_blew_up_are_to_blame_not_the_number_format(tmp_path: Path) -> None:
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    torch.manual_seed(1)
    for _ in range(20):
        x = torch.randn(8, 16)
        y = x.sum(1)
        optimizer.zero_grad()
        model(x, y).backward()
        if not math.isfinite(norm_of(model)):
            break
        optimizer.step()
    else:
        pytest.fail("the rate is to be too high")
    optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    answer = said(replayed(incident(tmp_path, model, lambda m: m(x, y)), Regression))
    assert "the weights had blown up before this step: net." in answer
    assert "lower the learning rate" in answer
    assert "bf16" not in answer, "fp32 has bf16's range"


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.again = nn.Linear(4, 16), nn.Linear(16, 16, bias=False)
        nn.init.orthogonal_(self.again.weight, gain=2.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 16)
        for t in range(x.shape[1]):
            h = F.relu(self.read(x[:, t]) + self.again(h))
        return h.square().mean()


def test_a_recurrence_that_explodes_is_named_as_one(tmp_path: Path) -> None:
    assert Recurrence()(torch.randn(4, 8, 4)).isfinite()
    x = torch.randn(4, 300, 4)
    answer = said(replayed(incident(tmp_path, Recurrence(), lambda m: m(x)), Recurrence))
    assert "most often in again (" in answer
    assert "again is applied again and again and multiplies by more than 1 each time" in answer


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)).square().mean()


def test_the_row_of_a_table_that_is_broken_is_named(tmp_path: Path) -> None:
    model, tokens = Tokens(), torch.arange(12).view(3, 4)
    with torch.no_grad():
        model.embed.weight[7] = math.nan
    answer = said(replayed(incident(tmp_path, model, lambda m: m(tokens)), Tokens))
    assert "parameter embed.weight holds NaN in row 7 of its 50" in answer


# --- doctor -----------------------------------------------------------------------------------------------------------


def rules(diagnosis: Diagnosis) -> set[str]:
    return {finding.rule for finding in diagnosis}


def dcgan() -> tuple[nn.Module, nn.Module]:
    """As Radford et al. 2016 have it: all weights from N(0, 0.02)."""
    generator = nn.Sequential(
        nn.ConvTranspose2d(32, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    critic = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),
        nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2, True),
        nn.Conv2d(64, 1, 2, bias=False), nn.Flatten(0),
    )  # fmt: skip
    for module in (*generator.modules(), *critic.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0, 0.02)
    return generator, critic


def adversarial(logits: Tensor, real: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))


def test_a_dcgan_is_healthy() -> None:
    torch.manual_seed(0)
    generator, critic = dcgan()
    images = torch.rand(16, 3, 8, 8) * 2 - 1
    found = diagnose(critic, images, lambda m, x: adversarial(m(x), 1) + adversarial(m(-x), 0))
    assert found.ok, str(found)
    critic.requires_grad_(False)
    found = diagnose(generator, torch.randn(16, 32, 1, 1), lambda m, z: adversarial(critic(m(z)), 1))
    assert found.ok, str(found)


def test_labels_of_the_batch_that_are_all_alike_are_told_all_the_same() -> None:
    _, critic = dcgan()
    batch = (torch.rand(16, 3, 8, 8), torch.ones(16))
    assert "constant_labels" in rules(diagnose(critic, batch, nn.BCEWithLogitsLoss()))


class Sine(nn.Module):
    """SIREN (Sitzmann et al. 2020): small weights, and 30 times what they make."""

    def __init__(self, inputs: int, outputs: int, factor: float = 30.0) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(inputs, outputs), factor
        nn.init.uniform_(self.linear.weight, -math.sqrt(6 / inputs) / 30, math.sqrt(6 / inputs) / 30)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.factor * self.linear(x)) if self.factor != 1 else torch.sin(self.linear(x))


class Equalised(nn.Module):
    """StyleGAN's equalised learning rate: weights of N(0, 1), scaled where they are used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.linear(x, self.weight * math.sqrt(2 / len(self.weight))), 0.2)


def test_weights_that_are_scaled_where_they_are_used_are_sound() -> None:
    torch.manual_seed(0)
    points = torch.rand(64, 64) * 2 - 1
    batch = (points, points[:, :1])
    for make in (lambda: Sine(64, 64), lambda: Equalised(64)):
        found = diagnose(nn.Sequential(make(), make(), nn.Linear(64, 1)), batch)
        assert "bad_init" not in rules(found), str(found)
    found = diagnose(nn.Sequential(Sine(64, 64, 1), Sine(64, 64, 1), nn.Linear(64, 1)), batch)
    assert "bad_init" in rules(found), "without the factor of 30 they fade"


def test_a_head_may_start_small() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    nn.init.orthogonal_(model[4].weight, 0.01)  # PPO's policy
    nn.init.zeros_(model[4].bias)
    batch = (torch.randn(64, 4), torch.arange(64) % 2)
    found = diagnose(model, batch)
    assert found.ok, str(found)


@pytest.mark.parametrize(
    ("last", "loss", "named"),
    [
        (nn.Softmax(-1), nn.CrossEntropyLoss(), True),
        (nn.Sigmoid(), nn.BCEWithLogitsLoss(), True),
        (nn.LogSoftmax(-1), nn.CrossEntropyLoss(), False),  # of itself the same again
        (nn.Softmax(-1), nn.MSELoss(), False),
    ],
)
def test_what_the_loss_squashes_must_not_be_squashed_before(last: nn.Module, loss: nn.Module, named: bool) -> None:
    torch.manual_seed(0)
    x, classes = torch.randn(32, 16), torch.arange(32) % 5
    target = classes if isinstance(loss, nn.CrossEntropyLoss) else F.one_hot(classes, 5).float()
    found = diagnose(nn.Sequential(nn.Linear(16, 5), last), (x, target), loss)
    assert ("squashed_twice" in rules(found)) is named, str(found)


def test_a_nan_out_of_a_mask_is_found_and_the_loss_is_not_called_low() -> None:
    class Classifier(TwoMasks):
        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            scores = (q @ k.transpose(1, 2)).masked_fill(~real[:, None], -math.inf)
            return (scores.softmax(-1) @ v).mean(1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(*batch[:2]), batch[2])

    torch.manual_seed(0)
    real = torch.ones(3, 4, dtype=torch.bool)
    batch = (torch.randn(3, 4, 8), real, torch.arange(3))
    assert "nonfinite_forward" not in rules(diagnose(Classifier(), batch, loss))
    real[1] = False
    found = diagnose(Classifier(), batch, loss)
    broken = next(finding for finding in found if finding.rule == "nonfinite_forward")
    assert broken.message.startswith("softmax")
    assert "leave one entry of each row unmasked" in broken.cure
    assert "loss_at_start" not in rules(found), str(found)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.a.T @ self.b.T


def test_a_model_that_can_not_learn_is_told_so_and_not_of_its_learning_rate() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(16, 8), torch.arange(16) % 5)
    model = LowRank()
    found = diagnose(model, batch, optimizer=torch.optim.AdamW([model.a, model.b], lr=1e-3))
    assert rules(found) == {"zero_gradient"}
    assert "nothing can learn" in str(found)
    nn.init.normal_(model.a)
    assert diagnose(model, batch, optimizer=torch.optim.AdamW([model.a, model.b], lr=1e-3)).ok
    found = diagnose(nn.Linear(8, 5), batch)
    assert found.ok
    model = nn.Linear(8, 5)
    found = diagnose(model, batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert "nothing is learnt" in str(found), "a rate of 0 is told as what it is"


def test_a_loss_cut_off_from_the_weights_is_told_as_that() -> None:
    def cut_off(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ModelError, match=r"no path leads from the loss back .* look for torch\.no_grad"):
        diagnose(nn.Linear(8, 5), (torch.randn(16, 8), torch.arange(16) % 5), cut_off)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            "parses_arguments:make",
            "importing parses_arguments ended the program (exit 2); code that parses the command",
        ),
        ("ends:make", "factory ends:make ended the program (exit bad usage)"),
        ("./ends.py:make", "must name a module, not a file (got './ends.py:make'): ends:make"),
        ("src/ends.py:make", "ends:make, run in src"),
        ("not_python:make", "not_python is no valid Python: "),
    ],
)
def test_what_a_module_may_do_is_told_as_the_module_s(
    spec: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parses_arguments.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', required=True)\np.parse_args([])\n"
    )
    (tmp_path / "ends.py").write_text("import sys\ndef make():\n    sys.exit('bad usage')\n")
    (tmp_path / "not_python.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", spec]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "trains when it is imported" not in error


def test_a_killed_rank_is_named_before_those_that_lost_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_in_mid_write(tmp_path, after=50, rank=1, world_size=2)
    other = WritingRank(tmp_path, identity(rank=0, world_size=2))
    for step in range(1, 50):
        other.step(record(step))
    other.end("exception", "RuntimeError: [../gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert main(["report", str(tmp_path), "--text"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    first = text.partition("What ")[0]
    assert "rank 1 ended without a word (killed?), and rank 0 with the connection that it lost" in first
    assert "killed: rank 1" in text
    assert "read the traceback of the rank named here" not in text


def test_an_exception_beside_a_killed_rank_stays_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_in_mid_write(tmp_path, after=50, rank=1, world_size=2)
    other = WritingRank(tmp_path, identity(rank=0, world_size=2))
    other.step(record(1))
    other.end("exception", "IndexError: list index out of range")
    assert main(["report", str(tmp_path), "--text"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rank 0 ended with IndexError: list index out of range" in text
    assert "read the traceback of the rank named here" in text


def test_a_loss_of_nan_with_finite_gradients_is_not_called_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = WritingRank(tmp_path, identity())
    for step in range(1, 41):
        masked = step == 25  # every label is ignore_index: the loss is 0 / 0, the gradients are 0
        one = record(step, loss=math.nan if masked else 2.0, grad_norm=0.0 if masked else 1.0)
        rank.step(one, *([event(one, "the gradients have vanished", kind="vanish")] if masked else []))
    rank.end()
    assert main(["report", str(tmp_path), "--text"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "nothing was needed" not in text
    assert "no step was unfit to be applied" in text
    assert "replay BUNDLE" not in text, "there is none"
    assert "every label is ignored" in text


def test_what_the_report_calls_another_run_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for instance, steps in (("i1", 20), ("i2", 30)):
        started = float(steps)
        write_run(tmp_path, healthy(), steps=steps, instance=instance, started_seconds=started)
    assert main(["report", str(tmp_path), "--text"]) == 0
    text = capsys.readouterr().out
    assert "30 steps" in text
    assert "(--run NAME): gpt-small/i1." in text
    assert main(["report", str(tmp_path), "--text", "--run", "gpt-small/i1"]) == 0
    assert "20 steps" in capsys.readouterr().out


def test_a_few_steps_are_not_said_to_be_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, loss in (("a", 2.0), ("b", 11000.0)):
        rank = WritingRank(tmp_path / name, identity(run=name))
        for step in range(1, 14):
            rank.step(record(step, loss=loss + step, grad_norm=loss))
        rank.end()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both.html")]) == 0
    text = capsys.readouterr().out
    assert "never beyond noise" not in text
    assert "the 13 steps that both have are too few to tell it from noise" in text


def test_a_reader_who_has_enough_is_no_error(tmp_path: Path) -> None:
    write_run(tmp_path, healthy(), steps=40)
    command = [sys.executable, "-m", "gradmon", "report", str(tmp_path), "--text"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does, before anything is written
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
