"""From a real training run to a webhook, through a real Prometheus and a real Alertmanager."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_journals import ROOT, AgentProcess, FakeRank, explode, identity, record
from webhook import Webhook

from gradmon import rules
from gradmon.stack import Stack, StackOptions

#: Goals are 5 s in the demo's settings and 20 s in those of deploy/; a noisy machine is given three times as long.
DEMO_SECONDS, PRODUCTION_SECONDS = 15.0, 60.0
STEPS = 80


@contextmanager
def demo(directory: Path, webhook: Webhook, *options: str, end: int) -> Iterator[subprocess.Popen[str]]:
    """`gradmon demo --stack --stay`; whatever ends it, nothing of it may stay."""
    command = [sys.executable, "-m", "gradmon", "demo", "--stack", "--stay", "--webhook", webhook.url]
    command += ["--dir", str(directory), "--port", "0", "--steps", str(STEPS), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.send_signal(end)
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            raise
        print(output)
        assert process.returncode == 130, output
        left = subprocess.run(["pgrep", "-fa", f"={directory}/"], capture_output=True, text=True, check=False).stdout
        assert left == "", "servers that outlive it"


def test_the_demos_explosion_is_in_the_webhook_and_is_resolved(
    tmp_path: Path, prometheus: str, alertmanager: str
) -> None:
    with Webhook() as webhook, demo(tmp_path, webhook, end=signal.SIGINT):
        explosion = webhook.wait_for("GradmonGradientExplosion", "firing", 120, run="demo", rank="1")
        broken = webhook.wait_for("GradmonNonfiniteGradients", "firing", 60, run="demo", rank="1")
        for alert in (explosion, broken):
            assert alert.labels["parameter"] not in ("", "unknown")
            assert "rank 1" in alert.annotations["summary"] + alert.annotations["description"]
            assert alert.annotations["runbook_url"].endswith("#" + alert.name.lower())
        webhook.wait_for("GradmonGradientExplosion", "resolved", 120, run="demo", rank="1")
        webhook.wait_for("GradmonNonfiniteGradients", "resolved", 120, run="demo", rank="1")


def test_a_clean_run_sends_nothing_but_the_watchdog(tmp_path: Path, prometheus: str, alertmanager: str) -> None:
    with Webhook() as webhook, demo(tmp_path, webhook, "--clean", end=signal.SIGTERM) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Validation loss"):
                break
        time.sleep(4)  # what its end could set off
        assert {one.name for one in webhook.received} <= {"GradmonWatchdog"}, webhook.summary()


@pytest.mark.parametrize(
    ("settings", "seconds"), [(rules.DEMO, DEMO_SECONDS), (rules.SETTINGS, PRODUCTION_SECONDS)], ids=["demo", "deploy"]
)
def test_an_explosion_is_told_in_time(tmp_path: Path, prometheus: str, alertmanager: str, settings, seconds) -> None:
    journals = tmp_path / "journals"
    rank = FakeRank(journals, identity(run="gpt", world_size=1)).step(*(record(step) for step in range(1, 30)))
    with Webhook() as webhook, AgentProcess(journals) as agent:
        assert agent.address
        with Stack(StackOptions(tmp_path / "stack", (journals,), webhook=webhook.url, settings=settings)) as stack:
            deadline = time.monotonic() + 60
            while not stack.prometheus.query('gradmon_steps_total{run="gpt"} > 0'):
                assert time.monotonic() < deadline
                time.sleep(0.2)
            told = time.time()
            explode(rank, 30)
            explosion = webhook.wait_for("GradmonGradientExplosion", "firing", seconds, run="gpt", rank="0")
            broken = webhook.wait_for("GradmonNonfiniteGradients", "firing", seconds, run="gpt", rank="0")
    rank.end()
    print(f"explosion told after {explosion.at - told:.1f} s, NaN after {broken.at - told:.1f} s")
    assert explosion.at - told < seconds


def test_without_prometheus_the_demo_says_what_to_install(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "gradmon", "stack", "--dir", str(tmp_path / "stack"), "--journals", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == "gradmon: alertmanager is not installed; cure: sudo apt install prometheus-alertmanager\n"
