"""The whole way with real torchrun, real agents and plain HTTP: restarts, kills, two jobs, pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gradmon.agent.launch import agent_address
from gradmon.journal import read_journal

SCRIPT = Path(__file__).parent / "script.py"
Labels = frozenset[tuple[str, str]]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


class Node:
    """One host: a directory, the jobs and the agent in it; everything is ended with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.progress = directory / "progress"
        self.progress.mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_"))},
            "GRADMON_DIR": str(directory / "journals"),
            "GRADMON_AGENT__PORT": "0",
            "GRADMON_AGENT__LINGER_SECONDS": "120",  # in a container the default is 0
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def torchrun(
        self, *options: str, script: tuple[str, ...] = (), ranks: int = 2, **kwargs: Any
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [*options, str(SCRIPT), "--progress", str(self.progress), *script]
        return self.start(command, **kwargs)

    def start(self, command: list[str] | str, **kwargs: Any) -> subprocess.Popen[str]:
        kwargs.setdefault("stdout", subprocess.PIPE)
        kwargs.setdefault("stderr", subprocess.STDOUT)
        process = subprocess.Popen(command, env=self.environment, text=True, start_new_session=True, **kwargs)
        self.processes.append(process)
        return process

    @property
    def journals(self) -> Path:
        return self.directory / "journals"

    def step_of(self, rank: int) -> tuple[int, int]:
        """(last completed step, process id), (0, 0) before the first."""
        path = self.progress / f"rank-{rank}"
        if not path.exists():
            return 0, 0
        step, pid = path.read_text().split()
        return int(step), int(pid)

    def agent_pid(self) -> int:
        return int(json.loads((self.journals / "agent.lock").read_text())["pid"])

    def get(self, path: str) -> str:
        address = until(lambda: agent_address(self.journals))
        with urllib.request.urlopen(address.rstrip("/") + path, timeout=30) as answer:
            return answer.read().decode()

    def samples(self) -> dict[str, dict[Labels, float]]:
        """Name -> labels -> value; fails if a label set comes twice."""
        found: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                series = found.setdefault(sample.name, {})
                labels = frozenset(sample.labels.items())
                assert labels not in series, f"{sample.name}{sample.labels} comes twice"
                series[labels] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get(name, {}).get(frozenset(labels.items()))

    def stop(self) -> None:
        for process in self.processes:
            for child in _family(process.pid):
                child.kill()
            process.communicate()
        if agent_address(self.journals) is not None:
            os.kill(self.agent_pid(), signal.SIGTERM)
            until(lambda: agent_address(self.journals) is None)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.stop()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def test_metrics_while_training(node: Node, promtool: str) -> None:
    """Plain HTTP, prometheus_client's parser, promtool; then every value against what was trained."""
    gate = node.directory / "gate"
    modules = node.directory / "modules"
    options = ("--steps", "60", "--nan-at", "30", "--wait-for", str(gate), "--modules", str(modules))
    job = node.torchrun(script=options)
    until(lambda: node.step_of(0)[0] == node.step_of(1)[0] == 59)
    until(lambda: node.value("gradmon_steps_total", run="script", rank="1") == 59)
    samples = node.samples()
    for rank in ("0", "1"):
        mine = frozenset({("run", "script"), ("rank", rank)})
        for name in (
            "gradmon_local_grad_norm",
            "gradmon_loss",
            "gradmon_step_duration_seconds",
            "gradmon_process_resident_memory_bytes",
        ):
            assert samples[name][mine] > 0, name
        assert samples["gradmon_steps_total"][mine] == 59
        assert samples["gradmon_rank_up"][mine] == 1
        assert 0 <= samples["gradmon_last_step_age_seconds"][mine] < 60
        assert samples["gradmon_local_nonfinite_elements_total"][mine | {("kind", "nan")}] == (
            161 if rank == "1" else 0
        )
    run = frozenset({("run", "script")})
    assert samples["gradmon_grad_norm"][run] > 0
    assert samples["gradmon_nonfinite_elements_total"][run | {("kind", "nan")}] == 161
    assert samples["gradmon_nonfinite_steps_total"][run] == 1
    skips = {("action", "skip"), ("reason", "nonfinite"), ("applied", "yes")}
    assert samples["gradmon_actions_total"][run | skips] == 1
    (incident,) = samples["gradmon_last_incident_info"]
    assert dict(incident)["rank"] == "1"
    infos = [dict(labels) for labels in samples["gradmon_rank_info"]]
    assert sorted((i["rank"], i["local_rank"], i["world_size"]) for i in infos) == [("0", "0", "2"), ("1", "1", "2")]
    assert all(i["host"] for i in infos)
    checked = subprocess.run([promtool, "check", "metrics"], input=node.get("/metrics"), capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")

    gate.touch()
    output = finish(job)
    assert re.search(r"gradmon\[rank 0\] live page and metrics: http://127.0.0.1:\d+", output)
    assert "gradmon[rank 1] step 30: 161 NaN and 0 Inf gradient elements on rank 1" in output
    until(lambda: node.value("gradmon_rank_finished", run="script", rank="1") == 1)
    assert node.value("gradmon_rank_up", run="script", rank="1") == 0
    imported = {name.partition(".")[0] for name in modules.read_text().split()}
    assert "torch" in imported
    assert not imported & {"starlette", "uvicorn", "prometheus_client", "anyio"}, "these belong to the agent"


def test_kill_9_of_a_rank(node: Node) -> None:
    """torchrun then ends the others by killpg: the agent lives, serves all that was written, and marks both silent."""
    job = node.torchrun(script=("--steps", "100000"))
    until(lambda: node.step_of(1)[0] >= 30)
    step, pid = node.step_of(1)
    os.kill(pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0, output
    completed = node.step_of(1)[0]
    assert completed >= step
    until(lambda: node.value("gradmon_rank_up", run="script", rank="1") == 0)
    written = node.value("gradmon_steps_total", run="script", rank="1")
    assert written is not None
    assert written >= completed - 1, "at most the last completed step is lost"
    until(lambda: node.value("gradmon_rank_up", run="script", rank="0") == 0)
    assert node.value("gradmon_rank_finished", run="script", rank="1") == 0
    assert '"crashed"' in node.get("/api/runs/script")


def test_the_agent_may_be_killed(node: Node) -> None:
    job = node.torchrun(script=("--steps", "150"))
    until(lambda: node.step_of(0)[0] >= 5)
    until(lambda: agent_address(node.journals))
    os.kill(node.agent_pid(), signal.SIGKILL)
    until(lambda: agent_address(node.journals) is None)
    at = node.step_of(0)[0]
    assert at < 150, "the kill must come in mid-run"
    finish(job)
    assert node.step_of(0)[0] == 150
    node.start([sys.executable, "-m", "gradmon", "agent", "--port", "0", "--linger", "60"])
    until(lambda: node.value("gradmon_steps_total", run="script", rank="0") == 150)
    assert node.value("gradmon_rank_finished", run="script", rank="0") == 1


def test_a_pipe_ends_with_the_job_while_the_agent_lingers(node: Node) -> None:
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1 {SCRIPT} --steps 20 | cat"
    job = node.start(["/bin/sh", "-c", command])
    output = finish(job)  # communicate() returns only when nobody holds the pipe any more
    assert "guarding run script" in output
    assert agent_address(node.journals) is not None, "the agent must still be there for this to mean anything"
    assert node.value("gradmon_steps_total", run="script", rank="0") == 20


def test_restart_goes_on_as_one_run(node: Node) -> None:
    job = node.torchrun("--max-restarts", "2", script=("--steps", "30", "--crash-at", "21"))
    finish(job)
    paths = sorted(node.journals.glob("script/*/*/rank-00001.db"))
    assert [path.parent.name for path in paths] == ["0", "1"], "two attempts of one instance"
    assert len({path.parent.parent for path in paths}) == 1
    first, second = map(read_journal, paths)
    assert (first.state, second.state) == ("exception", "finished")
    assert first.end_detail == "RuntimeError: as planned"
    done = first.counters["gradmon_steps_total", ()] + second.counters["gradmon_steps_total", ()]
    assert done == 50
    until(lambda: node.value("gradmon_steps_total", run="script", rank="1") == done)
    samples = node.samples()
    assert len(samples["gradmon_steps_total"]) == 2
    assert all(value == 1 for value in samples["gradmon_rank_finished"].values()), "no replaced rank is called silent"
    (info,) = samples["gradmon_run_info"]
    assert dict(info)["attempt"] == "1"


def test_two_jobs_of_one_name(node: Node) -> None:
    gate = node.directory / "gate"
    jobs = [node.torchrun(ranks=1, script=("--steps", "30", "--wait-for", str(gate))) for _ in range(2)]
    until(lambda: len(node.samples().get("gradmon_rank_up", {})) == 2)
    runs = {dict(labels)["run"]: dict(labels)["run_instance"] for labels in node.samples()["gradmon_run_info"]}
    assert set(runs) == {"script", "script~2"}
    assert len(set(runs.values())) == 2
    gate.touch()
    outputs = [finish(job) for job in jobs]
    assert sum("guarding run script~2" in output for output in outputs) == 1
    until(lambda: set(node.samples()["gradmon_rank_finished"].values()) == {1})


def test_a_taken_port_is_no_obstacle(node: Node) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node.environment["GRADMON_AGENT__PORT"] = str(port)
        output = finish(node.torchrun(ranks=1, script=("--steps", "20", "--sleep", "0.1")))
        address = agent_address(node.journals)
        assert address is not None
        assert f":{port}" not in address
        assert f"live page and metrics: {address}" in output


def demo(node: Node, *options: str) -> str:
    command = [sys.executable, "-m", "gradmon", "demo", "--exit", "--steps", "40", "--port", "0", *options]
    return finish(node.start(command))


def test_demo(node: Node) -> None:
    guarded = demo(node)
    assert guarded.index("Live page: http://127.0.0.1:") < guarded.index("guarding run demo")
    lines = guarded[guarded.index("seen") :].splitlines()
    assert any(re.search(r"18-20 \(3x\) +1 .*NaN.*skipped the step", line) for line in guarded.splitlines()), lines
    assert re.search(r"^10 +1 .*gradient norm.*rescaled", guarded, re.MULTILINE), "the corrupted batch"
    assert float(re.search(r"Validation loss: (\S+)", guarded).group(1)) < 4.0
    ruined = demo(node, "--no-guard")
    assert "Validation loss: nan   <- the weights are NaN" in ruined
    assert "The run is ruined" in ruined
    assert "only watched; would have skipped the step" in ruined
    assert len(list((node.journals / "demo").rglob("rank-00001.db"))) == 2, "where GRADMON_DIR says"
    assert agent_address(node.journals / "demo") is None, "the demo's agent ends with it"


def test_clean_demo_is_left_alone(node: Node) -> None:
    clean = demo(node, "--clean")
    assert "Nothing happened: no step was touched." in clean
    assert float(re.search(r"Validation loss: (\S+)", clean).group(1)) < 4.0
