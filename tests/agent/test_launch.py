"""Starting an agent from the training process: found, started once, outliving, and costing nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
from fake_journals import ROOT, FakeRank, get, identity, record, until

from gradmon import cli
from gradmon.agent import launch
from gradmon.agent.launch import LOCK_NAME, AgentLock, AgentOptions, agent_address, ensure_agent, wait_for_agent
from gradmon.agent.start import start_agent
from gradmon.config import load
from gradmon.log import Announcer

HERE = Path(__file__).parent
TRAIN = """
import os, sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from fake_journals import FakeRank, identity, record
from gradmon.agent.launch import AgentOptions, ensure_agent
directory = Path({directory!r})
rank = FakeRank(directory, identity()).step(record(1))
ensure_agent(directory, AgentOptions(port=0, linger_seconds={linger}))
{rest}
"""


def train(directory: Path, rest: str = "rank.end()", linger: float = 30) -> list[str]:
    """Command of a script that trains a step and has an agent started."""
    code = TRAIN.format(here=str(HERE), directory=str(directory), rest=rest, linger=linger)
    return [sys.executable, "-W", "error", "-c", code]


def agents(directory: Path) -> list[int]:
    """Process ids of the agents of `directory`."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"gradmon" in words and str(directory).encode() in words:
                found.append(int(process.name))
    return found


class Listener(Announcer):
    """Keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(0)
        self.said = said

    def once(self, message, level=0) -> None:
        self.said.append(message)


@pytest.fixture
def directory(tmp_path):
    """A directory whose agents are ended after the test."""
    yield tmp_path
    for pid in agents(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def address_of(directory: Path) -> str:
    address = wait_for_agent(directory, 30)
    assert address is not None, (directory / "agent.log").read_text()
    return address


def runs(address: str) -> list[dict]:
    return json.loads(get(address + "/api/runs"))["runs"]


def test_it_outlives_the_killing_of_the_whole_process_group(directory):
    command = train(directory, "print('ready', flush=True); time.sleep(600)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            address = address_of(directory)
            until(lambda: runs(address) and runs(address)[0]["state"] == "running")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    until(lambda: runs(address)[0]["state"] == "crashed")


def test_a_pipe_behind_the_training_does_not_wait_for_the_agent(directory):
    training = subprocess.Popen(train(directory, "print('trained'); rank.end()"), stdout=subprocess.PIPE, cwd=ROOT)
    with training, subprocess.Popen(["cat"], stdin=training.stdout, stdout=subprocess.PIPE) as cat:
        training.stdout.close()
        assert cat.communicate(timeout=60)[0] == b"trained\n"
    assert training.returncode == 0
    assert runs(address_of(directory))[0]["state"] == "finished"  # it lingers
    assert len(agents(directory)) == 1


def test_it_leaves_no_child_to_the_training_process(directory):
    rest = (
        "from gradmon.agent.launch import wait_for_agent\nassert wait_for_agent(directory, 30)\nrank.end()\n"
        "try: os.waitpid(-1, os.WNOHANG)\nexcept ChildProcessError: print('no child')"
    )
    done = subprocess.run(train(directory, rest), capture_output=True, text=True, check=False, cwd=ROOT, timeout=100)
    assert (done.stdout, done.stderr, done.returncode) == ("no child\n", "", 0)


def test_of_several_starters_one_agent_remains(directory):
    ensure = (
        "import sys; from pathlib import Path; from gradmon.agent.launch import AgentOptions, ensure_agent; "
        "ensure_agent(Path(sys.argv[1]), AgentOptions(port=0, linger_seconds=30))"
    )
    starters = [subprocess.Popen([sys.executable, "-c", ensure, str(directory)], cwd=ROOT) for _ in range(3)]
    assert [starter.wait(60) for starter in starters] == [0, 0, 0]
    address = address_of(directory)
    until(lambda: len(agents(directory)) == 1)
    assert json.loads(get(address + "/healthz"))["pid"] == agents(directory)[0]
    ensure_agent(directory, AgentOptions(port=0, linger_seconds=30))  # one more, now that it runs
    time.sleep(0.2)
    assert len(agents(directory)) == 1
    assert agent_address(directory) == address


def test_a_spawned_agent_serves_as_the_settings_say(directory, monkeypatch):
    """Its files by whole paths, though they were given from another working directory than its own."""
    monkeypatch.chdir(directory)
    (directory / "token").write_text("secret")
    (directory / "token").chmod(0o600)
    agent = {"port": 0, "linger_seconds": 30, "token_file": "token", "sd_dir": "sd"}
    said = []
    start_agent(directory, load({"agent": agent, "archive": "kept"}, environ={}).config, Listener(said))
    address = address_of(directory)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(address + "/metrics")
    until(lambda: list((directory / "sd").glob("gradmon-*.json")))
    assert (directory / "kept").is_dir()
    until(lambda: said)
    assert address in said[0]


def test_every_option_of_an_agent_is_one_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("gradmon.agent.run_agent", lambda directory, options: seen.append(options) or 0)
    files = {
        name: f"/f/{name}" for name in ("token_file", "basic_auth_file", "tls_cert", "tls_key", "sd_dir", "archive")
    }
    options = AgentOptions(listen="0.0.0.0", port=1234, linger_seconds=2.5, spawned=True, **files)
    assert cli.main(["agent", "--dir", "/tmp", *options.arguments()]) == 0
    assert cli.main(["agent", "--dir", "/tmp", *AgentOptions().arguments()]) == 0
    assert seen == [options, AgentOptions()]


def test_where_the_sites_agent_runs_no_other_is_started(directory, monkeypatch):
    """In our folder of a directory that several users share; it can't delete what is old, so we do."""
    ours = directory / "alice"
    rank = FakeRank(ours, identity(instance="old")).step(record(1))
    rank.end()
    then = time.time() - 8 * 86400
    for file in rank.path.parent.iterdir():
        os.utime(file, (then, then))
    monkeypatch.setattr("gradmon.identity._user_name", lambda: "alice")
    monkeypatch.setattr("os.getuid", lambda: 4711)
    lock = AgentLock(directory)
    assert lock.take()
    lock.write({"url": "http://node:1"})
    said = []
    try:
        start_agent(ours, load(environ={}).config, Listener(said))
        until(lambda: said)
    finally:
        lock.release()
    assert "http://node:1" in said[0]
    assert not (ours / "agent.log").exists()
    assert not rank.path.exists()


