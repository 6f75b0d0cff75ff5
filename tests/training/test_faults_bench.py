"""The subset of tests/bench/faults.py that every build must pass, and that it can fail."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import faults
from fault_report import Results, judge, vacuous
from fault_runs import Job, run
from mitigations import ADAMW, SkipStepAdamW

#: Three minutes on two busy cores, and room for a machine that is busier still.
SECONDS = 900


@pytest.fixture(scope="module")
def subset() -> Results:
    return faults.run_subset()


@pytest.mark.timeout(SECONDS)
def test_gradmon_saves_runs_and_leaves_healthy_ones_alone(subset: Results) -> None:
    verdicts = judge(subset, faults.SUBSET_GATES)
    assert len(verdicts) == len(faults.SUBSET_GATES)
    assert [str(verdict) for verdict in verdicts if not verdict.met] == []


@pytest.mark.timeout(SECONDS)
def test_without_anything_every_fault_misses_its_gate(subset: Results) -> None:
    limited = {gate.injection for gate in faults.SUBSET_GATES if gate.limit is not None}
    assert limited <= {job.injection for job in subset if job.mitigation == "none"}
    assert [str(gate) for gate in vacuous(subset, faults.SUBSET_GATES)] == []


def test_a_run_that_raises_is_a_failed_run_and_no_gate_is_met(tmp_path: Path) -> None:
    blocked = tmp_path / "no directory"
    blocked.write_text("")
    job = Job("clean", "gradmon", 0, steps=2)
    results = {job: run(job, str(blocked)), job.baseline: run(job.baseline, str(tmp_path))}
    assert "DirectoryError" in results[job].failed
    verdicts = judge(results)
    assert verdicts and not any(verdict.met for verdict in verdicts)


def test_skip_step_adamw_is_adamw_until_it_skips_and_a_skip_writes_nan() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    skipping = SkipStepAdamW(ours.parameters(), **ADAMW)
    plain = torch.optim.AdamW(theirs.parameters(), **ADAMW)
    for step in range(20):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        skipping.factor = 0.0 if step == 10 else 1.0  # of finite gradients: an exact skip
        skipping.step()
        if step != 10:
            plain.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
    ours.weight.grad[0, 0] = math.nan
    skipping.factor = 0.0
    skipping.step()
    assert ours.weight.isnan().sum() == 1
