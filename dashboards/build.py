"""Writes everything that is generated from gradmon's metrics and rules: `python dashboards/build.py`.

The dashboards as Grafana imports them, and the rules and the Alertmanager configuration of deploy/. With `--check` it
writes nothing and fails when a file is not what it would write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dashboards"), str(ROOT)]

import yaml  # noqa: E402
from boards import BOARDS, build  # noqa: E402

from gradmon import rules  # noqa: E402

_HEAD = "# Generated from gradmon/rules by `python dashboards/build.py`: change it there.\n"


class _Dumper(yaml.SafeDumper):
    """Long text in blocks, as a person would write it."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(content: dict[str, Any], comment: str = "") -> str:
    body = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return _HEAD + "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + body


def _prometheus_rule(name: str, *files: dict[str, Any]) -> str:
    content = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        # kube-prometheus-stack reads only what has the label of its release.
        "metadata": {"name": name, "labels": {"release": "kube-prometheus-stack"}},
        "spec": {"groups": [group for file in files for group in file["groups"]]},
    }
    return _yaml(content, "The label `release` is the name under which kube-prometheus-stack was installed.")


#: Path under the repository's root -> what makes its text.
OUTPUTS: dict[str, Callable[[], str]] = {
    **{f"dashboards/{name}.json": partial(build, board) for name, board in BOARDS.items()},
    "deploy/prometheus/gradmon-recording.yml": lambda: _yaml(rules.recording_rules()),
    "deploy/prometheus/gradmon-alerts.yml": lambda: _yaml(rules.alert_rules()),
    "deploy/prometheus/gradmon-targets.yml": lambda: _yaml(
        rules.target_rules(), "Leave this file out where agents come and go with their jobs."
    ),
    "deploy/alertmanager/alertmanager.yml": lambda: _yaml(rules.alertmanager_config(), rules.ALERTMANAGER_COMMENT),
    "deploy/kubernetes/base/prometheusrule.yaml": lambda: _prometheus_rule(
        "gradmon", rules.recording_rules(), rules.alert_rules()
    ),
    "deploy/kubernetes/targets/prometheusrule-targets.yaml": lambda: _prometheus_rule(
        "gradmon-targets", rules.target_rules()
    ),
}


def differing() -> list[str]:
    """Paths whose file is missing or not what it should be."""
    return [
        path
        for path, make in OUTPUTS.items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text(encoding="utf-8") != make()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Write or compare; 1 if a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    if parser.parse_args(arguments).check:
        paths = differing()
        for path in paths:
            print(f"{path} is out of date; cure: python dashboards/build.py", file=sys.stderr)
        return 1 if paths else 0
    for path, make in OUTPUTS.items():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(make(), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
