"""The image's health check, run as it stands in the Dockerfile against real agents."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from manifests import ROOT

from gradmon.agent import wait_for_agent

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def health(directory: Path) -> int:
    """The exit code of the health check in a container whose GRADMON_DIR is this."""
    check = re.search(r"^HEALTHCHECK .*\n +CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert check
    command = json.loads(check[1])
    assert command[0] == "python"
    command[0] = sys.executable
    return subprocess.run(command, env={**os.environ, "GRADMON_DIR": str(directory)}, capture_output=True).returncode


@contextmanager
def agent(directory: Path, *options: str) -> Iterator[str]:
    """The image's default command, with options, on a free port."""
    command = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert command
    # 0.0.0.0 is right in a container's own network, and nothing a test may open here.
    arguments = [word.replace("0.0.0.0", "127.0.0.1") for word in json.loads(command[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmon", *arguments, "--port", "0", *options],
        env={**os.environ, "GRADMON_DIR": str(directory)},
        stderr=subprocess.DEVNULL,
    )
    try:
        address = wait_for_agent(directory, 20)
        assert address
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def certificate(tmp_path: Path) -> list[str]:
    openssl = shutil.which("openssl") or pytest.skip("openssl is not installed: left out")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=elsewhere"]
    subprocess.run([*command, "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "token").write_text("a-token-that-is-long-enough\n")
    for name in ("key.pem", "token"):
        (tmp_path / name).chmod(0o600)
    names = {"--tls-cert": "cert.pem", "--tls-key": "key.pem", "--token-file": "token"}
    return [word for option, name in names.items() for word in (option, str(tmp_path / name))]


def test_it_follows_the_agent(tmp_path: Path) -> None:
    directory = tmp_path / "journals"
    with agent(directory):
        assert health(directory) == 0
    assert health(directory) != 0


def test_it_needs_neither_token_nor_trust(tmp_path: Path, certificate: list[str]) -> None:
    directory = tmp_path / "journals"
    with agent(directory, *certificate) as address:
        assert address.startswith("https://")
        assert health(directory) == 0
