"""What is kept of a forward, and that keeping it changes nothing."""

from __future__ import annotations

import gc
import random
import weakref
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from zoo_replay import STEP, capture_of, identity, record

from gradmon.diagnose.bundle import Bundle
from gradmon.diagnose.capture import Capture


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    """A gloo group of this process alone: what wraps a model is real."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Noisy(nn.Module):
    """Draws from torch's generator and from Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.dropout(self.inner(x) * random.random() + shift).square().mean()


def saved(capture: Capture, folder: Path, **changed: Any) -> Bundle:
    capture._last_saved.clear()  # each time as if it were the first incident
    draft = capture.save(record(**changed), identity=identity(), settings={}, journal=folder / "rank-00000.db")
    assert draft is not None
    return draft.bundle


def train(watched: bool, steps: int = 5) -> tuple[list[Tensor], Tensor, object]:
    torch.manual_seed(3)
    random.seed(3)
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters())
    capture = capture_of(model) if watched else None
    for step in range(1, steps + 1):
        for micro in range(2):
            model(torch.randn(4, 6), shift=0.1 * micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        if capture is not None:
            assert len(capture._now.held) == 2
            capture.step_ended(step)
    return list(model.parameters()), torch.get_rng_state(), random.getstate()


def test_a_run_with_capture_is_bit_identical() -> None:
    without, with_ = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(without[0], with_[0], strict=True))
    assert torch.equal(without[1], with_[1])
    assert without[2] == with_[2]


def test_references_are_kept_of_two_steps_and_no_copies(tmp_path: Path) -> None:
    model = Noisy()
    capture = capture_of(model, batches=3)
    alive = []
    for step in (1, 2, 3):
        for _ in range(5):
            batch = torch.randn(4, 6)
            alive.append((step, weakref.ref(batch)))
            model(batch)
        assert capture._now.held[-1].args[0] is batch
        capture.step_ended(step)
        del batch
    gc.collect()
    counts = [sum(ref() is not None for s, ref in alive if s == step) for step in (1, 2, 3)]
    assert counts == [0, 0, 3], "of the step before the last 3 batches, of older ones none"
    bundle = saved(capture, tmp_path, step=3, micro_step=4)
    assert [f.micro_step for f in bundle.forwards] == [4]
    assert bundle.micro_steps == 5
    assert [f.micro_step for f in saved(capture, tmp_path, step=3).forwards] == [5, 4, 3]
    bundle = saved(capture, tmp_path, step=3, micro_step=1)
    assert "micro-step 1 broke first" in bundle.notes[0]
    assert "raise incident.batches" in bundle.notes[0]


def test_evaluation_nested_and_recomputed_calls_are_not_kept() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self(x, depth - 1) if depth else self.inner(x)

    model = Recursive()
    capture = capture_of(model)
    with torch.no_grad():
        model(torch.randn(2, 4))
    with torch.inference_mode():
        model(torch.randn(2, 4))
    assert not capture._now.held
    model(torch.randn(2, 4))
    assert [held.micro_step for held in capture._now.held] == [1]
    x = torch.randn(2, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert len(capture._now.held) == 2, "the forward that backward runs again is none"
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5))
    model(torch.randn(2, 4))
    assert len(capture._now.held) == 4, "a forward that failed leaves the count of calls right"


def test_backwards_number_the_micro_steps() -> None:
    model = Noisy()
    capture = capture_of(model)
    done = 0
    capture.backwards = lambda: done
    for _ in range(2):
        model(torch.randn(2, 6))  # two forwards, one backward
    done = 1
    model(torch.randn(2, 6))
    assert [held.micro_step for held in capture._now.held] == [1, 1, 2]


def test_a_batch_that_was_written_over_is_named(tmp_path: Path) -> None:
    model = Noisy()
    capture = capture_of(model)
    buffer = torch.zeros(4, 6)
    model(buffer, shift=0.5)
    capture.step_ended(STEP)
    assert not saved(capture, tmp_path).notes
    buffer.fill_(2.0)  # as a prefetcher does that reuses its memory
    assert saved(capture, tmp_path).notes == ["input 0 of micro-step 1 was written over after the forward call"]


def test_a_graph_is_not_kept_alive(tmp_path: Path) -> None:
    model = Noisy()
    capture = capture_of(model)
    leaf = torch.randn(4, 6, requires_grad=True)
    x = leaf * 2
    graph = weakref.ref(x)
    model(x).backward()
    capture.step_ended(STEP)
    del x
    assert graph() is None
    forward = saved(capture, tmp_path).forwards[0]
    assert forward.requires_grad == ["input 0"]
    assert torch.equal(forward.args[0], leaf.detach() * 2)


