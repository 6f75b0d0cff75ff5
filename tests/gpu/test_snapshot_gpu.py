"""Snapshots on a GPU: pinned memory, no synchronisation, and the bits of the moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon import snapshot
from gradmon.snapshot import Snapshots

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

MAKERS: dict[str, Any] = {
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_capturable": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(1e-2, device="cuda"), foreach=True, capturable=True
    ),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, history_size=4),
}


@pytest.fixture(autouse=True)
def default_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def build(kind: str = "adamw_fused") -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 8)).cuda()
    return model, MAKERS[kind](model.parameters())


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    inputs = torch.randn(32, 64, generator=torch.Generator("cuda").manual_seed(number), device="cuda")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def snapshots_of(model: nn.Module, optimizer: Optimizer) -> Snapshots:
    return Snapshots(model, lambda: dict(model.named_parameters()), [optimizer])


def restore_oldest(snapshots: Snapshots) -> int:
    step = snapshots.steps[0]
    snapshots.restore(step)
    return step


def tensors(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        for value in state.values():
            found += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Tensor)]
    return [t.detach() for t in found]


def copies(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    return [t.clone() for t in tensors(model, optimizer)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def take(snapshots: Snapshots, number: int) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshots.take(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", MAKERS)
def test_the_bits_come_back_and_nobody_waits(kind: str) -> None:
    model, optimizer = build(kind)
    snapshots = snapshots_of(model, optimizer)
    take(snapshots, 0)
    kept = {}
    for number in range(1, 7):
        step(model, optimizer, number)
        take(snapshots, number)
        kept[number] = copies(model, optimizer)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(-1)
    for _ in range(2):
        assert restore_oldest(snapshots) == 4
        assert same(tensors(model, optimizer), kept[4])
        step(model, optimizer, 7)
        after = copies(model, optimizer)
        step(model, optimizer, 8)
    restore_oldest(snapshots)
    step(model, optimizer, 7)
    assert same(tensors(model, optimizer), after)


def test_the_mode_finds_synchronisations() -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError):
        torch.ones(3, device="cuda").sum().item()


def test_memory_is_pinned_and_used_again() -> None:
    model, optimizer = build()
    step(model, optimizer, 1)
    snapshots = snapshots_of(model, optimizer)
    needed = snapshots.bytes_needed()
    addresses = []
    for number in range(1, 8):
        snapshots.take(number)
        chunks = [held.slot._chunks for held in snapshots._held]
        assert all(chunk.is_pinned() for c in chunks for chunk in c[True])
        assert chunks[-1][True]
        addresses.append(chunks[-1][True][0].data_ptr())
    assert addresses[3:6] == addresses[:3] and addresses[6] == addresses[0]
    assert snapshots.bytes_held() == needed


def test_what_is_kept_is_of_the_moment_in_the_stream() -> None:
    """take() returns while the GPU is far behind, and steps after it do not show."""
    model, optimizer = build()
    for number in range(1, 4):
        step(model, optimizer, number)
    then = copies(model, optimizer)
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(0)
    snapshots.clear()  # memory is there
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    snapshots.take(3)
    events = list(snapshots._held[0].slot._events.values())
    assert len(events) == 1 and not events[0].query(), "it did not wait"
    for number in range(4, 7):
        step(model, optimizer, number)
    assert restore_oldest(snapshots) == 3
    assert same(tensors(model, optimizer), then)


def test_a_captured_step_goes_on_after_a_rollback() -> None:
    """A CUDA graph holds on to addresses."""
    model, _ = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    inputs = torch.randn(32, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            model(inputs).square().mean().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        model(inputs).square().mean().backward()
        optimizer.step()
    snapshots = snapshots_of(model, optimizer)
    take(snapshots, 1)
    before = copies(model, optimizer)
    after = []
    for _ in range(2):
        graph.replay()
        graph.replay()
        after.append(copies(model, optimizer))
        restore_oldest(snapshots)
        assert same(tensors(model, optimizer), before)
    assert not same(after[0], before)
    assert same(after[0], after[1])


def test_tensors_span_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_CHUNK_BYTES", 4096)
    model, optimizer = build()
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    step(model, optimizer, 1)
    snapshots = snapshots_of(model, optimizer)
    take(snapshots, 1)
    then = copies(model, optimizer)
    step(model, optimizer, 2)
    restore_oldest(snapshots)
    assert same(tensors(model, optimizer), then)
