"""A loss that is computed outside of the model: its targets are saved, and replay explains what broke in it."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bundle import redactor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from zoo_replay import STEP, capture_of, identity, record

import gradmon
from gradmon.cli import main
from gradmon.config import DataConfig
from gradmon.data_watch import BatchWatch
from gradmon.diagnose.bundle import Bundle, load_bundle, rest_of, write_bundle
from gradmon.diagnose.factory import FactoryError
from gradmon.diagnose.factory import loss as loss_named
from gradmon.diagnose.replay import ReplayError, replay

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import gradmon

class Padded(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, generator=generator)
        return x, x[:4], torch.tensor(0.0 if 24 <= index < 28 else 1.0)

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))

def masked_mean(output, target, mask):
    per = (output - target).square().mean(1)
    return (per * mask).sum() / mask.sum()

def train():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradmon.attach(model, optimizer, config={"dir": sys.argv[1], "agent": {"start": "off"}}):
        for x, y, mask in DataLoader(Padded(), batch_size=4):
            optimizer.zero_grad()
            loss = masked_mean(model(x), y, mask)
            loss.backward()
            optimizer.step()
"""
GUARD = '\nif __name__ == "__main__":\n    train()\n'


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's files lie; what is imported from there is forgotten."""
    monkeypatch.setenv("GRADMON_AGENT", "off")
    monkeypatch.setenv("GRADMON_DIR", str(tmp_path / "journals"))
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "journals")])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_nan_in_the_users_own_loss_is_explained(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scripts / "padded.py").write_text(SCRIPT + GUARD)
    importlib.import_module("padded").train()
    (path,) = (scripts / "journals").rglob("*.bundle")
    forward = load_bundle(path).forwards[0]
    assert len(forward.args) == 1, "forward got no target"
    x, target, mask = forward.loaded
    assert not mask.any(), "this is the batch that breaks"
    assert x.data_ptr() == forward.args[0].data_ptr(), "stored once"
    assert torch.equal(target, x[:, :4])

    capsys.readouterr()
    assert main(["replay", str(path), "--model", "padded:make_model"]) == 1
    told = capsys.readouterr().out
    assert "unclear: " in told
    assert f"run `gradmon replay {path} --model padded:make_model --loss module:function`" in told
    assert "(the batch is samples [24, 25, 26, 27] of the dataset)" in told

    assert main(["replay", str(path), "--model", "padded:make_model", "--loss", "padded:masked_mean"]) == 0
    told = capsys.readouterr().out
    line = next(n for n, text in enumerate(SCRIPT.splitlines(), 1) if "/ mask.sum()" in text)
    assert "first: div gave NaN" in told
    assert "(0 / 0)" in told
    assert f"padded.py:{line}: return (per * mask).sum() / mask.sum()" in told


class Pairs(Dataset[Any]):
    """What `form` makes of sample i: an image and its class."""

    def __init__(self, form: Any) -> None:
        self._form = form

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return self._form(x, index % 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4))


