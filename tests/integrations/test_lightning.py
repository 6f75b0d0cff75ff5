"""gradmon's callback in the real Lightning on CPU: two gloo ranks under torchrun, and one process; against the same
training without the callback, and against plain torch."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradmon.journal import read_journal

HERE = Path(__file__).parent
#: What the jobs' clip leaves; manual ones clip two optimizers' gradients, each to 0.05.
CLIPPED, CLIPPED_TWICE = 0.05, 0.05 * math.sqrt(2)


def run(*command: str, directory: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_"))}
    environment.update(GRADMON_AGENT="off", GRADMON_DIR=str(directory), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, *command, str(directory)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """By rank: job -> what it has come to."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*torchrun, str(HERE / "pl_ranks.py"), directory=folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    output = run(str(HERE / "pl_single.py"), directory=folder)
    return {**json.loads((folder / "single.json").read_text()), "output": output}


def assert_untouched(found: dict[str, Any]) -> None:
    plain, watched = found["without"], found["with"]
    assert plain["finite"]
    assert watched["weights"] == plain["weights"]
    assert watched["losses"] == plain["losses"]
    assert len(plain["losses"]) == len(plain["norms"]) * (len(plain["losses"]) // len(plain["norms"])) > 0
    assert len(watched["steps"]) == len(watched["norms"])
    assert watched["losses"][-1] != watched["losses"][0]
    assert watched["errors"] == {}
    assert watched["leftovers"] == []
    assert watched["end"] == "finished"


# --- until something breaks, nothing changes -------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["plain", "accumulated", "bf16", "manual", "fsdp2", "fsdp1"])
def test_weights_and_losses_are_those_without_the_callback(ranks: list[dict[str, Any]], job: str) -> None:
    for rank in ranks:
        assert_untouched(rank[job])


def test_the_same_with_a_scaler_and_fp16(single: dict[str, Any]) -> None:
    assert_untouched(single["scaled"])
    scales = [step["loss_scale"] for step in single["scaled"]["with"]["steps"]]
    reasons = [step["reason"] for step in single["scaled"]["with"]["steps"]]
    assert reasons[0] == "scaler_skip", "its scale is too large at first, or the unscaling is not tested"
    assert reasons[-1] == "healthy"
    assert scales[-1] > 1000


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "clipped"),
    [
        ("plain", None), ("bf16", None), ("accumulated", CLIPPED), ("manual", CLIPPED_TWICE), ("fsdp2", CLIPPED),
        ("scaled", CLIPPED),
    ],
)  # fmt: skip
def test_norms_are_those_before_the_clip(
    ranks: list[dict[str, Any]], single: dict[str, Any], job: str, clipped: float | None
) -> None:
    for found in [single[job]] if job in single else [rank[job] for rank in ranks]:
        pairs = [
            (step, norm)
            for step, norm in zip(found["with"]["steps"], found["with"]["norms"], strict=True)
            if step["reason"] != "scaler_skip"
        ]
        assert len(pairs) >= 5
        for step, norm in pairs:
            assert step["grad_norm"] == pytest.approx(norm, rel=1e-6)
            assert norm > (clipped or 0.0) * 2
            assert step["grad_norm_applied"] == pytest.approx(clipped or norm, rel=1e-4)


@pytest.mark.parametrize(("job", "accumulate"), [("plain", 1), ("manual", 1), ("accumulated", 2), ("scaled", 2)])
def test_the_loss_is_the_one_that_training_step_returned(
    ranks: list[dict[str, Any]], single: dict[str, Any], job: str, accumulate: int
) -> None:
    for found in [single[job]] if job in single else [rank[job] for rank in ranks]:
        losses = found["with"]["losses"]
        means = [sum(losses[i : i + accumulate]) / accumulate for i in range(0, len(losses), accumulate)]
        assert [step["loss"] for step in found["with"]["steps"]] == pytest.approx(means, rel=1e-6)
        assert found["with"]["steps"][0]["loss"] == pytest.approx(math.log(256), rel=0.1), "of 256 equal bytes"


# --- what is done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("job", "topology"), [("nan", "ddp"), ("manual_nan", "ddp"), ("fsdp2_nan", "fsdp2")])
def test_a_nan_on_one_rank_is_skipped_on_both(ranks: list[dict[str, Any]], job: str, topology: str) -> None:
    for rank in ranks:
        assert not rank[job]["without"]["finite"], "without gradmon it dies"
        found = rank[job]["with"]
        assert found["topology"] == topology
        assert found["finite"]
        acted = [
            (s["step"], s["action"], s["applied"], s["culprit_rank"]) for s in found["steps"] if s["action"] != "none"
        ]
        assert acted == [(9, "skip", True, 1)]
        assert len(found["steps"]) == 12
        assert found["errors"] == {}
    assert ranks[0][job]["with"]["weights"] == ranks[1][job]["with"]["weights"]


