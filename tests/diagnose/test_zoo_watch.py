"""The watches over data, loss and weights: what they must explain, and where they must keep quiet."""

from __future__ import annotations

from pathlib import Path

import pytest
from healthy import HEALTHY
from zoo import Broken, Healthy
from zoo_watch import BROKEN, watch_healthy


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_training_is_explained(broken: Broken, tmp_path: Path) -> None:
    said = broken.find(tmp_path)
    for name in broken.names:
        assert name in said, said or "nothing was said"


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda healthy: healthy.name)
def test_healthy_training_is_left_alone(healthy: Healthy) -> None:
    assert watch_healthy(healthy) == ""