class Watched:
    """A model whose loader and forwards are watched as in training."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model = model
        self.batches = BatchWatch(DataConfig())
        self.batches.start()
        self.capture = capture_of(model, **settings)
        self.capture.loaded = self.batches.loaded

    def load(self, loader: Any) -> Iterator[Any]:
        iterator = iter(loader)
        for batch in iterator:
            self.batches.seen(iterator, batch)
            yield batch

    def saved(self, folder: Path, settings: dict[str, Any] | None = None, **changed: Any) -> Bundle:
        self.capture.step_ended(STEP)
        draft = self.capture.save(
            record(**changed), identity=identity(), settings=settings or {}, journal=folder / "rank-00000.db"
        )
        self.stop()
        assert draft is not None
        return load_bundle(draft.write())

    def stop(self) -> None:
        self.capture.stop()
        self.batches.stop()


def bundle_of(
    folder: Path, form: Any, inputs: Any, *, settings: dict[str, Any] | None = None, **changed: Any
) -> Bundle:
    """Of the second batch of a loader; `inputs` takes out of a batch what forward gets."""
    watched = Watched(net(), **(settings or {}))
    for number, batch in enumerate(watched.load(DataLoader(Pairs(form), batch_size=4))):
        watched.model(inputs(batch)).sum().backward()
        if number == 1:
            break
        watched.capture.step_ended(1)
    return watched.saved(folder, **changed)


def pair(x: Tensor, label: int) -> Any:
    return x, label


def entries(x: Tensor, label: int) -> Any:
    return {"pixels": x, "labels": label}


def by_keyword(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels)


def of_the_batch(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch["labels"])


LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("form", "inputs", "loss"),
    [
        (pair, lambda b: b[0], nn.CrossEntropyLoss()),
        (pair, lambda b: b[0].clone(), F.cross_entropy),
        (pair, lambda b: b[0].clone().half().float(), F.cross_entropy),
        (pair, lambda b: b[0] / 2 - 1, F.cross_entropy),
        (lambda x, y: (y, x), lambda b: b[1].clone(), F.cross_entropy),
        (lambda x, y: (x, y, f"file {y}"), lambda b: b[0], nn.CrossEntropyLoss()),
        (entries, lambda b: b["pixels"], by_keyword),
        (entries, lambda b: b["pixels"], lambda output, **rest: by_keyword(output, **rest)),
        (entries, lambda b: b["pixels"], of_the_batch),
        (entries, lambda b: b["pixels"], nn.CrossEntropyLoss()),
        (entries, lambda b: b.pop("labels") is not None and b["pixels"], by_keyword),
    ],
)
def test_the_loss_is_called_with_what_forward_did_not_get(form: Any, inputs: Any, loss: Any, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, form, inputs)
    forward = bundle.forwards[0]
    assert forward.indices == [4, 5, 6, 7]
    answer = replay(bundle, net(), loss)
    torch.manual_seed(0)
    model = net()
    model.load_state_dict(bundle.weights or {})
    with torch.random.fork_rng():
        torch.set_rng_state(forward.rng["cpu"])
        expected = F.cross_entropy(model(forward.args[0]), LABELS)
    assert answer.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert answer.verdict == "not reproduced", "it is the real loss"


def test_a_slice_of_the_batch_gets_the_whole_batch(tmp_path: Path) -> None:
    def next_token(output: Tensor, batch: Tensor) -> Tensor:
        assert batch.shape == (4, 7)
        return F.mse_loss(output, batch[:, 1:5])

    bundle = bundle_of(tmp_path, lambda x, _: torch.cat([x, x[:1]]), lambda b: b[:, :-1])
    assert math.isfinite(replay(bundle, net(), next_token).loss)


def test_where_nothing_remains_it_is_called_as_ever(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, lambda x, _: (x,), lambda b: b[0])
    assert rest_of(bundle.forwards[0]) == ()

    def own(output: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(output, x[:, :4])

    assert replay(bundle, net(), own).verdict == "not reproduced"
    with pytest.raises(ReplayError, match=r"called as loss\(output, \*args, \*\*kwargs\), with input 0 \(4, 6\)"):
        replay(bundle, net(), lambda output: output.sum())
    paired = bundle_of(tmp_path, pair, lambda b: b[0])
    with pytest.raises(ReplayError, match=r"called as loss\(output, \*rest\), with \(4,\) int64 that only the Data"):
        replay(paired, net(), lambda output, *, labels: output.sum())


def test_a_target_that_is_not_finite_is_named_with_its_sample(tmp_path: Path) -> None:
    def broken(x: Tensor, label: int) -> Any:
        return x, x[:4] * (math.nan if x[0] == Pairs(pair)[6][0][0] else 1.0)

    bundle = bundle_of(tmp_path, broken, lambda b: b[0])
    assert bundle.forwards[0].bad == ["sample 2 (index 6 of the dataset) of the loader's batch[1] holds NaN"]
    answer = replay(bundle, net(), nn.MSELoss())
    assert answer.blame is not None
    assert answer.blame.finding.rule == "broken_input"
    assert answer.blame.finding.message == bundle.forwards[0].bad[0]


def test_the_sample_on_which_the_loss_broke_is_named(tmp_path: Path) -> None:
    def log_loss(output: Tensor, labels: Tensor) -> Tensor:
        chosen = output.sigmoid().gather(1, labels[:, None]) * (labels[:, None] != 3)
        return -chosen.log().mean()

    answer = replay(bundle_of(tmp_path, pair, lambda b: b[0]), net(), log_loss)
    assert answer.blame is not None
    assert answer.blame.finding.message.endswith("in sample 3 (index 7 of the dataset) of the batch")
    assert "chosen.log().mean()" in answer.blame.finding.where


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Pairs(pair)[i] for i in range(12))


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
    newest = next(batches)
    for following in batches:
        yield newest
        newest = following
    yield newest


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("data", [Pairs(pair), Endless()])
def test_a_loader_that_runs_ahead_gives_no_other_batchs_targets(data: Any, changed: bool, tmp_path: Path) -> None:
    watched = Watched(net())
    for x, _ in ahead(watched.load(DataLoader(data, batch_size=4))):
        watched.model(1 - x if changed else x.clone())
        break
    bundle = watched.saved(tmp_path)
    if changed:
        assert bundle.forwards[0].loaded is None
        assert any("what the DataLoader gave is left out" in note for note in bundle.notes)
        assert "the targets are not in the bundle (see the notes)" in replay(bundle, net()).why
    else:
        assert torch.equal(bundle.forwards[0].loaded[0], bundle.forwards[0].args[0])
        assert torch.equal(rest_of(bundle.forwards[0])[0], LABELS)


def test_no_more_batches_live_than_one_beside_those_of_the_forwards() -> None:
    watched = Watched(net(), batches=3)
    alive: list[Any] = []
    data = [(torch.randn(6), i) for i in range(40)]
    loader = watched.load(DataLoader(data, batch_size=2))  # type: ignore[arg-type]
    for step in (1, 2, 3):
        for _ in range(6):
            batch = next(loader)
            alive += [weakref.ref(part) for part in batch]
            watched.model(batch[0].clone())
        watched.capture.step_ended(step)
        del batch
    gc.collect()
    kept = [i for i, ref in enumerate(alive) if ref() is not None]
    assert kept == list(range(28, 36)), "inputs and labels of the last 3 forwards, and of the batch before"
    watched.stop()
    gc.collect()
    assert not [ref for ref in alive[:34] if ref() is not None]


def test_it_fits_into_the_bundle_or_is_left_out(tmp_path: Path) -> None:
    def with_target(elements: int) -> Any:
        return lambda x, _: (x, torch.zeros(elements))

    fits = bundle_of(tmp_path, with_target(1 << 14), lambda b: b[0], settings={"max_mib": 1})
    assert fits.forwards[0].loaded[1].numel() == 1 << 16
    large = bundle_of(tmp_path, with_target(1 << 17), lambda b: b[0], settings={"max_mib": 1})
    assert large.forwards[0].loaded is None
    assert "what the DataLoader gave for micro-step 1 was left out: 2 MiB do not fit" in large.notes[0]


def test_redaction_covers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(function: Any) -> Bundle:
        settings = {"redact": redactor(monkeypatch, function)}
        return bundle_of(tmp_path, pair, lambda b: b[0], settings=settings)

    def of_all(args: Any, kwargs: Any, loaded: Any) -> Any:
        return tuple(torch.zeros_like(a) for a in args), kwargs, (torch.zeros_like(loaded[0]), loaded[1])

    forward = saved(of_all).forwards[0]
    assert not forward.args[0].any()
    assert not forward.loaded[0].any()
    assert torch.equal(rest_of(forward)[0], LABELS)
    bundle = saved(lambda args, kwargs: (args, kwargs))
    assert bundle.forwards[0].args
    assert bundle.forwards[0].loaded is None, "it never saw it"
    assert any("takes no third argument" in note for note in bundle.notes)
    bundle = saved(lambda args, kwargs, loaded: (args, kwargs))
    assert not bundle.forwards, "it failed, nothing may be saved"
    assert "must return (args, kwargs, loaded)" in bundle.notes[0]


def test_a_bundle_of_before_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(tmp_path, pair, lambda b: b[0])
    forgetful = dataclasses.make_dataclass("Forward", [f.name for f in dataclasses.fields(bundle.forwards[0])[:-1]])
    assert "loaded" not in {f.name for f in dataclasses.fields(forgetful)}
    known = {f.name: getattr(bundle.forwards[0], f.name) for f in dataclasses.fields(forgetful)}
    bundle.forwards = [forgetful(**known)]
    write_bundle(path := tmp_path / "old.bundle", bundle)
    old = load_bundle(path)
    assert old.forwards[0].loaded is None
    answer = replay(old, net())
    assert answer.verdict == "unclear"
    assert "the targets are not in the bundle (no DataLoader gave them): compute the loss inside forward" in answer.why
    assert "gradmon.doctor(model, batch, loss_fn) on samples [4, 5, 6, 7] of the dataset" in answer.why


def test_a_spike_without_its_loss_blames_nothing(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(5)])
            for block in self.blocks:
                nn.init.eye_(block.weight)
                block.weight.data.mul_(50)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    watched = Watched(Deep())
    for batch in watched.load(DataLoader(Pairs(pair), batch_size=4)):
        watched.model(batch[0]).sum().backward()
        break
    bundle = watched.saved(tmp_path, reason="spike", grad_norm=1.0, grad_norm_limit=0.1, nan_count=0)
    answer = replay(bundle, Deep())
    assert (answer.verdict, answer.blame) == ("unclear", None)
    assert "cure" not in answer.text()
    assert not [o for o in answer.growths if o.backward or not o.module], "the stand-in's are in no table"
    assert "--loss module:function" in answer.why
    assert replay(bundle, Deep(), F.cross_entropy).blame is not None, "with the loss it does"


def test_a_criterion_may_be_an_instance_or_a_class(scripts: Path) -> None:
    (scripts / "losses.py").write_text(
        "from torch import nn\ncriterion = nn.MSELoss()\nclass Focal(nn.Module):\n"
        "    def __init__(self, gamma): super().__init__()\n"
    )
    assert isinstance(loss_named("torch.nn:CrossEntropyLoss"), nn.CrossEntropyLoss)
    assert isinstance(loss_named("losses:criterion"), nn.MSELoss)
    with pytest.raises(FactoryError, match=r"needs arguments \(gamma\); name an instance"):
        loss_named("losses:Focal")


# --- a script that trains when it is imported -------------------------------------------------------------------------


def test_a_script_that_trains_on_import_is_refused(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scripts / "flat.py").write_text(SCRIPT + "\ntrain()\nprint('trained to the end')\n")
    (scripts / "guarded.py").write_text(SCRIPT + GUARD)
    write_bundle(path := scripts / "one.bundle", bundle_of(scripts, pair, lambda b: b[0]))
    for argv in (["replay", str(path), "--model", "flat:make_model"], ["doctor", "flat:make_model"]):
        assert main(argv) == 2
        out, told = capsys.readouterr()
        assert "flat trains when it is imported: put the training under `if __name__ == '__main__':`" in told
        assert "name the function that makes the model" in told
        assert "trained" not in out
    assert main(["doctor", "guarded:train"]) == 2
    assert "guarded:train: train trains when it is called" in capsys.readouterr().err
    assert not (scripts / "journals").exists(), "no monitor was attached"
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradmon.attach(model, optimizer).detach()  # and afterwards one can be
    assert (scripts / "journals").exists()


@pytest.mark.parametrize("command", ["replay", "doctor"])
def test_the_help_says_how_to_name_things(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    for part in ("your script's name without .py", "`train:make_model`", "`if __name__ == '__main__':`",
                 "`def make_model(): return Net(cfg)`", f"example:\n  gradmon {command} "):  # fmt: skip
        assert part in told
    assert ("loss(output, *rest)" if command == "replay" else "loss(model, batch)") in told


# --- the doctor's loss ------------------------------------------------------------------------------------------------


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def plain_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target)


def weighted(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (F.cross_entropy(output, target, reduction="none") * weight).mean()


def test_the_doctor_takes_a_loss_of_output_and_target() -> None:
    batch = torch.randn(64, 8), torch.arange(64) % 4
    for dtype in (torch.float32, torch.bfloat16):
        model = normed().to(dtype)
        inputs = batch[0].to(dtype), batch[1]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        plainly = gradmon.doctor(model, inputs, plain_loss)
        assert torch.equal(state, torch.get_rng_state())
        wrapped = gradmon.doctor(model, inputs, lambda m, b: plain_loss(m(b[0]), b[1]))
        assert plainly.loss == wrapped.loss
        assert [f.rule for f in plainly] == [f.rule for f in wrapped]
        after = model.state_dict()
        assert all(
            torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items()
        )
    assert gradmon.doctor(normed(), [*batch, torch.ones(64)], weighted).loss is not None
    assert gradmon.doctor(normed(), batch, nn.CrossEntropyLoss).loss is not None


def test_the_doctor_says_how_the_loss_is_called() -> None:
    batch = torch.randn(64, 8), torch.arange(64) % 4

    def three(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return (output * mask).sum() + target.sum()

    wrap = (
        r"your loss_fn is called as loss_fn\(model, batch\); wrap it: `lambda model, batch: my_loss\(model\(batch\[0\]"
    )
    with pytest.raises(ValueError, match=wrap):
        gradmon.doctor(normed(), batch, three)
    with pytest.raises(ValueError, match=wrap):
        gradmon.doctor(normed(), {"x": batch[0], "y": batch[1]}, plain_loss)
    with pytest.raises(ValueError, match=r"does not run on this batch: TypeError.*'list'") as raised:
        gradmon.doctor(normed(), batch, lambda model, batch: model(batch[0]) + ["a mistake behind the model"])
    assert "wrap it" not in str(raised.value)
    with pytest.raises(TypeError, match=r"^doctor\(\)"):
        gradmon.doctor(normed())  # type: ignore[call-arg]
