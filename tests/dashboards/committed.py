"""The dashboards as they are committed, and how to import what makes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dashboards"), str(ROOT / "dashboards" / "preview"), str(ROOT / "tests" / "fleet")]

NAMES = ("fleet", "run", "ranks", "layers", "gpu")


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "dashboards" / f"{name}.json").read_text(encoding="utf-8"))
