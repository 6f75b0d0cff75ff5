"""GradmonCallback in trainers on two ranks, as hf_train.py runs them; against the Trainer alone and torch's norms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hf_launch
import pytest

from gradmon.journal import JournalView, read_journal
from gradmon.record import StepRecord

#: Micro-steps of each optimizer step; an epoch's last has fewer.
MICRO_STEPS = [2, 2, 2, 2, 2, 1] * 2
#: Rows of a log that time what they say.
TIMES = ("runtime", "per_second")

Found = dict[str, Any]
# The first test waits for all trainings.
pytestmark = pytest.mark.timeout(hf_launch.SECONDS + 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Found]]:
    """What each rank found, by the training's name; all of them are run once."""
    return hf_launch.torchrun("hf_train.py", folder)


def journal(found: Found) -> JournalView:
    return read_journal(Path(found["journal"]))


def records(found: Found) -> list[StepRecord]:
    return [record for _, record in journal(found).steps]


def training_rows(found: Found) -> list[dict[str, float]]:
    return [row for row in found["log"] if "loss" in row]


def trainers_own(found: Found) -> list[dict[str, float]]:
    """Its log without gradmon's values and without durations."""
    return [
        {k: v for k, v in row.items() if not k.startswith("gradmon/") and not k.endswith(TIMES)} for row in found["log"]
    ]


