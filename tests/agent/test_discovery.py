"""file_sd: what the agent tells Prometheus of itself, checked with a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from urllib.parse import urlsplit

import certificates
import pytest
from fake_journals import AgentProcess, FakeRank, identity, record, until

from gradmon.agent.discovery import DiscoveryFile
from gradmon.stack.servers import start_prometheus


def told(folder) -> dict[str, list]:
    return {file.name: json.loads(file.read_text()) for file in folder.iterdir()}


def test_the_file(tmp_path):
    folder = tmp_path / "sd" / "new"
    before = os.umask(0o077)
    try:
        file = DiscoveryFile(str(folder), tmp_path / "a")
        file.write("node:1", tls=False)
    finally:
        os.umask(before)
    assert file.path.name.startswith(f"gradmon-{socket.gethostname()}-")
    assert told(folder) == {file.path.name: [{"targets": ["node:1"], "labels": {}}]}
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o644, "Prometheus is another user"
    file.write("node:2", tls=True)
    assert told(folder) == {file.path.name: [{"targets": ["node:2"], "labels": {"__scheme__": "https"}}]}
    other = DiscoveryFile(str(folder), tmp_path / "b")
    other.write("node:3", tls=False)
    assert len(told(folder)) == 2, "two agents of one host"
    file.remove()
    file.remove()
    assert list(told(folder)) == [other.path.name]


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=r"sd_dir .*/sd can't be written by user \d+; make a directory"):
        DiscoveryFile(str(tmp_path / "sd"), tmp_path)


def test_https_is_said(tmp_path):
    both = tmp_path / "both.pem"
    both.write_text(certificates.ONE + certificates.ONE_KEY)
    with AgentProcess(tmp_path, sd_dir=str(tmp_path / "sd"), tls_cert=str(both)) as agent:
        entry = until(lambda: (tmp_path / "sd").exists() and list(told(tmp_path / "sd").values()))[0][0]
        assert entry == {"targets": [urlsplit(agent.address).netloc], "labels": {"__scheme__": "https"}}


def test_a_failing_directory_does_not_keep_the_agent_from_serving(tmp_path):
    prelude = (
        "from gradmon.agent import discovery\n"
        "def failing(*_): raise OSError(28, 'No space left on device')\n"
        "discovery.write_whole = failing\n"
    )
    with AgentProcess(tmp_path, sd_dir=str(tmp_path / "sd"), prelude=prelude) as agent:
        until(lambda: 'gradmon_agent_errors_total{part="sd"} 1.0' in agent.get("/metrics"))
        code, log = agent.end()
    assert code == 0
    assert "No space left on device" in log


@pytest.fixture
def server(prometheus, tmp_path):
    sd = {"files": [f"{tmp_path}/sd/*.json"], "refresh_interval": "1s"}
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "gradmon", "file_sd_configs": [sd]}],
    }
    (tmp_path / "sd").mkdir()
    with start_prometheus(tmp_path, config) as running:
        yield running.wait_ready()


def targets(server) -> dict[str, str]:
    """instance -> up, of what Prometheus scrapes now."""
    active = server.get("/api/v1/targets", state="active")["data"]["activeTargets"]
    return {target["labels"]["instance"]: target["health"] for target in active}


def test_prometheus_finds_the_agent_and_forgets_it_after_a_clean_exit_only(tmp_path, server):
    options = {"sd_dir": str(tmp_path / "sd")}
    rank = FakeRank(tmp_path / "runs", identity()).step(record(1))
    with AgentProcess(tmp_path / "runs", **options) as agent:
        instance = urlsplit(agent.address).netloc
        until(lambda: targets(server) == {instance: "up"}, 30)
        steps = until(lambda: server.query('gradmon_steps_total{job="gradmon"}'), 30)
        assert {steps[0]["metric"]["instance"], steps[0]["value"][1]} == {instance, "1"}
        assert server.query("up")[0]["value"][1] == "1"
        assert agent.end()[0] == 0
    assert told(tmp_path / "sd") == {}
    until(lambda: targets(server) == {}, 30)
    with AgentProcess(tmp_path / "runs", **options) as agent:
        instance = urlsplit(agent.address).netloc
        until(lambda: targets(server) == {instance: "up"}, 30)
        agent.end(signal.SIGKILL)
    until(lambda: targets(server) == {instance: "down"}, 30)
    assert until(lambda: [s for s in server.query("up") if s["value"][1] == "0"])[0]["metric"]["instance"] == instance
    with AgentProcess(tmp_path / "runs", **options) as agent:  # the next one takes its place
        instance = urlsplit(agent.address).netloc
        until(lambda: targets(server) == {instance: "up"}, 30)
    rank.end()
