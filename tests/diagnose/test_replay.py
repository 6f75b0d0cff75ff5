"""A bundle run again: the right operation, line and sample are named, and nothing where nothing broke."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from healthy import HEALTHY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import Broken, Healthy
from zoo_replay import (
    BROKEN,
    STEP,
    Attention,
    LogOfSoftmax,
    capture_of,
    identity,
    incident,
    log_of_zero,
    mlp,
    norm_of,
    record,
    square,
    weighted,
    weights_too_far,
)

from gradmon.diagnose import factory
from gradmon.diagnose import replay as replaying
from gradmon.diagnose.blame import blame_jump, jumps
from gradmon.diagnose.bundle import Bundle, load_bundle, write_bundle
from gradmon.diagnose.factory import FactoryError
from gradmon.diagnose.operations import OperationWatch
from gradmon.diagnose.replay import ReplayError, replay
from gradmon.diagnose.weights import WeightsError, load_weights, put_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: b.name)
def test_the_cause_is_named(broken: Broken, tmp_path: Path) -> None:
    text = broken.find(tmp_path)
    missing = [name for name in broken.names if name not in text]
    assert not missing, text


def saved(
    folder: Path, model: nn.Module, *batches: tuple[Any, ...], settings: dict[str, Any] | None = None, **changed: Any
) -> Bundle:
    """The bundle of a step of these micro-batches, out of its file; the model's gradients are of them together."""
    capture = capture_of(model, **(settings or {}))
    for batch in batches:
        output = model(*batch)
        (output if output.numel() == 1 else square(output)).backward()
    capture.step_ended(STEP)
    draft = capture.save(record(**changed), identity=identity(), settings={}, journal=folder / "rank-00000.db")
    capture.stop()
    assert draft is not None
    return load_bundle(draft.write())


class Loss(nn.Module):
    """A model that returns its loss, as the bundle wants it."""

    def __init__(self, healthy: Healthy) -> None:
        super().__init__()
        self.inner, self.batch, self._loss = healthy.make()

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.inner, batch)


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda h: h.name)
def test_nothing_is_blamed_on_a_healthy_model(healthy: Healthy, tmp_path: Path) -> None:
    model = Loss(healthy)
    bundle = saved(tmp_path, model, (model.batch,))
    norm = norm_of(model)
    answer = replay(bundle, Loss(healthy))
    assert answer.verdict == "not reproduced"
    assert "suspect hardware or a race" in answer.why
    assert answer.blame is None
    assert "first:" not in answer.text()
    assert answer.norm == pytest.approx(norm, rel=1e-6), "it was the same computation"
    spiked = record(reason="spike", grad_norm=50 * norm, local_grad_norm=50 * norm, grad_norm_limit=4 * norm)
    bundle.record = spiked
    answer = replay(bundle, Loss(healthy))
    assert (answer.verdict, answer.blame) == ("not reproduced", None)
    middle = [o for o in answer.growths if jumps(o) and o.name != "addmm backward"]  # a sum over the batch grows
    assert not middle


def test_randomness_comes_back_and_ours_goes_on(tmp_path: Path) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) * random.random()).square().mean()

    model = Random()
    x = torch.randn(8, 6)
    bundle = saved(tmp_path, model, (x,))
    norm = norm_of(model)
    fresh = Random(), Random()
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    answers = [replay(bundle, model) for model in fresh]
    assert [a.norm for a in answers] == [pytest.approx(norm, rel=1e-6)] * 2
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    bundle.forwards[0].rng["cpu"] = states[0]
    assert replay(bundle, Random()).norm != pytest.approx(norm, rel=1e-3), "dropout and factor do matter here"


def test_autocast_and_eval_modules_come_back(tmp_path: Path) -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.dropout = nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            y = self.dropout(self.inner(x))
            assert y.dtype == torch.bfloat16
            assert not self.dropout.training
            return y.float().square().mean()

    model = Typed()
    model.dropout.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bundle = saved(tmp_path, model, (torch.randn(4, 6),))
    norm = norm_of(model)
    assert bundle.forwards[0].autocast == torch.bfloat16
    assert replay(bundle, Typed()).norm == pytest.approx(norm, rel=1e-6)