def test_training_is_the_same_bit_for_bit(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        plain, watched = rank["plain"], rank["watched"]
        assert watched["topology"] == "ddp"
        assert watched["weights"] == plain["weights"]
        assert watched["moments"] == plain["moments"]
        assert watched["losses"] == plain["losses"]
        assert trainers_own(watched) == trainers_own(plain)
        assert len({row["loss"] for row in training_rows(plain)}) == 12, "it trains"
    assert ranks[0]["watched"]["weights"] == ranks[1]["watched"]["weights"]


def test_norms_are_the_true_ones_under_the_default_clip(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        watched = rank["watched"]
        norms = watched["norms"]
        assert len(norms) == 12
        assert min(norms) > 2, "the clip at 1.0 bites"
        found = records(watched)
        assert [r.grad_norm for r in found] == pytest.approx(norms, rel=1e-5)
        assert [r.grad_norm_applied for r in found] == pytest.approx([1.0] * 12, rel=1e-4)
        rows = training_rows(watched)
        assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5), "the Trainer's own"
        assert [row["gradmon/grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5), "of the same step"
        assert [row["gradmon/grad_norm_applied"] for row in rows] == pytest.approx([1.0] * 12, rel=1e-4)


def test_a_steps_loss_is_the_sum_of_its_micro_steps(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        losses = iter(rank["watched"]["losses"])
        sums = [sum(next(losses) for _ in range(count)) for count in MICRO_STEPS]
        assert [r.loss for r in records(rank["watched"])] == pytest.approx(sums, rel=1e-6)


def test_evaluation_and_saving_are_pauses_and_the_validation_loss_is_seen(ranks: list[dict[str, Found]]) -> None:
    watched = ranks[0]["watched"]
    assert watched["paused to save"] is True
    assert watched["paused to evaluate"] is True
    evaluations = [row["eval_loss"] for row in watched["log"] if "eval_loss" in row]
    assert len(evaluations) == 2
    view = journal(watched)
    assert view.samples["validation_loss"] == pytest.approx(evaluations[-1])
    assert view.paused_for == ""
    assert view.state == "finished"


def test_values_are_in_tensorboard(folder: Path, ranks: list[dict[str, Found]]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = list((folder / "watched").rglob("events.out.tfevents.*"))
    assert len(files) == 1
    events = accumulator.EventAccumulator(str(files[0]))
    events.Reload()
    tags = {tag.removeprefix("train/"): tag for tag in events.Tags()["scalars"]}
    norms = [event.value for event in events.Scalars(tags["gradmon/grad_norm"])]
    assert norms == pytest.approx(ranks[0]["watched"]["norms"], rel=1e-5)
    assert {"gradmon/grad_norm_applied", "gradmon/learning_rate_scale", "gradmon/skipped_steps"} <= tags.keys()


def test_nan_on_one_rank_kills_the_trainer_alone(ranks: list[dict[str, Found]]) -> None:
    assert not any(rank["nan plain"]["finite"] for rank in ranks)


def test_nan_on_one_rank_is_skipped_on_both(ranks: list[dict[str, Found]]) -> None:
    watched = [rank["nan watched"] for rank in ranks]
    assert [w["nan_batches"] for w in watched] == [1, 1], "one epoch on the one rank, the next on the other"
    for found in watched:
        assert found["finite"]
        skipped = [r for r in records(found) if not math.isfinite(r.grad_norm)]
        assert [(r.action, r.applied, r.grad_norm_applied) for r in skipped] == [("skip", True, 0.0)] * 2
        assert [math.isnan(norm) for norm in found["norms"]] == [r in skipped for r in records(found)]
        assert {r.culprit_rank for r in skipped} == {0, 1}
        last = training_rows(found)[-1]
        assert (last["gradmon/skipped_steps"], last["gradmon/rescaled_steps"]) == (2, 0)
        rows = [row for row in training_rows(found) if "gradmon/grad_norm" not in row]
        assert [row["gradmon/grad_norm_applied"] for row in rows] == [0.0, 0.0]
    assert watched[0]["weights"] == watched[1]["weights"]
    assert watched[0]["moments"] == watched[1]["moments"]


@pytest.mark.parametrize("how", ["resumed", "restored"], ids=["as usual", "restore_callback_states_from_checkpoint"])
def test_a_resumed_run_is_the_uninterrupted_one(ranks: list[dict[str, Found]], how: str) -> None:
    for rank in ranks:
        whole, resumed = rank["watched"], rank[how]
        assert [r.step for r in records(resumed)] == list(range(6, 13)), "of the second part alone"
        assert resumed["weights"] == whole["weights"]
        assert resumed["state"] == whole["state"]
        assert resumed["state"]["step"] == 12
        # The detector needs 8 norms before it has a limit: seven steps alone would have none.
        assert (
            training_rows(resumed)[-1]["gradmon/grad_norm_limit"] == training_rows(whole)[-1]["gradmon/grad_norm_limit"]
        )


def test_a_checkpoint_without_the_callback_can_be_resumed_with_it(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        found = rank["without state"]
        assert found["weights"] == rank["plain"]["weights"]
        assert found["steps"] == 7, "it begins anew"
        assert "gradmon/grad_norm_limit" not in training_rows(found)[-1]
    assert ranks[0]["without state"]["paused to save"] is True, "and saves"


def test_nothing_stays_patched(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        for name in ("watched", "nan watched", "resumed", "restored", "broken", "late", "twice"):
            assert rank[name]["patched"] == [], name


def test_a_training_that_raises_can_be_followed_by_another(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        assert rank["broken"]["error"] == "OSError: the data can't be read"
        assert rank["broken"]["end"] == ["exception", "OSError: the data can't be read"]
        assert rank["broken"]["steps after"] == 12


def test_a_callback_added_later_leaves_too_when_a_step_raises(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        assert rank["late"] == {"error": "MemoryError: as planned", "patched": []}


def test_attached_by_hand_too_is_told(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        assert "GradmonCallback attaches by itself: leave out the call of gradmon.attach()" in rank["twice"]["error"]


def test_without_a_trainer_it_is_told(ranks: list[dict[str, Found]]) -> None:
    assert "called by no transformers.Trainer" in ranks[0]["alone"]["error"]
    assert "gradmon.attach(model, optimizer)" in ranks[0]["alone"]["error"]


def test_trl(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        found = rank["sft"]
        assert found["topology"] == "ddp"
        assert len(found["norms"]) == 4
        assert min(found["norms"]) > 1.5, "the clip at 1.0 bites"
        rows = training_rows(found)
        assert [row["gradmon/grad_norm"] for row in rows] == pytest.approx(found["norms"], rel=1e-5)
        assert [r.grad_norm for r in records(found)] == pytest.approx(found["norms"], rel=1e-5)
        assert all("mean_token_accuracy" in row for row in rows), "TRL's own are there, too"
