"""Tools that only these tests use. The reasons end in the words that tests/conftest.py counts and shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

_SCHEMAS = Path(__file__).parents[3] / "shared" / "schemas"


@pytest.fixture(scope="session")
def kubectl() -> str:
    """A kubectl whose kustomize is new enough. No registry has one for every Debian, so it may be absent in CI too."""
    path = shutil.which("kubectl")
    if path is not None:
        answer = subprocess.run([path, "version", "--client", "--output=json"], capture_output=True, text=True)
        version = json.loads(answer.stdout).get("kustomizeVersion", "v0") if answer.returncode == 0 else "v0"
        if int(version.lstrip("v").split(".")[0]) >= 5:
            return path
    pytest.skip("a kubectl with kustomize 5 is not installed: left out")


@pytest.fixture(scope="session")
def definitions() -> Path:
    """The folder with prometheus-operator's definitions, beside the checkout."""
    if _SCHEMAS.is_dir():
        return _SCHEMAS
    pytest.skip("../shared/schemas (prometheus-operator's definitions) is not installed: left out")


def _systemd(name: str) -> str:
    path = shutil.which(name)
    return path or pytest.skip(f"{name} is not installed: left out")


@pytest.fixture(scope="session")
def systemd_analyze() -> str:
    return _systemd("systemd-analyze")
