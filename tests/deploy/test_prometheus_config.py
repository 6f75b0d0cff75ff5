"""Prometheus' configurations against promtool, and what remote write lets through against METRICS."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from manifests import DEPLOY, documents

from gradmon.metrics import METRICS

RULES = ("gradmon-recording.yml", "gradmon-alerts.yml", "gradmon-targets.yml")
REMOTE = ("mimir.yml", "victoriametrics.yml")


def check(promtool: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, "check", "config", str(path)], capture_output=True, text=True)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """What is mounted as /etc/prometheus, with the secrets an operator adds."""
    folder = shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    secrets = folder / "secrets"
    secrets.mkdir()
    for name in ("gradmon-token", "gradmon-ca.pem", "remote-write-password"):
        (secrets / name).write_text("secret")
    return folder


def place(folder: Path, text: str) -> Path:
    path = folder / "prometheus.yml"
    path.write_text(text.replace("/etc/prometheus/", f"{folder}/"))
    return path


def test_the_base_is_valid_with_its_rules(promtool: str, etc: Path) -> None:
    done = check(promtool, etc / "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"SUCCESS: [1-9]\d* rules found", done.stdout)) == len(RULES)


def test_a_missing_rule_file_would_be_seen(promtool: str, etc: Path) -> None:
    (etc / RULES[0]).unlink()
    assert check(promtool, etc / "prometheus.yml").returncode != 0


def test_the_base_with_what_it_says_in_comments(promtool: str, etc: Path) -> None:
    text = (etc / "prometheus.yml").read_text()
    for old, new in {
        "scrape_interval: 5s": "scrape_interval: 15s",
        "scrape_timeout: 4s": "scrape_timeout: 10s",
        "evaluation_interval: 5s": "evaluation_interval: 15s",
        "# authorization:": "authorization:",
        "# scheme:": "scheme:",
        "# tls_config:": "tls_config:",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    done = check(promtool, place(etc, text))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", REMOTE)
def test_remote_write_can_be_appended(promtool: str, etc: Path, name: str) -> None:
    text = (etc / "prometheus.yml").read_text() + (DEPLOY / "remote-write" / name).read_text()
    done = check(promtool, place(etc, text))
    assert done.returncode == 0, done.stderr


def test_a_shard_is_valid_and_takes_its_share_only(promtool: str, etc: Path) -> None:
    text = (DEPLOY / "remote-write/shard.yml").read_text()
    done = check(promtool, place(etc, text))
    assert done.returncode == 0, done.stderr
    (config,) = documents(DEPLOY / "remote-write/shard.yml")
    assert "rule_files" not in config
    hash_, keep = config["scrape_configs"][0]["relabel_configs"][:2]
    assert hash_["target_label"] == keep["source_labels"][0]
    assert int(keep["regex"]) < hash_["modulus"]


def test_remote_write_lets_through_what_is_small() -> None:
    kept = []
    for name in REMOTE:
        (config,) = documents(DEPLOY / "remote-write" / name)
        (rule,) = config["remote_write"][0]["write_relabel_configs"]
        assert (rule["action"], rule["source_labels"]) == ("keep", ["__name__"])
        kept.append(rule["regex"])
    assert kept[0] == kept[1]
    names = re.search(r"gradmon_\(([\w|]+)\)", kept[0])
    assert names
    metrics = {metric.name: metric for metric in METRICS}
    for short in names[1].split("|"):
        metric = metrics[f"gradmon_{short}"]
        assert "run" in metric.labels
        assert not {"layer", "parameter", "rank"} & set(metric.labels) or metric.name == "gradmon_last_incident_info"
    # The roll-ups by their prefix, and nothing that exists once per rank.
    assert re.fullmatch(kept[0], "run:gradmon_straggler:ratio")
    assert not [m.name for m in METRICS if "rank" in m.labels and re.fullmatch(kept[0], m.name)][1:]


@pytest.mark.parametrize("name", ["prometheus/prometheus.yml", "remote-write/shard.yml"])
def test_job_and_cluster_are_what_rules_expect(name: str) -> None:
    (config,) = documents(DEPLOY / name)
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "gradmon"
    assert job["relabel_configs"][-1] == {
        "source_labels": ["cluster"],
        "regex": "^$",
        "target_label": "cluster",
        "replacement": "main",
    }
