"""Tools some tests need, and a loud word about the tests left out where one is missing."""

from __future__ import annotations

import os
import shutil

import pytest

#: With GRADMON_TEST_ALL=1 a missing tool is a failure: nothing may be left out unnoticed there.
_ALL = os.environ.get("GRADMON_TEST_ALL") == "1"
_left_out: list[str] = []


def _tool(request: pytest.FixtureRequest, *names: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    if _ALL:
        pytest.fail(f"{names[0]} is missing, and GRADMON_TEST_ALL=1 allows no test to be left out")
    _left_out.append(f"{request.node.nodeid}: no {names[0]}")
    pytest.skip(f"{names[0]} is not installed")


@pytest.fixture
def promtool(request: pytest.FixtureRequest) -> str:
    return _tool(request, "promtool")


@pytest.fixture
def chromium(request: pytest.FixtureRequest) -> str:
    return _tool(request, "chromium", "chromium-browser", "google-chrome")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        terminalreporter.section("LEFT OUT FOR MISSING TOOLS", sep="!", red=True, bold=True)
        for line in _left_out:
            terminalreporter.line(line)
        terminalreporter.line(f"{len(_left_out)} tests did not run. Install the tools, or see .ci/bootstrap.")
