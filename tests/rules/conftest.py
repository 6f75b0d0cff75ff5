"""Rule files as they are shipped, and promtool's answer to a test of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds import Value, input_series

from gradmon.rules import SETTINGS, RuleSettings, alert_rules, recording_rules, target_rules


def rule_files(directory: Path, settings: RuleSettings = SETTINGS) -> dict[str, Path]:
    files = {}
    for name, make in (("recording", recording_rules), ("alerts", alert_rules), ("targets", target_rules)):
        files[name] = directory / f"gradmon-{name}.yml"
        files[name].write_text(yaml.safe_dump(make(settings), sort_keys=False))
    return files


Check = Callable[..., subprocess.CompletedProcess[str]]


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
