"""Routes, silenced consequences and secrets, as Alertmanager itself reads them."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradmon.rules import alertmanager_config
from gradmon.rules.alertmanager import CHANNELS, CONSEQUENCES
from gradmon.stack.servers import Server, start_alertmanager


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "config",
    [
        alertmanager_config(),
        alertmanager_config(webhook_url="http://127.0.0.1:9/hook"),
        alertmanager_config({severity: tuple(CHANNELS) for severity in ("page", "ticket", "info")}),
    ],
    ids=["shipped", "stack", "all channels"],
)
def test_amtool_accepts_it(config: dict[str, Any], amtool: str, tmp_path: Path) -> None:
    path = written(tmp_path / "alertmanager.yml", config)
    result = subprocess.run([amtool, "check-config", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(CONSEQUENCES)} inhibit rules" in result.stdout


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ({"alertname": "GradmonTrainingStopped", "severity": "page", "run": "a"}, "page"),
        ({"alertname": "GradmonStraggler", "severity": "ticket", "run": "a"}, "ticket"),
        ({"alertname": "GradmonHostMemoryNearlyFull", "severity": "ticket", "host": "h"}, "ticket"),
        ({"alertname": "GradmonSpike", "severity": "info", "run": "a"}, "info"),
        ({"alertname": "GradmonWatchdog", "severity": "none"}, "watchdog"),
        ({"alertname": "SomebodyElses"}, "ticket"),
    ],
)
def test_who_is_told(labels: dict[str, str], receiver: str, amtool: str, tmp_path: Path) -> None:
    path = written(tmp_path / "alertmanager.yml", alertmanager_config())
    command = [amtool, "config", "routes", "test", f"--config.file={path}", f"--verify.receivers={receiver}"]
    result = subprocess.run([*command, *(f"{k}={v}" for k, v in labels.items())], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_secrets_come_from_files() -> None:
    """The one exception is said in the file itself."""
    inline = {"api_url", "auth_password", "routing_key", "service_key", "credentials", "password", "api_secret"}
    found = []

    def look(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(key for key in node if key in inline)
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(alertmanager_config())
    assert found == ["api_secret"]
    files = str(alertmanager_config())
    for key in ("credentials_file", "api_url_file", "auth_password_file", "routing_key_file"):
        assert key in files


def test_all_five_channels_are_there_once_and_without_anchors() -> None:
    config = alertmanager_config()
    text = yaml.safe_dump(config)
    for key in ("webhook_configs", "slack_configs", "email_configs", "pagerduty_configs", "wechat_configs"):
        assert key in text
    assert "&id" not in text


@pytest.fixture
def running(alertmanager: str, tmp_path: Path) -> Iterator[Server]:
    with start_alertmanager(tmp_path, alertmanager_config()) as server:
        yield server.wait_ready()


def alert(name: str, severity: str, **labels: str) -> dict[str, Any]:
    return {"labels": {"alertname": name, "severity": severity, "cluster": "main", **labels}}


def test_an_explosion_silences_its_consequences_in_its_own_run(running: Server) -> None:
    alerts = [
        alert("GradmonGradientExplosion", "ticket", run="a", rank="1"),
        alert("GradmonLearningRateBackedOff", "ticket", run="a", rank="1"),
        alert("GradmonSpike", "info", run="a"),
        alert("GradmonSpike", "info", run="b"),
        alert("GradmonNonfiniteGradients", "info", run="a"),
        alert("GradmonTargetDown", "ticket"),
        alert("GradmonHostMemoryNearlyFull", "ticket", host="h"),
    ]
    body = json.dumps(alerts).encode()
    request = urllib.request.Request(
        f"{running.url}/api/v2/alerts", data=body, headers={"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=10).close()
    names: set[tuple[str, str | None]] = set()
    deadline = time.monotonic() + 10
    while len(names) != len(alerts) - 2 and time.monotonic() < deadline:  # its inhibitor hears of alerts a little later
        told = running.get("/api/v2/alerts", inhibited="false")
        names = {(a["labels"]["alertname"], a["labels"].get("run")) for a in told}
    assert names == {
        ("GradmonGradientExplosion", "a"),
        ("GradmonSpike", "b"),
        ("GradmonNonfiniteGradients", "a"),
        ("GradmonTargetDown", None),
        ("GradmonHostMemoryNearlyFull", None),
    }
    assert len(running.get("/api/v2/alerts")) == len(alerts)
    groups = {tuple(sorted(g["labels"].items())) for g in running.get("/api/v2/alerts/groups")}
    assert (("cluster", "main"), ("run", "a")) in groups
    assert (("alertname", "GradmonTargetDown"), ("cluster", "main")) in groups