def test_a_mapping_is_seen_as_it_was(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, batch: Any, *, scale: float) -> Tensor:
            return self.inner(batch["x"]).mean() * scale

    model = Sum()
    capture = capture_of(model)
    batch = UserDict(x=torch.ones(2, 3), name="first")
    model(batch, scale=2.0)
    batch["x"] = torch.zeros(1)
    capture.step_ended(STEP)
    forward = saved(capture, tmp_path).forwards[0]
    assert torch.equal(forward.args[0]["x"], torch.ones(2, 3))
    assert forward.kwargs == {"scale": 2.0}
    assert forward.stack[0].startswith(f"{__file__}:")
    assert "in test_a_mapping_is_seen_as_it_was" in forward.stack[0]


def compiled_run(how: str) -> tuple[dict[str, Any], dict[str, Any], Capture | None, Tensor]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model: Any = torch.compile(net, backend="eager")
    capture = {"none": lambda: None, "outer": lambda: capture_of(model), "inner": lambda: capture_of(net)}[how]()
    total = torch.zeros(())
    for _ in range(4):
        total = total + model(torch.randn(2, 4)).sum()
    return dict(counters["graph_break"]), dict(counters["stats"]), capture, total.detach()


def test_a_compiled_model_compiles_as_without_capture(tmp_path: Path) -> None:
    breaks, stats, _, total = compiled_run("none")
    assert stats["unique_graphs"] == 1
    for how in ("outer", "inner"):
        with_breaks, with_stats, capture, with_total = compiled_run(how)
        assert (with_breaks, with_stats) == (breaks, stats), how
        assert torch.equal(total, with_total)
        assert capture is not None
        assert len(capture._now.held) == (4 if how == "outer" else 0)
        capture.step_ended(STEP)
        notes = saved(capture, tmp_path).notes
        assert notes == (
            [] if how == "outer" else ["no forward call of this step was seen: the batch is not in the bundle"]
        )


def test_a_model_compiled_in_place_is_left_alone(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = nn.Linear(4, 4)
    model.compile(backend="eager")
    capture = capture_of(model)
    assert "model.compile()" in capture.why_nothing
    assert not model._forward_pre_hooks
    model(torch.randn(2, 4))
    capture.step_ended(STEP)
    bundle = saved(capture, tmp_path)
    assert not bundle.forwards
    assert bundle.notes == [capture.why_nothing]


def test_ddp(one_rank: None, tmp_path: Path) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    capture = capture_of(model)
    model(torch.ones(2, 6)).sum().backward()
    capture.step_ended(STEP)
    bundle = saved(capture, tmp_path)
    assert torch.equal(bundle.forwards[0].args[0], torch.ones(2, 6))
    assert bundle.weights is not None
    assert sorted(bundle.weights) == ["0.bias", "0.weight"]


@pytest.mark.filterwarnings("ignore")  # FSDP2 on the CPU warns of what it has no use for
def test_fsdp2(one_rank: None, tmp_path: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = fully_shard(nn.Sequential(nn.Linear(6, 6)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    capture = capture_of(model)
    model(torch.ones(2, 6)).sum().backward()
    capture.step_ended(STEP)
    bundle = saved(capture, tmp_path)
    assert bundle.forwards[0].args[0].dtype == torch.float32, "as the script gave it, not as FSDP2 cast it"
    assert bundle.weights is None
    assert "each rank holds a part" in bundle.notes[0]


def test_stop_removes_all(tmp_path: Path) -> None:
    model = Noisy()
    assert not capture_of(model, bundles=0)._handles
    assert not model._forward_pre_hooks
    capture = capture_of(model)
    model(torch.randn(2, 6))
    assert model._forward_pre_hooks
    assert model._forward_hooks
    capture.stop()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not capture._now.held


def test_a_failure_of_capture_is_told_and_training_goes_on() -> None:
    model = Noisy()
    failed = []

    class Guarded:
        def __init__(self, part: str) -> None:
            self.part = part

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            failed.append((self.part, str(error)))
            return True

    capture = capture_of(model)
    capture._guarded = Guarded  # type: ignore[assignment]

    def broken() -> Any:
        raise OSError("no indices")

    capture.loaded = broken
    assert model(torch.randn(2, 6)).isfinite()
    assert failed == [("capture", "no indices")]


def test_the_first_and_the_newest_stay(tmp_path: Path) -> None:
    model = Noisy()
    capture = capture_of(model, bundles=3)
    written = []
    reasons = {**dict.fromkeys(range(1, 8), "spike"), 8: "nonfinite", 200: "spike", 250: "spike", 320: "spike"}
    for step, reason in reasons.items():
        model(torch.randn(2, 6))
        capture.step_ended(step)
        journal = tmp_path / "rank-00000.db"
        draft = capture.save(record(step=step, reason=reason), identity=identity(), settings={}, journal=journal)
        if draft is not None:
            draft.write()
            written.append(step)
    assert written == [1, 8, 200, 320], "a burst is one incident, and each kind has its own"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"rank-00000-step-{step:07d}.bundle" for step in (1, 200, 320)
    ]
