"""Tools some tests need, and a loud word about the tests left out where one is missing."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from browsing import SWITCHES

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_MISSING = "is not installed: left out"
_left_out: list[str] = []
#: What only a GPU can show; no machine without one can run it, whatever is installed.
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
#: The library that the dashboards are built with needs Python 3.11; what is built does not.
_TOO_OLD = sys.version_info < (3, 11)
collect_ignore += ["dashboards"] if _TOO_OLD else []


def _interpret_triton() -> None:
    """Triton asks when it is imported whether its interpreter is wanted, and torch's compiler imports it too."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")


if not torch.cuda.is_available():  # tests/gpu need the compiled kernels
    _interpret_triton()


# A CI's background job ignores it, and so would all that tests start and end by it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _tool(*names: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    if os.environ.get("GRADMON_TEST_ALL") == "1":
        pytest.fail(f"{names[0]} is missing, and GRADMON_TEST_ALL=1 allows no test to be left out")
    pytest.skip(f"{names[0]} {_MISSING}")


@pytest.fixture(scope="session")
def promtool() -> str:
    return _tool("promtool")


@pytest.fixture(scope="session")
def prometheus(promtool: str) -> str:
    return _tool("prometheus")


@pytest.fixture(scope="session")
def alertmanager() -> str:
    return _tool("prometheus-alertmanager", "alertmanager")


@pytest.fixture(scope="session")
def amtool() -> str:
    return _tool("amtool")


@pytest.fixture(scope="session")
def chromium() -> str:
    return _tool("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(SWITCHES))
        yield browser
        browser.close()


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and _MISSING in str(report.longrepr):
        _left_out.append(f"{report.nodeid}: {str(report.longrepr[-1]).removeprefix('Skipped: ')}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TOO_OLD:
        terminalreporter.line(
            "tests/dashboards: building them needs Python 3.11, so these tests are not part of this run"
        )
    if "gpu" in collect_ignore:
        terminalreporter.line("tests/gpu: no CUDA device here, so these tests are not part of this run")
    if _left_out:
        terminalreporter.section("LEFT OUT FOR MISSING TOOLS", sep="!", red=True, bold=True)
        for line in _left_out:
            terminalreporter.line(line)
        terminalreporter.line(
            f"{len(_left_out)} tests or files did not run; with GRADMON_TEST_ALL=1 that is a failure."
        )
