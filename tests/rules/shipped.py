"""Rule files as they are shipped, and the type of what asks promtool."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

from gradmon.rules import SETTINGS, RuleSettings, alert_rules, recording_rules, target_rules


def rule_files(directory: Path, settings: RuleSettings = SETTINGS) -> dict[str, Path]:
    files = {}
    for name, make in (("recording", recording_rules), ("alerts", alert_rules), ("targets", target_rules)):
        files[name] = directory / f"gradmon-{name}.yml"
        files[name].write_text(yaml.safe_dump(make(settings), sort_keys=False))
    return files


Check = Callable[..., subprocess.CompletedProcess[str]]
