"""The agent as a process: its socket, its lock, its end, and what it answers."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from fake_journals import AgentProcess, FakeRank, get, identity, killed_rank, nonfinite, record, until
from prometheus_client.parser import text_string_to_metric_families

from gradmon import __version__
from gradmon.agent.launch import agent_address
from gradmon.agent.server import CONTENT_POLICY, bind


def steps(text: str, rank: int = 0, run: str = "demo") -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "gradmon_steps_total" and sample.labels == {"run": run, "rank": str(rank)}:
                return sample.value
    return -1


def ask(url: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def test_metrics_while_a_rank_writes(tmp_path):
    rank = FakeRank(tmp_path, identity())
    stop = threading.Event()

    def train():
        step = 0
        while not stop.is_set():
            step += 1
            rank.step(record(step) if step % 50 else nonfinite(step))

    trainer = threading.Thread(target=train)
    with AgentProcess(tmp_path) as agent:
        trainer.start()
        try:
            seen = [until(lambda: (n := steps(agent.get("/metrics"))) > 0 and n)]
            until(lambda: seen.append(steps(agent.get("/metrics"))) or seen[-1] > seen[0] + 50)
        finally:
            stop.set()
            trainer.join()
            rank.end()
        assert seen == sorted(seen)
        written = rank.writer._counters["gradmon_steps_total", ()]
        assert until(lambda: steps(agent.get("/metrics")) == written)
        assert 'gradmon_agent_errors_total{part="journal"} 0.0' in agent.get("/metrics")
        assert agent.end()[0] == 0


def test_what_it_answers(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(record(1))
    with AgentProcess(tmp_path) as agent:
        until(lambda: agent.json("/api/runs")["runs"])
        health = agent.json("/healthz")
        assert health == {"status": "ok", "version": __version__, "journals": 1, "pid": agent.process.pid}
        assert agent.json("/api/runs/demo")["global"]["step"] == [1]
        cases = {
            "/": "text/html; charset=utf-8",
            "/metrics": "text/plain; version=0.0.4; charset=utf-8",
            "/api/runs": "application/json",
            "/static/page.css": "text/css; charset=utf-8",
            "/static/favicon.svg": "image/svg+xml",
        }
        for path, content_type in cases.items():
            status, headers, body = ask(agent.address + path)
            assert (path, status, headers["content-type"]) == (path, 200, content_type)
            assert body
            assert headers["content-security-policy"] == CONTENT_POLICY
            assert headers["x-content-type-options"] == "nosniff"
            assert ask(agent.address + path, "HEAD")[::2] == (200, b"")
        for path in ("/nothing", "/api/runs/nobody", "/static/nothing.js", "/static/../server.py"):
            assert ask(agent.address + path)[0] == 404
        for path in cases:
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
                assert ask(agent.address + path, method)[0] == 405
    rank.end()


def test_it_is_bound_to_the_address_asked_for_only(tmp_path):
    with AgentProcess(tmp_path) as agent:
        port = urlsplit(agent.address).port
        with socket.socket() as other:
            other.bind(("127.0.0.2", port))  # fails if it listens on every address
            assert other.getsockname() == ("127.0.0.2", port)


def test_a_taken_port_means_the_next(tmp_path):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with AgentProcess(tmp_path, port=port) as agent:
            assert port < urlsplit(agent.address).port <= port + 100
            assert agent.json("/healthz")["pid"] == agent.process.pid


def test_an_address_that_is_not_ours_is_a_clear_error(tmp_path):
    with AgentProcess(tmp_path, listen="203.0.113.7", port=10999) as agent:
        code, log = agent.wait()
    assert code == 1
    assert "can't listen on 203.0.113.7:10999" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_also_with_clients_that_stay(tmp_path, number):
    with AgentProcess(tmp_path) as agent:
        client = http.client.HTTPConnection(urlsplit(agent.address).netloc, timeout=20)
        client.request("GET", "/healthz")
        client.getresponse().read()
        idle = socket.create_connection((urlsplit(agent.address).hostname, urlsplit(agent.address).port))
        idle.sendall(b"GET /metrics HT")  # a request that never comes to its end
        code, log = agent.end(number)
        client.close()
        idle.close()
    assert code == 0
    assert "Traceback" not in log
    assert agent_address(tmp_path) is None


def test_it_lingers_after_the_last_rank_and_ends(tmp_path):
    rank = FakeRank(tmp_path, identity())
    with AgentProcess(tmp_path, linger=0.3) as agent:
        assert agent.address
        with pytest.raises(AssertionError, match="still"):
            until(lambda: agent.process.poll() is not None, timeout=1.5)  # a rank lives
        rank.end()
        code, log = agent.wait()
    assert code == 0
    assert "no rank has lived for 0.3 s" in log


def test_one_started_by_hand_waits_for_the_first_rank(tmp_path):
    """A sidecar is there long before its trainer; one that ended would be started again and again."""
    with AgentProcess(tmp_path, linger=0.2) as agent:
        assert agent.address
        with pytest.raises(AssertionError, match="still"):
            until(lambda: agent.process.poll() is not None, timeout=1.5)
        FakeRank(tmp_path, identity()).step(record(1)).end()  # too short for anybody to see it alive, perhaps
        rank = FakeRank(tmp_path, identity(run="second"))
        until(lambda: len(agent.json("/api/runs")["runs"]) == 2)
        rank.end()
        assert agent.wait()[0] == 0


def test_a_sidecar_told_to_end_serves_on_for_its_linger_time(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(record(1))
    with AgentProcess(tmp_path, linger=5, archive=str(tmp_path / "kept")) as agent:
        until(lambda: steps(agent.get("/metrics")) == 1)
        rank.step(record(2))
        agent.process.send_signal(signal.SIGTERM)
        rank.end()
        began = time.monotonic()
        until(lambda: steps(agent.get("/metrics")) == 2, timeout=4)  # the last values are scraped
        until(lambda: 'gradmon_rank_finished{rank="0",run="demo"} 1.0' in agent.get("/metrics"), timeout=4)
        until((tmp_path / "kept" / "demo" / "i1" / "0" / "rank-00000.db").exists, timeout=4)
        code, log = agent.wait()
    assert code == 0
    assert 1.5 < time.monotonic() - began < 10
    assert "told to end: serving on for 5 s; a second signal ends it now" in log


def test_a_second_signal_and_ctrl_c_end_it_at_once(tmp_path):
    with AgentProcess(tmp_path, linger=600) as agent:
        assert agent.address
        agent.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert agent.end(signal.SIGTERM)[0] == 0
    with AgentProcess(tmp_path, linger=600) as agent:
        assert agent.address
        assert agent.end(signal.SIGINT)[0] == 0


def test_a_first_signal_before_it_serves_is_a_sidecars_too(tmp_path):
    early = (
        "import os, signal\nfrom gradmon.agent import server\n"
        "server._Agent._announce = lambda self: os.kill(os.getpid(), signal.SIGTERM)"
    )
    with AgentProcess(tmp_path, linger=600, prelude=early) as agent:
        assert agent.address
        with pytest.raises(subprocess.TimeoutExpired):
            agent.wait(3)
        assert agent.get("/metrics")
        assert agent.end(signal.SIGTERM)[0] == 0


def test_a_spawned_one_ends_at_once_when_told(tmp_path):
    with AgentProcess(tmp_path, linger=600, spawned=True) as agent:
        assert agent.address
        assert agent.end(signal.SIGTERM)[0] == 0


def test_killed_and_day_old_runs_are_not_exported(tmp_path):
    """Also by an agent that is started long after; the page still shows them."""
    killed_rank(tmp_path, run="killed")
    old = FakeRank(tmp_path, identity(run="old")).step(record(1))
    old.end()
    for run, age in (("killed", 3500), ("old", 90000)):
        database = sqlite3.connect(tmp_path / run / "i1" / "0" / "rank-00000.db")
        database.execute("UPDATE state SET value = value - ? WHERE key = 'beat_seconds'", (age,))
        database.execute("UPDATE steps SET wall_seconds = wall_seconds - ?", (age,))
        database.commit()
        database.close()
    with AgentProcess(tmp_path) as agent:
        until(lambda: len(agent.json("/api/runs")["runs"]) == 2)
        text = until(lambda: (t := agent.get("/metrics")) and 'run="killed"' in t and t)
        assert 'gradmon_rank_up{rank="0",run="killed"} 0.0' in text, "for an hour it is said that it is gone"
        assert 'run="old"' not in text


def test_a_spawned_one_ends_if_no_rank_ever_comes(tmp_path):
    with AgentProcess(tmp_path, linger=0.2, spawned=True) as agent:
        assert agent.wait()[0] == 0


def test_a_second_agent_for_the_directory(tmp_path):
    with AgentProcess(tmp_path) as first:
        address = first.address
        with AgentProcess(tmp_path) as by_hand, AgentProcess(tmp_path, spawned=True) as spawned:
            code, log = by_hand.wait()
            assert code == 1
            assert f"another agent serves {tmp_path} already, at {address}" in log
            assert spawned.wait()[0] == 0
        assert first.json("/healthz")["pid"] == first.process.pid
        assert agent_address(tmp_path) == address


def test_after_kill_9_the_next_agent_finds_everything(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(*[record(i) for i in range(1, 40)], nonfinite(40))
    with AgentProcess(tmp_path) as first:
        until(lambda: steps(first.get("/metrics")) == 40)
        first.process.kill()
        first.wait()
    assert agent_address(tmp_path) is None
    rank.step(record(41))
    with AgentProcess(tmp_path) as second:
        until(lambda: steps(second.get("/metrics")) == 41)
        answer = second.json("/api/runs/demo")
        assert answer["global"]["step"] == list(range(1, 42))
        assert [e["step"] for e in answer["events"]] == [40]
    rank.end()


def test_a_killed_rank_is_told_without_being_asked(tmp_path):
    killed_rank(tmp_path, steps=3)
    with AgentProcess(tmp_path) as agent:
        run = until(lambda: agent.json("/api/runs")["runs"])[0]
        assert run["state"] == "crashed"
        assert "silent since" in run["headline"]


def test_without_torch(tmp_path):
    prelude = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('torch is blocked in this test')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    rank = FakeRank(tmp_path, identity()).step(record(1))
    with AgentProcess(tmp_path, prelude=prelude) as agent:
        until(lambda: steps(agent.get("/metrics")) == 1)
        assert agent.json("/api/runs/demo")["run"]["state"] == "running"
        assert get(agent.address + "/").startswith("<!doctype html>")
    rank.end()


def test_bind_gives_up_when_all_ports_are_taken(monkeypatch):
    monkeypatch.setattr("gradmon.agent.server.PORTS", 0)
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"ports {port} to {port} on 127.0.0.1 are all taken"):
            bind("127.0.0.1", port)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with AgentProcess(tmp_path / "file" / "below") as agent:
        code, log = agent.wait()
    assert code == 1
    assert "can't start" in log
    assert os.fspath(tmp_path) in log


def test_a_foreign_host_name_is_refused_on_loopback(tmp_path):
    """DNS rebinding: another site's name that points at 127.0.0.1."""
    with AgentProcess(tmp_path) as agent:
        port = urlsplit(agent.address).port
        for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("evil.example", 400)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/api/runs", headers={"Host": host})
            assert connection.getresponse().status == status, host
            connection.close()
