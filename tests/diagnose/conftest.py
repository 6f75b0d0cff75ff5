"""Tools that only these tests use. The reasons end in the words that tests/conftest.py counts and shows."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent"))  # fake ranks


@pytest.fixture(scope="session")
def graphviz() -> str:
    """The program that lays graphs out (Debian's package graphviz)."""
    path = shutil.which("dot")
    if path is None and os.environ.get("GRADMON_TEST_ALL") == "1":
        pytest.fail("dot is missing, and GRADMON_TEST_ALL=1 allows no test to be left out")
    return path or pytest.skip("dot (graphviz) is not installed: left out")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread, as fast on small tensors and no burden on those who run beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
