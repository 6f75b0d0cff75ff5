"""Programs are started, waited for and ended; what goes wrong is said with its cure."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path

import httpx
import pytest

from gradmon.stack import servers
from gradmon.stack.console import AlertConsole, describe_alert
from gradmon.stack.grafana import dashboards_directory, start_grafana
from gradmon.stack.servers import Server, ServerError, free_port, start_alertmanager, start_prometheus

#: Grafana can't be had here: this stands for it, and writes down how it was started.
FAKE_GRAFANA = f"""#!{sys.executable}
import http.server, json, os, sys
with open(os.environ["GF_PATHS_DATA"] + ".json", "w") as told:
    json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}, told)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(address, Handler).serve_forever()
"""


def test_prometheus_and_alertmanager_serve_and_end(tmp_path: Path, prometheus: str, alertmanager: str) -> None:
    with start_prometheus(tmp_path, {"global": {"scrape_interval": "1s"}}) as server:
        assert server.wait_ready().query("vector(3) * 2")[0]["value"][1] == "6"
        with pytest.raises(ServerError, match="parse error"):
            server.query("sum by (")
        process = server.process
    assert process.poll() is not None
    config = {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}
    with start_alertmanager(tmp_path, config) as server:
        assert server.wait_ready().get("/api/v2/status")["config"]["original"].count("receiver: nobody") == 1


def test_a_server_that_ends_says_where_its_log_is(tmp_path: Path, prometheus: str) -> None:
    with pytest.raises(ServerError, match=r"prometheus ended with code 2; its log is .*prometheus\.log"):
        start_prometheus(tmp_path, {"no_such_setting": 1}).wait_ready()
    assert "no_such_setting" in (tmp_path / "prometheus.log").read_text()


def test_a_server_that_never_serves_is_ended(tmp_path: Path) -> None:
    sleeping = Server("sleeper", ["sleep", "60"], tmp_path, port=free_port(), ready="/")
    with pytest.raises(ServerError, match=r"does not serve after 0\.2 s"):
        sleeping.wait_ready(0.2)
    assert sleeping.process.poll() is not None


@pytest.mark.parametrize(
    ("start", "package"), [(start_prometheus, "prometheus"), (start_alertmanager, "prometheus-al")]
)
def test_a_missing_program_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start, package: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=f"is not installed; cure: sudo apt install {package}"):
        start(tmp_path, {})


def test_a_taken_port_is_replaced() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_grafana_is_provisioned_with_source_and_dashboards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "grafana-server"
    program.parent.mkdir()
    program.write_text(FAKE_GRAFANA)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    directory = tmp_path / "stack"
    directory.mkdir()
    grafana = start_grafana(directory, "http://127.0.0.1:9090")
    assert grafana is not None
    with grafana:
        grafana.wait_ready()
        started = json.loads((directory / "grafana" / "data.json").read_text())
    assert started["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert started["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    provisioning = Path(started["environment"]["GF_PATHS_PROVISIONING"])
    source = servers.yaml.safe_load((provisioning / "datasources" / "gradmon.yaml").read_text())["datasources"][0]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://127.0.0.1:9090", True)
    provider = servers.yaml.safe_load((provisioning / "dashboards" / "gradmon.yaml").read_text())["providers"][0]
    shown = {path.name for path in Path(provider["options"]["path"]).glob("*.json")}
    assert shown == {"fleet.json", "run.json", "ranks.json", "layers.json", "gpu.json"}
    assert dashboards_directory() == Path(provider["options"]["path"])


def test_without_grafana_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start_grafana(tmp_path, "http://127.0.0.1:9090") is None


ALERT = {
    "status": "firing",
    "labels": {"alertname": "GradmonX", "severity": "page", "run": "gpt", "rank": "3", "instance": "a:1"},
    "annotations": {"summary": "What happened."},
}


def test_an_alert_is_a_line_and_its_summary() -> None:
    line, summary = describe_alert(ALERT).splitlines()
    assert line[9:] == "FIRING   page   GradmonX (run gpt, rank 3)"
    assert summary.strip() == "What happened."
    assert describe_alert({**ALERT, "status": "resolved"})[9:] == "RESOLVED page   GradmonX (run gpt, rank 3)"


def test_the_console_prints_what_it_is_sent_and_survives_nonsense() -> None:
    stream = io.StringIO()
    with AlertConsole(stream) as console:
        firing, resolved = ({"alerts": [{**ALERT, "status": status}]} for status in ("firing", "resolved"))
        bodies = [(json.dumps(message), 200) for message in (firing, firing, resolved, firing)]
        for body, status in [*bodies, ("no JSON", 400), ("[1]", 400)]:
            assert httpx.post(console.url, content=body).status_code == status
    words = [line.split()[1] for line in stream.getvalue().splitlines() if "GradmonX" in line]
    assert words == ["FIRING", "RESOLVED", "FIRING"], "a repetition says nothing new"
