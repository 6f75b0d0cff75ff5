"""A hand-written loop with Accelerate on two ranks, as hf_accelerate.py runs it; against the loop without gradmon."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hf_launch
import pytest

from gradmon.journal import read_journal
from gradmon.record import StepRecord

Found = dict[str, Any]
# The first test waits for all trainings.
pytestmark = pytest.mark.timeout(hf_launch.SECONDS + 10)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each rank found, by the training's name; all of them are run once."""
    return hf_launch.torchrun("hf_accelerate.py", tmp_path_factory.mktemp("accelerate"))


def records(found: Found) -> list[StepRecord]:
    return [record for _, record in read_journal(Path(found["journal"])).steps]


def test_training_is_the_same_bit_for_bit(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        plain, watched = rank["plain"], rank["watched"]
        assert watched["topology"] == "ddp"
        assert len(set(plain["losses"])) == 24, "it trains"
        for what in ("weights", "moments", "losses", "norms", "reported"):
            assert watched[what] == plain[what], what
    assert ranks[0]["watched"]["weights"] == ranks[1]["watched"]["weights"]


def test_norms_are_the_true_ones_under_the_loops_clip(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        watched = rank["watched"]
        assert len(watched["norms"]) == 12
        assert min(watched["norms"]) > 2, "the clip at 1.0 bites"
        found = records(watched)
        assert [r.grad_norm for r in found] == pytest.approx(watched["norms"], rel=1e-5)
        assert [r.grad_norm_applied for r in found] == pytest.approx([1.0] * 12, rel=1e-4)
        assert watched["reported"] == pytest.approx(watched["norms"], rel=1e-5), "what the loop is told"


def test_a_steps_loss_is_the_mean_of_its_micro_steps(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        losses = rank["watched"]["losses"]
        means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
        assert [r.loss for r in records(rank["watched"])] == pytest.approx(means, rel=1e-6)


def test_nan_on_one_rank_is_skipped_on_both(ranks: list[dict[str, Found]]) -> None:
    assert not any(rank["nan plain"]["finite"] for rank in ranks), "and kills the loop alone"
    watched = [rank["nan watched"] for rank in ranks]
    assert sorted(w["nan_batches"] for w in watched) == [0, 1]
    culprit = [w["nan_batches"] for w in watched].index(1)
    for found in watched:
        assert found["finite"]
        [skipped] = [r for r in records(found) if not math.isfinite(r.grad_norm)]
        assert (skipped.action, skipped.applied, skipped.culprit_rank) == ("skip", True, culprit)
        assert [math.isnan(norm) for norm in found["norms"]].index(True) == skipped.step - 1
        assert sum(r.action == "none" for r in records(found)) == 11
    assert watched[0]["weights"] == watched[1]["weights"]
    assert watched[0]["moments"] == watched[1]["moments"]


def test_a_resumed_run_is_the_uninterrupted_one(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        whole, parted, resumed = rank["watched"], rank["parted"], rank["resumed"]
        assert parted["weights"] != whole["weights"]
        assert [r.step for r in records(resumed)] == list(range(6, 13)), "of the second part alone"
        assert resumed["weights"] == whole["weights"]
        assert resumed["moments"] == whole["moments"]
        assert resumed["state"] == whole["state"]
        assert resumed["state"]["step"] == 12
        # The detector needs 8 norms before it has a limit: seven steps alone would have none.
        assert records(resumed)[-1].grad_norm_limit == records(whole)[-1].grad_norm_limit is not None