def test_the_broken_micro_batch_is_found_among_several(tmp_path: Path) -> None:
    model = Attention()
    mask = torch.ones(2, 3, dtype=torch.bool)
    empty = mask.clone()
    empty[1] = False
    x = torch.randn(2, 3, 8)
    bundle = saved(tmp_path, model, (x, mask), (x, empty), (x, mask))
    assert [f.micro_step for f in bundle.forwards] == [3, 2, 1]
    answer = replay(bundle, Attention(), square)
    assert answer.verdict == "reproduced"
    assert answer.micro_step == 2


def test_without_the_loss_it_says_so(tmp_path: Path) -> None:
    model = mlp()
    clean = replay(saved(tmp_path, model, (torch.randn(4, 6),)), mlp())
    assert clean.verdict == "unclear"
    assert "the loss itself is not in the bundle" in clean.why
    assert any("give --loss" in note for note in clean.notes)
    bad = torch.randn(4, 6)
    bad[2] = math.nan
    answer = replay(saved(tmp_path, model, (bad,)), mlp())
    assert answer.verdict == "reproduced", "an output that is not finite needs no loss"
    assert answer.blame is not None
    assert answer.blame.finding.message == "sample 2 of input 0 holds NaN"
    spiked = saved(tmp_path, model, (torch.randn(4, 6),), reason="spike", grad_norm=100.0)
    assert replay(spiked, mlp()).verdict == "unclear"