def test_fsdp1_is_only_watched_and_says_why(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["fsdp1"]["with"]
        assert found["topology"].startswith("unrecognised: FSDP1")
        assert not any(step["applied"] for step in found["steps"])
    assert any("only watching, not acting: FSDP1" in line for line in ranks[0]["fsdp1"]["with"]["said"])


def test_a_stop_ends_the_fit_and_the_journal_says_why(single: dict[str, Any]) -> None:
    found = single["stopped"]
    assert found["raised"].startswith("TrainingStopped: gradmon stopped training at step 11")
    assert found["end"] == "exception"
    assert "10 steps in a row" in found["end_detail"]
    assert found["leftovers"] == []


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["resumed", "fsdp2_resumed"])
def test_a_resumed_run_knows_what_an_uninterrupted_one_knows(ranks: list[dict[str, Any]], job: str) -> None:
    for rank in ranks:
        whole, first, second = (rank[job][name] for name in ("whole", "first", "second"))
        assert second["weights"] == whole["weights"] != first["weights"]
        assert first["state"]["step"] == 12
        assert whole["state"]["step"] == 24
        assert second["state"] == whole["state"]
        assert [step["step"] for step in second["steps"]] == list(range(13, 25))
        assert [step["step"] for step in first["steps"] if step["action"] == "skip"] == [3]
    assert ranks[0][job]["second"]["state"] == ranks[1][job]["second"]["state"]


def test_a_second_fit_goes_on_and_another_trainer_begins_anew(single: dict[str, Any]) -> None:
    first, second, other = single["again"]
    assert (first["state"]["step"], second["state"]["step"], other["state"]["step"]) == (12, 24, 12)
    assert (second["steps"][0]["step"], other["steps"][0]["step"]) == (13, 1)


def test_a_state_that_is_none_is_no_reason_not_to_train(single: dict[str, Any]) -> None:
    assert single["damaged"]["saved"]["step"] == 12, "of a checkpoint saved after the fit"
    resumed = single["damaged"]["resumed"]
    assert [step["step"] for step in resumed["steps"]] == list(range(1, 13))
    assert "gradmon begins anew" in single["output"]


# --- validation and logs ---------------------------------------------------------------------------------------------


def test_validation_is_a_pause_and_its_loss_is_observed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["logged"]
        # Twice two batches: those of the check before training are not among them.
        assert found["paused"]["validation_step"] == [True] * 4
        assert found["validation_loss"] == pytest.approx(found["callback_metrics"]["val_loss"], rel=1e-6)
        assert rank["resumed"]["first"]["paused"]["on_save_checkpoint"] == [True]
        assert rank["resumed"]["first"]["validation_loss"] is None


def test_values_are_in_the_trainers_log(ranks: list[dict[str, Any]], folder: Path) -> None:
    with (folder / "logged" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["gradmon/grad_norm"]]
    found = ranks[0]["logged"]
    steps = {step["step"]: step for step in found["steps"]}
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11]
    for row in rows:
        step = steps[int(row["step"])]  # Lightning counts from 0, and the newest known is the one before
        for name in ("grad_norm", "grad_norm_applied", "learning_rate"):
            assert float(row[f"gradmon/{name}"]) == pytest.approx(step[name], rel=1e-9, nan_ok=True)
        assert float(row["gradmon/learning_rate_scale"]) == 1.0
    assert [float(row["gradmon/skipped_steps"]) for row in rows] == [0, 1, 1, 1]
    assert [math.isfinite(float(row["gradmon/grad_norm"])) for row in rows] == [True, False, True, True]
    assert found["callback_metrics"]["gradmon/grad_norm"] == pytest.approx(steps[11]["grad_norm"], rel=1e-6)


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "raised", "detail"),
    [
        ("failed", "PlannedError: as planned", "PlannedError: as planned"),
        ("interrupted", "SystemExit: 1", "KeyboardInterrupt: as planned"),
    ],
)
def test_an_exception_leaves_nothing_behind(single: dict[str, Any], job: str, raised: str, detail: str) -> None:
    found = single[job]
    assert found["raised"] == raised, "the trainer's own way"
    assert (found["end"], found["end_detail"]) == ("exception", detail)
    assert len(found["steps"]) == 4
    assert found["attached"] == ["optimizer", "module", "trainer", "clip", "scaler", "loader", "exit"]
    assert found["leftovers"] == []


def test_a_module_without_optimizer_trains_as_before(single: dict[str, Any]) -> None:
    assert single["untrained"] == {"attached": False, "batches": 12, "state": {}}


def test_under_the_librarys_older_name(tmp_path: Path) -> None:
    journal = run(str(HERE / "pl_older_name.py"), directory=tmp_path).strip().splitlines()[-1]
    view = read_journal(Path(journal))
    assert [step.step for _, step in view.steps] == [1, 2, 3, 4, 5]
    assert all(step.applied for _, step in view.steps)
    assert view.state == "finished"
