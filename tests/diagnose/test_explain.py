"""From the alarm to the cause, as a user goes: a real run on two ranks breaks, and the commands say why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import one_bad_sample
import pytest

from gradmon.diagnose.bundle import load_bundle
from gradmon.journal import read_journal

SCRIPT = Path(one_bad_sample.__file__)
WHERE = next(
    f"{SCRIPT.name}:{n}" for n, line in enumerate(SCRIPT.read_text().splitlines(), 1) if "inputs / length" in line
)


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explain")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADMON_")}
    environment |= {"GRADMON_DIR": str(directory), "GRADMON_RUN": "empty", "GRADMON_AGENT": "off"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved what broke; run it again: gradmon replay" in done.stderr
    return directory


def gradmon(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradmon", *arguments]
    return subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=120, check=False)


def incidents(journals: Path) -> dict[int, tuple[int, str | None]]:
    """Rank -> step and parameter of the one step that its own gradients broke."""
    found = {}
    for path in journals.rglob("rank-*.db"):
        view = read_journal(path)
        broken = [r for _, r in view.steps if r.broken and r.culprit_rank == view.identity.rank]
        if broken:
            found[view.identity.rank] = (broken[0].step, broken[0].parameter)
    return found


def test_only_the_rank_that_broke_saves_its_batch(journals: Path) -> None:
    broken = incidents(journals)
    assert broken, "the empty sample never came"
    there = {path.name for path in journals.rglob("*.bundle")}
    assert there == {f"rank-{rank:05d}-step-{step:07d}.bundle" for rank, (step, _) in broken.items()}
    for path in journals.rglob("*.bundle"):
        assert path.stat().st_mode & 0o777 == 0o600
        forward = load_bundle(path).forwards[0]
        assert one_bad_sample.EMPTY in forward.indices
        row = forward.indices.index(one_bad_sample.EMPTY)
        assert not forward.args[0][row].any(), "the batch is that of the step"
        assert forward.kwargs["labels"].shape == (8,)


def test_replay_names_line_operation_and_sample(journals: Path) -> None:
    for bundle in journals.rglob("*.bundle"):
        done = gradmon("replay", str(bundle), "--model", "one_bad_sample:make_model")
        assert done.returncode == 0, done.stderr
        assert "reproduced: the replay is not finite" in done.stdout
        assert "first: div gave NaN out of finite inputs" in done.stdout
        assert f"(index {one_bad_sample.EMPTY} of the dataset)" in done.stdout
        assert f"{WHERE}: unit = inputs / length" in done.stdout


def test_report_names_rank_and_parameter(journals: Path, tmp_path: Path) -> None:
    done = gradmon("report", str(journals), "--out", str(tmp_path / "report.html"))
    assert done.returncode == 0, done.stderr
    rank, (step, parameter) = min(incidents(journals).items(), key=lambda item: item[1])
    assert f"first at step {step} on rank {rank}, {parameter}" in " ".join(done.stdout.split())
    assert "gradmon replay" in done.stdout
    assert parameter is not None
    assert parameter in (tmp_path / "report.html").read_text()


def test_the_watches_tell_of_it_in_events(journals: Path) -> None:
    events = [e for path in journals.rglob("rank-00000.db") for _, e in read_journal(path).events]
    lost = [e for e in events if e.kind == "loss_nonfinite"]
    first = min(step for step, _ in incidents(journals).values())
    assert lost[0].step == first
    assert all("rank" in e.message for e in lost)


def test_all_ranks_know_of_a_validation_that_one_of_them_saw(journals: Path) -> None:
    for path in journals.rglob("rank-*.db"):
        assert read_journal(path).samples["early_stop"] == 0