def test_a_masked_output_is_no_fault(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.register_buffer("causal", torch.triu(torch.full((4, 4), -math.inf), 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).masked_fill(torch.tensor([True, False, False, False]), -math.inf) + self.causal

    answer = replay(saved(tmp_path, Masked(), (torch.randn(4, 6),)), Masked())
    assert answer.blame is None
    assert answer.verdict == "unclear"


def test_a_module_path_and_a_recomputed_forward(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return (self.line(x).square() * keep).sqrt()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Inner(), Inner()])

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            x = checkpoint(self.layers[0], x, torch.ones_like(keep), use_reentrant=False)
            return checkpoint(self.layers[1], x, keep, use_reentrant=False).mean()

    keep = torch.ones(3, 4)
    keep[0] = 0
    model = Outer()
    answer = replay(saved(tmp_path, model, (torch.randn(3, 4), keep)), Outer())
    assert not math.isfinite(norm_of(model))
    assert answer.blame is not None
    culprit = answer.blame.culprit
    assert culprit is not None
    assert (culprit.name, culprit.module) == ("sqrt backward", "layers.1")
    assert culprit.line.startswith(f"{__file__}:")
    assert culprit.text == "return (self.line(x).square() * keep).sqrt()"


def test_a_compiled_part_is_seen_operation_by_operation(tmp_path: Path) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(LogOfSoftmax(), backend="eager")

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.inner(x, target)

    bundle = saved(tmp_path, Part(), (1000 * torch.randn(4, 8), torch.arange(4)))
    assert bundle.weights is not None
    assert "inner.head.weight" in bundle.weights
    answer = replay(bundle, Part())
    assert answer.blame is not None
    assert answer.blame.finding.message.startswith("log gave -Inf")


def test_memory_that_is_written_in_place_is_followed() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            half = y[:, :2]
            half.div_(torch.zeros(2))
            room = torch.empty(4, 4).fill_(math.nan)
            room.copy_(y)
            return room.sum()

    model = InPlace()
    watch = OperationWatch(model, [])
    seen = watch.look(watch.call(model, torch.ones(4, 4)))
    assert seen.holds.bad
    assert getattr(seen.root, "name", "") == "div"
    assert not model._forward_hooks, "the watch leaves no hook behind"
    assert not model.inner._forward_pre_hooks


def test_growth_is_traced_to_the_first_jump() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y / (y.detach() - y.detach() + 1e-6)
            return self.second(y).square().mean()

    model = Steep()
    watch = OperationWatch(model, [])
    loss = watch.call(model, torch.ones(4, 4))
    watch.call(loss.backward)
    blame = blame_jump(watch.operations, watch.arrived, "second.weight", [])
    assert blame is not None
    assert blame.culprit is not None
    assert blame.culprit.name == "div"
    assert blame.culprit.growth > 1e5


def test_bad_input_is_told_with_its_cure(tmp_path: Path) -> None:
    path = log_of_zero(tmp_path, LogOfSoftmax())
    bundle = load_bundle(path)
    with pytest.raises(ReplayError, match=r"does not fit the bundle's batch: .*input 0 \(4, 8\) float32.*factory"):
        replay(load_bundle(incident_without_weights(tmp_path)), nn.Linear(3, 3))
    model = LogOfSoftmax()
    model.head = nn.Linear(8, 7)
    with pytest.raises(WeightsError, match=r"head.weight is \(5, 8\) there and \(7, 8\) in the model"):
        replay(bundle, model)
    with pytest.raises(WeightsError, match=r"the model has no head.bias and the weights have no 0.weight"):
        replay(dataclasses.replace(bundle, weights={"head.bias": torch.zeros(5)}), mlp())
    with pytest.raises(
        ReplayError, match=r"--loss failed with TypeError.*called as loss\(output, \*args, \*\*kwargs\)"
    ):
        replay(bundle, LogOfSoftmax(), lambda output: output)
    with pytest.raises(ReplayError, match=r"--loss must return one number as a tensor \(got \(4, 8\) float32\)"):
        replay(bundle, LogOfSoftmax(), lambda output, x, target: x)
    with pytest.raises(ReplayError, match="--device nowhere can't be used"):
        replay(bundle, LogOfSoftmax(), device="nowhere")
    bundle.forwards, bundle.notes = [], ["the batch was left out: too large"]
    with pytest.raises(ReplayError, match="holds no batch: the batch was left out: too large"):
        replay(bundle, LogOfSoftmax())


def incident_without_weights(folder: Path) -> Path:
    capture = capture_of(model := LogOfSoftmax(), weights=False)
    model(1000 * torch.randn(4, 8), torch.arange(4)).backward()
    capture.step_ended(STEP)
    draft = capture.save(record(), identity=identity(), settings={}, journal=folder / "rank-00000.db")
    assert draft is not None
    return draft.write()


def test_a_spike_without_its_weights_is_unclear(tmp_path: Path) -> None:
    """A model as it is made has large gradients, whatever the step had; a sample that stands out is still named."""
    bundle = load_bundle(weights_too_far(tmp_path, weighted()))
    assert bundle.weights is not None
    known = replay(bundle, weighted())
    assert (known.verdict, known.blame and known.blame.finding.rule) == ("reproduced", "large_throughout")
    bundle.weights = None
    fresh = weighted()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(30)
    answer = replay(bundle, fresh)
    assert (answer.verdict, answer.blame) == ("unclear", None)
    assert "factory's weights" in answer.why


def test_a_model_that_writes_in_place_is_told_where(tmp_path: Path) -> None:
    class Reused(nn.Module):
        def __init__(self, inplace: bool = False) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.relu = nn.ReLU(inplace=inplace)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x).sigmoid()
            return (self.relu(y - 0.5) + self.relu(y)).mean()

    bundle = saved(tmp_path, Reused(), (torch.randn(2, 4),))
    with pytest.raises(ReplayError, match=r"modified by an inplace operation.*line \d+, in forward.*needs a copy") as e:
        replay(bundle, Reused(inplace=True))
    assert __file__ in str(e.value)


def test_weights_files(tmp_path: Path) -> None:
    model = mlp()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    for name, content in {"plain": state, "nested": {"epoch": 3, "model_state_dict": state}}.items():
        torch.save(content, path := tmp_path / name)
        other = mlp()
        put_weights(other, load_weights(path))
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    with pytest.raises(WeightsError, match="does not exist"):
        load_weights(tmp_path / "none")
    with pytest.raises(WeightsError, match="format_utils dcp_to_torch"):
        load_weights(tmp_path)
    torch.save(model, whole := tmp_path / "whole")
    with pytest.raises(WeightsError, match="nothing is executed from it"):
        load_weights(whole)
    (text := tmp_path / "text").write_text("weights")
    with pytest.raises(WeightsError, match=r"text (can't be read|holds more)"):
        load_weights(text)
    torch.save({"epoch": 3}, other_file := tmp_path / "other")
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_weights(other_file)


