"""Each dashboard in turn."""

from __future__ import annotations

from typing import Any

import pytest
from committed import NAMES, load


@pytest.fixture(params=NAMES)
def dashboard(request) -> dict[str, Any]:
    return load(request.param)
