"""compose.yaml against the schema of the Compose specification, and its commands with the real servers.

There is no Docker here. What a container would be given is put in place by rewriting its paths and ports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from manifests import DEPLOY, ROOT, documents

from gradmon.stack.servers import PROGRAMS, Server, find_program, free_port

FOLDER = DEPLOY / "compose"
(COMPOSE,) = documents(FOLDER / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROVISIONING = FOLDER / "grafana/provisioning"
DATASOURCES = {d["uid"]: d for d in documents(PROVISIONING / "datasources/gradmon.yaml")[0]["datasources"]}


def test_it_is_valid() -> None:
    # check-jsonschema carries a copy of the specification's schema.
    schema = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    validator = jsonschema.validators.validator_for(content := json.loads(schema.read_text()))(content)
    validator.validate(COMPOSE)
    wrong = {**COMPOSE, "services": {**SERVICES, "agent": {**SERVICES["agent"], "imag": "x"}}}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


def test_every_service_is_confined() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "healthcheck" in service or service["image"].startswith("gradmon-agent"), name  # the image has one
        root = service["user"].startswith("0:")
        assert root == (name == "prepare")
        assert not root or service["network_mode"] == "none"


def test_nothing_listens_beyond_loopback() -> None:
    command = " ".join(" ".join(s["command"]) for s in SERVICES.values() if "command" in s)
    addresses = re.findall(r"--(?:web\.)?listen(?:-address)?[= ](\S+)", command)
    assert len(addresses) == 3
    addresses.append(SERVICES["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"])
    assert all(address.partition(":")[0] == "127.0.0.1" for address in addresses)
    assert "--cluster.listen-address=" in command.split()
    assert not [s for s in SERVICES.values() if "ports" in s]


def mounts(service: str) -> dict[str, Path | None]:
    """Where each path in a container comes from: a path here, or None for a volume."""
    found: dict[str, Path | None] = {}
    for volume in SERVICES[service]["volumes"]:
        source, target = volume.replace("${GRADMON_DIR:-/var/lib/gradmon}", "journals").split(":")[:2]
        assert source.startswith(".") or source in COMPOSE["volumes"] or source == "journals", source
        found[target] = (FOLDER / source).resolve() if source.startswith(".") else None
    return found


def test_what_is_mounted_is_there() -> None:
    for name in SERVICES:
        for source in mounts(name).values():
            assert source is None or source.exists(), source


def test_grafana_finds_its_dashboards_and_servers() -> None:
    inside = mounts("grafana")
    (provider,) = documents(PROVISIONING / "dashboards/gradmon.yaml")[0]["providers"]
    assert inside[provider["options"]["path"]] == ROOT / "dashboards"
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    source = inside[str(home.parent)]
    assert source is not None
    assert (source / home.name).is_file()
    # Grafana loads every .json below: all must be dashboards.
    assert all("panels" in json.loads(path.read_text()) for path in source.rglob("*.json"))
    assert inside["/etc/grafana/provisioning"] == PROVISIONING
    for uid in ("prometheus", "alertmanager"):
        external = f"--web.external-url={DATASOURCES[uid]['url']}"
        assert external in SERVICES[uid]["command"]
    assert DATASOURCES["prometheus"]["jsonData"]["alertmanagerUid"] == "alertmanager"


def test_every_secret_alertmanager_reads_has_its_line_in_the_list() -> None:
    text = (DEPLOY / "alertmanager/alertmanager.yml").read_text()
    names = set(re.findall(r"/etc/alertmanager/secrets/([\w.-]+)", text))
    assert mounts("alertmanager")["/etc/alertmanager/secrets"] == FOLDER / "secrets"
    listed = set(re.findall(r"^\| `([\w.-]+)` \|", (FOLDER / "secrets/README.md").read_text(), re.MULTILINE))
    assert names
    assert names <= listed
    ignored = subprocess.run(["git", "check-ignore", "-q", "secrets/any"], cwd=FOLDER).returncode
    assert ignored == 0 or not (ROOT / ".git").exists()


def start(name: str, folder: Path, ports: dict[str, int]) -> Server:
    """A server by its command in compose.yaml, with what it would find in its container here."""
    command = [find_program(name) or ""]
    for word in SERVICES[name]["command"]:
        for inside, here in {
            "=/etc/prometheus/": f"={folder}/etc/",
            "=/etc/alertmanager/": f"={DEPLOY}/alertmanager/",
            f"=/{name}": f"={folder}/{name}",
        }.items():
            word = word.replace(inside, here)
        command.append(place(word, ports))
    return Server(name, command, folder, port=ports[name], ready="/-/ready").wait_ready()


def place(text: str, ports: dict[str, int]) -> str:
    for name, port in {"agent": 10855, "prometheus": 9090, "alertmanager": 9093}.items():
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ports[name]}")
    return text


def test_its_commands_make_a_stack(tmp_path: Path, prometheus: str, alertmanager: str) -> None:
    assert prometheus
    assert Path(alertmanager).name in PROGRAMS["alertmanager"]
    ports = {name: free_port() for name in ("agent", "prometheus", "alertmanager")}
    etc = tmp_path / "etc"
    etc.mkdir()
    for path in (DEPLOY / "prometheus").glob("*.yml"):
        (etc / path.name).write_text(place(path.read_text(), ports))
    arguments = [word.replace("/var/lib/gradmon-archive", str(tmp_path)) for word in SERVICES["agent"]["command"]]
    agent = subprocess.Popen(
        [sys.executable, "-m", "gradmon", *arguments, "--port", str(ports["agent"])],
        env={**os.environ, "GRADMON_DIR": str(tmp_path / "journals")},
        stderr=subprocess.DEVNULL,
    )
    try:
        with start("alertmanager", tmp_path, ports) as alerts, start("prometheus", tmp_path, ports) as metrics:
            deadline = time.monotonic() + 30
            while not metrics.query('up{job="gradmon", cluster="main"} == 1'):
                assert time.monotonic() < deadline, metrics.query("up")
                time.sleep(0.2)
            (known,) = metrics.get("/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
            assert known["url"].startswith(alerts.url)
            names = {rule["name"] for g in metrics.get("/api/v1/rules")["data"]["groups"] for rule in g["rules"]}
            assert {"GradmonWatchdog", "GradmonTargetDown"} <= names
            receivers = {receiver["name"] for receiver in alerts.get("/api/v2/receivers")}
            assert {"page", "ticket", "info", "watchdog"} <= receivers
    finally:
        agent.terminate()
        agent.wait(20)
