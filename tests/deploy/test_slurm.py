"""The batch script, run for real: one node, two gloo ranks, a real Prometheus. Only Slurm's programs are stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from manifests import DEPLOY

from gradmon.stack.servers import Server, free_port

SCRIPT = DEPLOY / "slurm/train-with-gradmon.sbatch"

# srun's options, up to the command, which then runs on the one node there is.
SRUN = """\
    #!/usr/bin/env bash
    while [[ $1 == --* ]]; do shift; done
    SLURMD_NODENAME=127.0.0.1 exec "$@"
"""
TRAINING = """\
    import sys, time
    import torch, torch.distributed as dist
    import gradmon

    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = gradmon.attach(model, optimizer)
    for step in range(int(sys.argv[1])):
        loss = model(torch.randn(4, 8)).square().mean()
        if step == 20 and dist.get_rank() == 1:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.observe(loss=loss)
        time.sleep(0.1)
    monitor.detach()
    dist.destroy_process_group()
"""


@pytest.fixture
def job(tmp_path: Path, prometheus: str) -> Iterator[dict[str, str]]:
    """The environment of a job on one node, with programs that play Slurm's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (programs / name).write_text(textwrap.dedent(text))
        (programs / name).chmod(0o755)
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAINING))
    local = tmp_path / "local-disk"
    local.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRADMON_", "SLURM_"))}
    yield {
        **environment,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000),
        "SLURM_JOB_NAME": "llama-7b",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_TMPDIR": str(local),
        "SLURM_CLUSTER_NAME": "alps",
        "WATCH_KEEP": str(tmp_path / "kept"),
        "WATCH_RANKS_PER_NODE": "2",
        "WATCH_SCRAPE": "1s",
        "WATCH_SETTLE": "2",
        "WATCH_RULES": str(DEPLOY / "prometheus"),
        "WATCH_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    assert list(local.glob("gradmon-prometheus-*")) == []


@contextmanager
def submitted(job: dict[str, str], folder: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    """The batch script, running; nothing of it outlives the test."""
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "train.py", str(steps)],
        cwd=folder,
        env=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def view(kept: Path, command: str) -> Server:
    """Prometheus as the job's last lines say, on a free port."""
    port = free_port()
    words = [*command.split(), f"--web.listen-address=127.0.0.1:{port}"]
    return Server("later", words, kept, port=port, ready="/-/ready").wait_ready()


def test_a_job_watches_itself_and_keeps_what_it_saw(job: dict[str, str], tmp_path: Path) -> None:
    with submitted(job, tmp_path, 60) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    kept = tmp_path / "kept"
    said = " ".join(output.split())
    assert "agents scraped {} => 1" in said
    assert '{run="llama-7b"} => 60' in said
    assert 'action="skip", applied="yes", reason="nonfinite"' in said
    assert re.search(r'kind="nonfinite", parameter="\w+", rank="1"', said)
    # The journals outlive the node, the token does not outlive the job, and no dead target is left behind.
    assert len(list((kept / "archive").rglob("rank-*.db"))) == 2
    assert not (kept / "token").exists()
    assert list((kept / "targets").iterdir()) == []
    # What the last lines say opens the data: they hold for good, in this job's cluster.
    (command,) = [line.strip() for line in output.splitlines() if line.startswith("  prometheus ")]
    with view(kept, command) as later:
        query = 'max_over_time(gradmon_steps_total{job="gradmon", cluster="alps"}[1h])'
        assert {s["metric"]["rank"]: s["value"][1] for s in later.query(query)} == {"0": "60", "1": "60"}
        assert later.query('count({__name__=~"run:gradmon_.+"})') != []


def test_a_job_that_is_ended_still_sums_up(job: dict[str, str], tmp_path: Path) -> None:
    targets = tmp_path / "kept/targets"
    with submitted(job, tmp_path, 100_000) as process:
        deadline = time.monotonic() + 30
        while not list(targets.glob("*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)  # as Slurm does before the time limit: to the batch shell alone
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "gradmon: what happened in job" in output
    assert (tmp_path / "kept/prometheus/wal").is_dir()


def test_without_prometheus_it_trains_all_the_same(job: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "env", "mkdir", "head", "base64", "tr", "rm", "cp", "hostname", "sleep", "sed", "cat"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "bin/torchrun").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "bin/gradmon").write_text("#!/bin/sh\n")
    for name in ("torchrun", "gradmon"):
        (tmp_path / "bin" / name).chmod(0o755)
    job["PATH"] = f"{tmp_path / 'bin'}:{tools}"
    with submitted(job, tmp_path, 1) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 3  # the training's own
    assert "no prometheus or promtool in PATH" in output
