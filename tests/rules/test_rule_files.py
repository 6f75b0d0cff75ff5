"""What every rule must have, whatever it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from shipped import rule_files

from gradmon import rules
from gradmon.metrics import METRICS_BY_NAME
from gradmon.rules import ALERTS, DEMO, SETTINGS, SETTINGS_15S, RuleSettings
from gradmon.rules.alertmanager import CONSEQUENCES

RUNBOOK = Path(__file__).resolve().parents[2] / "dashboards" / "RUNBOOK.md"
TARGET_LABELS = {"job", "instance", "cluster", "__name__"}
PARTS = ("Meaning", "First look", "Likely causes", "What gradmon has done already", "What to do")


def all_rules(settings: RuleSettings = SETTINGS) -> list[dict[str, Any]]:
    files = rules.recording_rules(settings), rules.alert_rules(settings), rules.target_rules(settings)
    return [rule for content in files for group in content["groups"] for rule in group["rules"]]


RECORDED = {rule["record"] for rule in all_rules() if "record" in rule}


def parts(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        child = getattr(node, name, None)
        if isinstance(child, promql_parser.Expr) or type(child).__name__.endswith(("Expr", "Selector")):
            yield from parts(child)
    for child in getattr(node, "args", None) or ():
        yield from parts(child)


def selectors(expr: str) -> list[Any]:
    return [n for n in parts(promql_parser.parse(expr)) if isinstance(n, promql_parser.VectorSelector)]


@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS_15S, DEMO], ids=["production", "15s", "demo"])
def test_promtool_accepts_them(settings: RuleSettings, promtool: str, tmp_path: Path) -> None:
    files = [str(path) for path in rule_files(tmp_path, settings).values()]
    result = subprocess.run([promtool, "check", "rules", *files], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("SUCCESS") == 3


def test_metrics_and_labels_exist() -> None:
    seen = set()
    for rule in all_rules():
        for selector in selectors(rule["expr"]):
            name = selector.name
            seen.add(name)
            assert name in METRICS_BY_NAME or name in RECORDED or name == "up", f"{name} in {rule}"
            if name in METRICS_BY_NAME:
                known = {*METRICS_BY_NAME[name].labels, *TARGET_LABELS}
                assert {m.name for m in selector.matchers.matchers} <= known, rule
    assert len(seen & METRICS_BY_NAME.keys()) > 35


def test_the_walk_finds_every_metric() -> None:
    """So that the test above can't miss one."""
    for rule in all_rules():
        named = set(re.findall(r"\bgradmon_\w+(?![\w:])", re.sub(r"\w+:[\w:]+", "", rule["expr"])))
        assert named <= {s.name for s in selectors(rule["expr"])}, rule


def test_labels_in_by_and_on_exist() -> None:
    known = {label for metric in METRICS_BY_NAME.values() for label in metric.labels} | TARGET_LABELS
    for rule in all_rules():
        for inside in re.findall(r"\b(?:by|on|ignoring|group_left) \(([\w, ]*)\)", rule["expr"]):
            assert {label.strip() for label in inside.split(",")} - {""} <= known, rule


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: f"{a.name}-{a.severity}")
def test_an_alert_says_everything(alert: rules.Alert) -> None:
    rule = alert.rule()
    assert alert.name.startswith("Gradmon")
    assert rule["labels"]["severity"] in {"page", "ticket", "info", "none"}
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url", "dashboard"}
    assert all(notes.values())
    assert notes["runbook_url"] == f"{rules.RUNBOOK_URL}#{alert.name.lower()}"
    assert len(notes["summary"]) < 110
    for label in re.findall(r"\$labels\.(\w+)", " ".join(map(str, notes.values()))):
        assert label in {"cluster", "run", "rank", "parameter", "kind", "reason", "host", "part"}


def test_severities_are_those_of_operations() -> None:
    pages = {a.name for a in ALERTS if a.severity == "page"}
    assert pages == {
        "GradmonGradientExplosion", "GradmonManyNonfiniteSteps", "GradmonTrainingStopped", "GradmonReplicasDiverged",
        "GradmonRunStuck",
    }  # fmt: skip
    assert [a.name for a in ALERTS if a.severity == "none"] == ["GradmonWatchdog"]


def test_no_event_alert_waits() -> None:
    """An explosion must be told at once."""
    events = [a for a in ALERTS if a.group == "events"]
    assert len(events) > 10
    assert not [a.name for a in events if a.wait]


def test_the_runbook_has_a_chapter_for_each() -> None:
    chapters = dict(re.findall(r"^## (Gradmon\w+)\n(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.M | re.S))
    assert set(chapters) == {a.name for a in ALERTS}
    for name, text in chapters.items():
        for part in PARTS:
            assert f"**{part}.**" in text, f"{name} says nothing under {part}"


def test_the_runbook_names_what_exists() -> None:
    text = RUNBOOK.read_text()
    known = METRICS_BY_NAME.keys() | RECORDED
    for name in re.findall(r"\b(?:run:|rank:)?gradmon_\w+(?::\w+)?", text):
        assert name in known, name
    for block in re.findall(r"```promql\n(.*?)```", text, re.S):
        for line in filter(None, block.splitlines()):
            promql_parser.parse(line)


def test_windows_hold_four_scrapes() -> None:
    for settings, scrape in ((SETTINGS, 5), (SETTINGS_15S, 15), (DEMO, 1)):
        for window in (settings.event_window, settings.rate_window, settings.share_window, settings.lasting_window):
            assert promql_parser.parse_duration(window).total_seconds() >= 4 * scrape


def test_per_rank_series_have_no_long_ranges() -> None:
    """Over 10,000 ranks they would cost seconds per evaluation; what is evaluated once a minute may look further."""
    slow = [r for g in rules.recording_rules()["groups"] if g["interval"] == SETTINGS.slow_interval for r in g["rules"]]
    for rule in all_rules():
        longest = 600 if rule in slow else 120
        for node in parts(promql_parser.parse(rule["expr"])):
            if isinstance(node, promql_parser.MatrixSelector):
                selector = node.vector_selector
                one = any(m.name == "rank" for m in selector.matchers.matchers)
                if "rank" in getattr(METRICS_BY_NAME.get(selector.name), "labels", ()) and not one:
                    assert node.range.total_seconds() <= longest, rule


def test_roll_ups_are_few() -> None:
    """Each `run:` rule gives one series per run, but for those by action, kind or rank."""
    rules_of_run = [r for r in all_rules() if r.get("record", "").startswith("run:")]
    many = {"run:gradmon_actions:rate": 22}
    assert 30 < sum(many.get(r["record"], 1) for r in rules_of_run) <= 250


def test_consequences_are_alerts_and_never_hide_a_page() -> None:
    severities: dict[str, set[str]] = {}
    for alert in ALERTS:
        severities.setdefault(alert.name, set()).add(alert.severity)
    for source, targets in CONSEQUENCES.items():
        for target in targets:
            assert target != source
            if "page" in severities[target]:
                assert severities[source] == {"page"}, f"{source} silences {target}"
