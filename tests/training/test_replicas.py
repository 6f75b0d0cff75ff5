"""A rank whose weights differ from the others' is named, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.nn.parallel import DistributedDataParallel
from toy import FEATURES, build

import gradmon
from gradmon.journal import read_journal
from gradmon.replicas import checksum, differing


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(4, 6).t(), torch.randn(2, 2, dtype=torch.complex64),
        torch.tensor(1.5), torch.randn(4).double(), torch.empty(0), torch.randn(9)[1:], torch.tensor([True, False]),
    ]  # fmt: skip


def test_the_checksum_is_of_the_bits() -> None:
    first = checksum(tensors())
    assert first.dtype == torch.float64
    assert 1 <= float(first) < 2**53
    assert float(first) == int(first)
    assert torch.equal(first, checksum(tensors()))
    assert torch.equal(first, checksum([t.clone() for t in tensors()])), "wherever they lie in memory"


@pytest.mark.parametrize("place", [0, 1, 2, 4, 5, 7])
def test_one_bit_is_seen(place: int) -> None:
    changed = tensors()
    flat = changed[place].reshape(-1).clone()
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0, dtype=flat.dtype))
    changed[place] = flat.view(changed[place].shape)
    assert not torch.equal(checksum(changed), checksum(tensors()))


def test_nan_and_swapped_tensors_are_seen() -> None:
    broken = tensors()
    broken[0][0, 0] = float("nan")
    assert torch.equal(checksum(broken), checksum(broken)), "NaN has bits, too"
    assert not torch.equal(checksum(broken), checksum(tensors()))
    a, b = torch.randn(4), torch.randn(4)
    assert not torch.equal(checksum([a, b]), checksum([b, a]))


@pytest.mark.parametrize(
    ("checksums", "named"),
    [
        ([5.0], ()), ([5.0, 5.0], ()), ([5.0, 6.0], (0, 1)), ([5.0, 6.0, 5.0], (1,)), ([1.0, 2.0, 3.0], (0, 1, 2)),
        ([0.0, 5.0, 5.0], ()), ([0.0, 5.0, 6.0, 5.0], (2,)), ([0.0, 0.0], ()), ([5.0, 5.0, 6.0, 6.0], (0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_the_minority_is_named(checksums: list[float], named: tuple[int, ...]) -> None:
    assert differing(checksums) == named


def drift_apart(directory: str, own_hook: bool, stop: bool) -> dict[str, Any]:
    """Rank 1's weights lose one bit after step 5 of 12; compared at 4, 8 and 12."""
    torch.manual_seed(0)
    model = DistributedDataParallel(build())
    if own_hook:  # a hook of the script's, that was there first
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model.register_comm_hook(None, allreduce_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = {"dir": directory, "replicas": {"check_every": 4}, "stop": {"on_divergence": stop}}
    monitor = gradmon.attach(model, optimizer, config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    healthy, stopped = [], None
    try:
        for step in range(1, 13):
            optimizer.zero_grad()
            model(torch.randn(8, FEATURES, generator=generator)).square().mean().backward()
            optimizer.step()
            if step == 5 and dist.get_rank() == 1:
                with torch.no_grad():
                    weight = model.module[0].weight
                    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
            healthy.append(monitor.is_healthy())
    except gradmon.TrainingStopped as error:
        stopped = (str(error), error.code, step)
    monitor.detach()
    assert monitor.journal_path is not None
    view = read_journal(monitor.journal_path)
    return {
        "events": [(e.step, e.kind, e.action, e.rank) for _, e in view.events],
        "message": [e.message for _, e in view.events],
        "healthy": healthy, "stopped": stopped,
    }  # fmt: skip


def test_beside_a_hook_of_the_scripts_nothing_is_compared(three_ranks: Ranks, tmp_path: Any) -> None:
    """Local SGD lets replicas differ on purpose."""
    for outcome in three_ranks.run(drift_apart, str(tmp_path), True, True):
        assert (outcome["events"], outcome["stopped"]) == ([], None)


def test_a_rank_that_differs_is_named(three_ranks: Ranks, tmp_path: Any) -> None:
    found = three_ranks.run(drift_apart, str(tmp_path), False, False)
    for outcome in found:
        assert outcome["events"] == [(8, "replicas", "none", 1)]
        assert outcome["message"] == ["the weights of rank 1 are no longer those of the other ranks"]
        assert outcome["healthy"] == [True] * 7 + [False] * 5
        assert outcome["stopped"] is None


def test_it_can_stop_the_run(three_ranks: Ranks, tmp_path: Any) -> None:
    found = three_ranks.run(drift_apart, str(tmp_path), False, True)
    assert {outcome["stopped"] for outcome in found} == {found[0]["stopped"]}
    message, code, step = found[0]["stopped"]
    assert (code, step) == (70, 9)
    assert "the weights of rank 1" in message