def test_tied_weights_and_types_are_taken_over() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    trained = Tied().half()
    model = Tied()
    put_weights(model, dict(trained.named_parameters()))  # as a bundle holds them: each once
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.float16
    assert torch.equal(model.head.weight, trained.head.weight)


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Linear(2, 2)\n"
        "def sized(size, *, depth, width=3): return nn.Linear(size, size)\n"
        "def number(): return 3\n"
        "def fails(): raise RuntimeError('no GPU')\n"
        "ready = nn.Linear(2, 2)\n"
        "class Net(nn.Linear):\n    def __init__(self): super().__init__(2, 2)\n"
    )
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "trains_at_import.py").write_text("raise SystemError('training')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("make", "ready", "Net"):
        assert isinstance(factory.model(f"made_here:{name}"), nn.Linear)
    for spec, why in {
        "made_here": "must be module:name",
        "nowhere:make": "no module nowhere; run this where it lies",
        "made_here:mak": "made_here has no 'mak'; check how it is spelt",
        "made_here:sized": r"needs arguments \(size, depth\)",
        "made_here:number": r"must return a torch.nn.Module \(got a int\)",
        "made_here:fails": "failed with RuntimeError: no GPU",
        "made_here:nn.__name__": r"must be a function \(got a str\)",
        "needs_more:make": "importing needs_more needs no_such_library; install it",
        "trains_at_import:make": "failed with SystemError: training; a script that trains when it is imported",
    }.items():
        with pytest.raises(FactoryError, match=f"^--model .*{why}"):
            factory.model(spec)


def command(folder: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    replaying.add_arguments(parser)
    return parser.parse_args([str(folder), *arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_of_zero(tmp_path, LogOfSoftmax())
    assert replaying.run(command(path, "--model", "zoo_replay:LogOfSoftmax", "--json")) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert answer["verdict"] == "reproduced"
    assert answer["first"]["rule"] == "broken_operation"
    assert answer["first"]["cure"].startswith("torch.log(x.clamp_min")
    assert answer["loss"] == "NaN"
    assert (answer["step"], answer["rank"], answer["micro_step"]) == (STEP, 0, 1)
    clean = saved(tmp_path, model := mlp(), (torch.randn(4, 6),))
    torch.save(model.state_dict(), weights := tmp_path / "weights.pt")
    clean.weights = None
    arguments = ["--model", "zoo_replay:mlp", "--loss", "zoo_replay:square"]
    write_bundle(bundle := tmp_path / "clean.bundle", clean)
    assert replaying.run(command(bundle, *arguments, "--weights", str(weights))) == 1
    out = capsys.readouterr().out
    assert "not reproduced: loss and gradients of this batch are finite here; suspect hardware or a race" in out
    assert "as the factory makes them" not in out
    assert "largest growths" in out
    replaying.run(command(bundle, *arguments))
    assert "the weights are as the factory makes them, which may not reproduce" in capsys.readouterr().out


def test_it_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Where nothing else has been imported, and the model's file lies in the working directory."""
    torch.manual_seed(0)
    path = log_of_zero(tmp_path, LogOfSoftmax())
    code = (
        "import sys, argparse\nfrom gradmon.diagnose import replay\np = argparse.ArgumentParser()\n"
        "replay.add_arguments(p)\nsys.exit(replay.run(p.parse_args()))\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path), "--model", "zoo_replay:LogOfSoftmax"],
        capture_output=True, text=True, cwd=here, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "first: log gave -Inf" in done.stdout


def test_a_loss_scale_is_applied_and_taken_off(tmp_path: Path) -> None:
    model = mlp().half()
    x = torch.randn(4, 6).half()
    bundle = saved(tmp_path, model, (x,))
    norm = norm_of(model)
    assert replay(bundle, mlp(), square).norm == pytest.approx(norm, rel=1e-2)
    bundle.record = record(loss_scale=2.0**30)
    answer = replay(bundle, mlp(), square)
    assert answer.verdict == "reproduced", "2^30 is too much for fp16"
    bundle.record = record(loss_scale=16.0)
    assert replay(bundle, mlp(), square).norm == pytest.approx(norm, rel=1e-2)


def test_incidents_of_the_zoo_are_real(tmp_path: Path) -> None:
    """The zoo itself refuses a step that does not break."""
    with pytest.raises(AssertionError, match="this step is to break"):
        incident(tmp_path, mlp(), lambda m: square(m(torch.randn(4, 6))))
    with pytest.raises(AssertionError, match="this step is to be a spike"):
        incident(tmp_path, mlp(), lambda m: square(m(torch.randn(4, 6))), usual=100.0)