def test_it_starts_from_a_package_only_the_working_directory_knows(directory, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.chdir(directory)
    (directory / "here").mkdir()
    environment = launch._environment()
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(directory / "here"), str(ROOT)]


def test_its_environment_is_no_workers(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it in this process once it compiles
    monkeypatch.setenv("HOME", "/home/me")
    environment = launch._environment()
    assert environment["HOME"] == "/home/me"
    assert not [name for name in environment if name.startswith(("RANK", "WORLD", "MASTER", "TORCH", "OMP", "NCCL"))]


def test_the_log_is_bounded(directory):
    log = directory / "agent.log"
    log.write_bytes(b"x" * (launch.LOG_BYTES + 1))
    with launch._open_log(directory) as opened:
        opened.write(b"new\n")
    assert log.read_bytes() == b"new\n"
    with launch._open_log(directory) as opened:
        opened.write(b"more\n")
    assert log.read_bytes() == b"new\nmore\n"


def test_launching_loads_no_server_and_no_torch():
    code = (
        "import sys, gradmon.agent.launch, gradmon.agent; "
        "print(sorted({'torch', 'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


class TestLock:
    def test_it_is_taken_once_and_freed(self, tmp_path):
        first, second = AgentLock(tmp_path), AgentLock(tmp_path)
        assert first.take()
        assert not second.take()
        first.release()
        first.release()
        assert second.take()
        second.release()

    def test_the_address_counts_only_while_it_is_held(self, tmp_path):
        lock = AgentLock(tmp_path)
        assert agent_address(tmp_path) is None
        assert lock.take()
        assert agent_address(tmp_path) is None  # held, and not yet said
        lock.write({"url": "http://127.0.0.1:1"})
        assert agent_address(tmp_path) == "http://127.0.0.1:1"
        lock.release()
        assert agent_address(tmp_path) is None
        (tmp_path / "agent.lock").write_text('{"url": "http://127.0.0.1:1"}')  # what kill -9 leaves
        assert agent_address(tmp_path) is None

    def test_waiting_for_nobody_ends(self, tmp_path):
        assert wait_for_agent(tmp_path, 0.1) is None


def test_a_killed_agents_address_is_not_taken_for_the_next_ones(tmp_path):
    """Between taking the lock and listening the new agent has no address yet."""
    (tmp_path / LOCK_NAME).write_text(json.dumps({"url": "http://127.0.0.1:1"}))
    assert agent_address(tmp_path) is None, "nobody holds the lock"
    lock = AgentLock(tmp_path)
    assert lock.take()
    try:
        assert agent_address(tmp_path) is None
        lock.write({"url": "http://127.0.0.1:2"})
        assert agent_address(tmp_path) == "http://127.0.0.1:2"
    finally:
        lock.release()
