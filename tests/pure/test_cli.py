from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradmon
from gradmon.agent.launch import agent_address


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GRADMON_")}
    command = [sys.executable, "-m", "gradmon", *arguments]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=60)


def test_version() -> None:
    assert run("--version").stdout == f"gradmon {gradmon.__version__}\n"


def test_config_says_where_each_value_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "gradmon.yaml"
    file.write_text("preset: strict\nbackoff: {floor: 0.1}\n")
    done = run("config", str(file), GRADMON_RUN="mine")
    assert done.returncode == 0
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    assert lines["run"].startswith("run: mine")
    assert "# environment GRADMON_RUN;" in lines["run"]
    assert f"# {file};" in lines["floor"]
    assert "# preset strict;" in lines["drift_ratio"]
    assert "# default;" in lines["rewarm"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["config", "/nonexistent.yaml"], "gradmon: config file /nonexistent.yaml does not exist"),
        (["agent", "--dir", "/proc/none"], "gradmon: dir /proc/none can't be made"),
        (["agent", "--port", "99999"], "must be a whole number from 0 to 65535 (got '99999')"),
        (["agent", "--linger", "-1"], "must be a number of seconds from 0 up (got '-1')"),
        (["demo", "--steps", "3"], "must be a whole number from 40 to 100000 (got '3')"),
        (["demo", "--ranks", "two"], "must be a whole number from 1 to 64 (got 'two')"),
        ([], "the following arguments are required: COMMAND"),
        (["explode"], "invalid choice: 'explode'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_environment_is_named() -> None:
    done = run("config", GRADMON_MODE="watch")
    assert done.returncode == 2
    assert done.stderr.startswith("gradmon: mode must be one of guard | observe (got 'watch')")


def test_a_failing_job_gives_the_demos_exit_code(tmp_path: Path) -> None:
    broken = tmp_path / "sitecustomize.py"
    broken.write_text("import sys\nif any('gradmon.demo.train' in a for a in sys.orig_argv): raise SystemExit(7)\n")
    journals = tmp_path / "journals"
    done = run("demo", "--exit", "--steps", "40", "--port", "0", "--dir", str(journals), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "torchrun ended with code 1; the lines above say why." in done.stdout
    assert (journals / "agent.lock").exists()
    assert agent_address(journals) is None, "the demo's agent ends with it"
