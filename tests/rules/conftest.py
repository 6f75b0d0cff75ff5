"""promtool's answer to a test of the rules."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml
from shipped import Check, rule_files
from worlds import Value, input_series


@pytest.fixture(scope="session")
def check(promtool: str, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Run `promtool test rules` over simulated series and the rules with production times."""
    directory = tmp_path_factory.mktemp("rules")
    files = rule_files(directory)
    order = [g["name"] for f in files.values() for g in yaml.safe_load(f.read_text())["groups"]]

    def run(
        series: dict[str, Value], length: int, expectations: dict[str, Any], interval: int = 15
    ) -> subprocess.CompletedProcess[str]:
        test = {
            "rule_files": [str(f) for f in files.values()],
            "evaluation_interval": f"{interval}s",
            "group_eval_order": order,
            "tests": [
                {"interval": f"{interval}s", "input_series": input_series(series, interval, length), **expectations}
            ],
        }
        path = directory / "test.yml"
        path.write_text(yaml.dump(test, sort_keys=False, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
        return subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)

    return run
