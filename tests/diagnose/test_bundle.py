"""The file: what goes in comes out, what does not fit is named, what is no bundle is refused."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import stat
import sys
import types
from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo_replay import STEP, capture_of, identity, record

from gradmon.diagnose import bundle as bundles
from gradmon.diagnose.bundle import Bundle, BundleError, Draft, Fields, load_bundle, write_bundle
from gradmon.inputs import mark_of_batch
from gradmon.journal import JournalWriter
from gradmon.loaded import Gave, Loaded
from gradmon.record import DETAIL_COLUMNS, Detail, Event, StepRecord


class Sink(nn.Module):
    """Takes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 64))
        self.register_buffer("count", torch.zeros(()))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.weight.sum()


def draft_of(folder: Path, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Draft:
    model = Sink()
    model.norm.eval()
    capture = capture_of(model, **(settings or {}))
    model(*args, **kwargs)
    capture.step_ended(STEP)
    draft = capture.save(
        record(parameter="weight"), identity=identity(), settings={"run": "zoo"}, journal=folder / "rank-00000.db"
    )
    assert draft is not None
    return draft


def written(folder: Path, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Bundle:
    return load_bundle(draft_of(folder, *args, settings=settings, **kwargs).write())


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    x, ids = torch.randn(3, 4), torch.arange(3)
    draft = draft_of(tmp_path, {"x": x, "ids": ids}, [1, 2.5, "a", None], mask=torch.tensor([True]))
    path = draft.write()
    assert path.name == f"rank-00000-step-{STEP:07d}.bundle"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing half-written stays"
    read = load_bundle(path)
    forward = read.forwards[0]
    assert torch.equal(forward.args[0]["x"], x)
    assert torch.equal(forward.args[0]["ids"], ids)
    assert forward.args[1] == [1, 2.5, "a", None]
    assert torch.equal(forward.kwargs["mask"], torch.tensor([True]))
    assert read.identity == identity()
    assert dataclasses.replace(read.record, grad_norm=0.0) == record(parameter="weight", grad_norm=0.0)
    assert math.isnan(read.record.grad_norm)
    assert read.weights is not None
    assert torch.equal(read.weights["weight"], torch.ones(64, 64))
    assert {"count", "norm.running_mean"} <= read.weights.keys()
    assert read.eval_modules == ["norm"]
    assert read.config == {"run": "zoo"}
    assert read.versions["torch"] == str(torch.__version__)
    assert torch.equal(forward.rng["cpu"], draft.bundle.forwards[0].rng["cpu"])
    assert not read.notes


def test_a_view_is_saved_without_what_it_looks_into(tmp_path: Path) -> None:
    data = torch.randn(1000, 1000)
    path = draft_of(tmp_path, data[3:5], settings={"weights": False}).write()
    assert path.stat().st_size < 200_000 < data.nbytes
    assert torch.equal(load_bundle(path).forwards[0].args[0], data[3:5])


Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Sample:
    image: Tensor
    label: int


class Strange:
    pass


def test_objects_become_plain(tmp_path: Path) -> None:
    image = torch.randn(2, 2)
    read = written(
        tmp_path,
        Sample(image, 3),
        UserDict(input_ids=image),
        Pair(1, image),
        np.ones((2, 2), dtype=np.float32),
        np.float64(0.5),
        Strange(),
    )
    sample, encoding, pair, array, number, strange = read.forwards[0].args
    assert isinstance(sample, Fields)
    assert torch.equal(sample.image, image)
    assert sample["label"] == 3
    assert torch.equal(encoding["input_ids"], image)
    assert pair.left == 1
    assert torch.equal(array, torch.ones(2, 2))
    assert number == 0.5
    assert type(number) is float
    assert strange is None
    assert read.notes == [
        "input 3 was a numpy array and is a tensor now",
        f"input 5 was left out: a {__name__}.Strange can't be saved",
    ]
    with pytest.raises(AttributeError, match="no 'colour'"):
        _ = sample.colour


def test_weights_are_left_out_first_then_the_batch(tmp_path: Path) -> None:
    small, large = torch.ones(2), torch.ones(3 << 18)  # 3 MiB
    fits = written(tmp_path, small, settings={"max_mib": 1})
    assert fits.weights is not None
    model_too_large = Sink()
    model_too_large.weight = nn.Parameter(torch.ones(3 << 18))
    capture = capture_of(model_too_large, max_mib=1)
    model_too_large(small)
    capture.step_ended(STEP)
    draft = capture.save(record(), identity=identity(), settings={}, journal=tmp_path / "rank-00000.db")
    assert draft is not None
    assert draft.bundle.weights is None
    assert draft.bundle.forwards
    assert "the weights were left out: 3 MiB do not fit" in draft.bundle.notes[0]
    read = written(tmp_path, large, settings={"max_mib": 1})
    assert not read.forwards
    assert read.notes == ["the batch of micro-step 1 was left out: 3 MiB do not fit into incident.max_mib 1"]


def test_bad_samples_are_named(tmp_path: Path) -> None:
    x = torch.randn(8, 3)
    x[3, 1] = math.nan
    y = torch.zeros(6)
    y[1] = y[4] = math.inf
    read = written(tmp_path, x, torch.tensor(math.nan), target={"y": y}, fine=torch.ones(2))
    assert read.forwards[0].bad == [
        "sample 3 of input 0 holds NaN",
        "input 1 holds NaN",
        "samples 1, 4 of input target['y'] hold Inf",
    ]
    model = Sink()
    capture = capture_of(model)
    capture.loaded = lambda: Loaded((Gave(tuple(range(90, 98)), mark_of_batch(x), x),))
    model(x)
    capture.step_ended(STEP)
    draft = capture.save(record(), identity=identity(), settings={}, journal=tmp_path / "rank-00000.db")
    assert draft is not None
    told = load_bundle(draft.write()).forwards[0].bad
    assert told == ["sample 3 (index 93 of the dataset) of input 0 holds NaN"]


class Landed:
    def __init__(self, step: int) -> None:
        self.step = step

    def landed(self) -> bool:
        return True

    def record(self, memory_bytes: int | None) -> tuple[StepRecord, list[Event]]:
        return record(step=self.step, reason="healthy", grad_norm=1.0), []

    def findings(self) -> list[Event]:
        return []

    def details(self) -> list[Detail]:
        rows = [dict.fromkeys(DETAIL_COLUMNS, 0.0) for _ in range(3)]
        rows[0] |= {"sum_of_squares": 9.0}
        rows[1] |= {"sum_of_squares": math.nan, "nan_count": 2.0}
        rows[2] |= {"sum_of_squares": 16.0}
        cells = [row[name] for row in rows for name in DETAIL_COLUMNS]
        return [Detail(self.step, "global", np.array(cells).tobytes())]


def test_the_steps_around_it_come_from_the_journal(tmp_path: Path) -> None:
    journal = JournalWriter(
        tmp_path / "rank-00000.db", identity(), parameters=["a", "b", "c"], config={}, sample=dict, elements=[1, 1, 1]
    )
    for step in (*range(1, STEP), *range(STEP + 1, 101)):
        journal.put(Landed(step))
    assert journal.flush()
    paths = []
    draft = draft_of(tmp_path, torch.ones(2))
    journal.call("bundle", lambda: paths.append(draft.write()))  # as in training: on the writer's thread
    assert journal.flush()
    journal.close("finished")
    read = load_bundle(paths[0])
    assert [r.step for r in read.records] == list(range(37, 101))
    assert [p["name"] for p in read.worst] == ["b", "c", "a"]
    assert read.worst[1]["norm"] == 4.0
    assert math.isnan(read.worst[0]["norm"])


def redactor(monkeypatch: pytest.MonkeyPatch, function: Any) -> str:
    module = types.ModuleType("private")
    module.keep = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "private", module)
    return "private:keep"


def test_redaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = torch.full((4, 4), 123.0)

    def shapes_only(args: Any, kwargs: Any) -> Any:
        return tuple(torch.zeros_like(a) for a in args), {}

    settings = {"redact": redactor(monkeypatch, shapes_only)}
    path = draft_of(tmp_path, secret, name="Ada", settings=settings).write()
    read = load_bundle(path)
    assert torch.equal(read.forwards[0].args[0], torch.zeros(4, 4))
    assert not read.forwards[0].kwargs
    assert b"Ada" not in path.read_bytes()
    assert read.notes == ["the batch is what private:keep left of it"]

    def broken(args: Any, kwargs: Any) -> Any:
        raise KeyError("ids")

    for function, why in ((broken, "KeyError: 'ids'"), (lambda a, k: a, "TypeError: must return (args, kwargs)")):
        settings = {"redact": redactor(monkeypatch, function)}
        path = draft_of(tmp_path, secret, name="Ada", settings=settings).write()
        read = load_bundle(path)
        assert not read.forwards
        assert b"Ada" not in path.read_bytes()
        assert f"incident.redact private:keep failed ({why}" in read.notes[0]
    read = written(tmp_path, secret, settings={"redact": "no_such_module:keep"})
    assert not read.forwards
    assert "no module no_such_module" in read.notes[0]


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(path)
    return str(caught.value)


def test_what_is_no_bundle_is_refused_with_a_cure(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.bundle")
    assert "is a directory: name one bundle and it holds none" in refused(tmp_path)
    path = draft_of(tmp_path, torch.randn(64, 64)).write()
    assert f"it holds {path}" in refused(tmp_path)
    data = path.read_bytes()
    (text := tmp_path / "text").write_text("hello")
    assert "is not a bundle" in refused(text)
    (empty := tmp_path / "empty").write_bytes(b"")
    assert "is not a bundle" in refused(empty)
    (cut := tmp_path / "cut").write_bytes(data[: len(data) // 2])
    assert "is cut off; copy it again" in refused(cut)
    torch.save({"model": {}}, checkpoint := tmp_path / "checkpoint.pt")
    assert "though torch can read it (a checkpoint?)" in refused(checkpoint)
    torch.save({"gradmon_bundle": 1}, hollow := tmp_path / "hollow")
    assert "is damaged: KeyError" in refused(hollow)


def test_each_flipped_byte_is_noticed_or_without_effect(tmp_path: Path) -> None:
    path = draft_of(tmp_path, torch.randn(8, 8), settings={"weights": False}).write()
    data = path.read_bytes()
    noticed = 0
    for place in range(0, len(data), max(1, len(data) // 150)):
        (hit := tmp_path / "hit").write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            load_bundle(hit)
        except BundleError:  # and nothing else
            noticed += 1
    assert noticed > 75, "the rest is padding"


def test_a_newer_version_asks_for_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = written(tmp_path, torch.ones(2))
    read.versions["gradmon"] = "9.9"
    monkeypatch.setattr(bundles, "VERSION", 7)
    write_bundle(path := tmp_path / "newer.bundle", read)
    monkeypatch.undo()
    assert "has bundle format 7, written by gradmon 9.9" in (told := refused(path))
    assert "upgrade gradmon" in told


def test_nothing_is_executed_from_a_bundle(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"gradmon_bundle": 1, "record": Bomb()}, path := tmp_path / "bomb.bundle")
    assert "that is not done" in refused(path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "it would have gone off"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = draft_of(tmp_path, torch.ones(2))

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        draft.write()
    assert not list(tmp_path.iterdir())
