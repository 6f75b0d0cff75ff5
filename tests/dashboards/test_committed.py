"""The dashboards' JSON: what Grafana 11 to 13 import, what a newcomer can read, and the alerts' own thresholds."""

from __future__ import annotations

import dataclasses
import json
import re

import build
import pytest
from boards import BOARDS
from boards.queries import panels
from committed import NAMES, ROOT, load
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from gradmon import rules
from gradmon.rules import RUNBOOK_URL, THRESHOLDS

TYPES = {"timeseries", "stat", "table", "heatmap", "state-timeline", "status-history", "bargauge", "text"}
#: Bounds that no alert has and that need no number of their own: one of something, and the limit itself.
NATURAL = {1}
#: Numbers in the panels, where 0 is as good as any.
UNITS = {"none", "short", "percentunit", "s", "bytes", "Bps", "watt", "celsius"}
#: What Grafana reads and the SDK's types do not know.
UNTYPED = {"titleFormat", "textFormat", "tagKeys", "step"}


@pytest.fixture(scope="module", autouse=True)
def _plugins():
    register_default_plugins()


def test_the_files_are_what_build_writes(tmp_path, monkeypatch, capsys):
    assert build.main(["--check"]) == 0, capsys.readouterr().err
    stale = tmp_path / "dashboards/run.json"
    stale.parent.mkdir()
    stale.write_text(json.dumps({**load("run"), "title": "old"}))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.main(["--check"]) == 1
    assert "dashboards/run.json is out of date" in capsys.readouterr().err
    assert build.main([]) == 0
    for path in build.OUTPUTS:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()


def test_there_are_five_that_know_each_other():
    boards = [load(name) for name in NAMES]
    assert list(BOARDS) == list(NAMES)
    assert [board["uid"] for board in boards] == [f"gradmon-{name}" for name in NAMES]
    assert len({board["title"] for board in boards}) == 5
    for board in boards:
        assert board["schemaVersion"] == 41
        assert board["tags"] == ["gradmon"]
        assert board["description"]
        others, runbook = board["links"]
        assert (others["type"], others["tags"], others["includeVars"], others["keepTime"]) == (
            "dashboards", ["gradmon"], True, True
        )  # fmt: skip
        assert runbook["url"] == RUNBOOK_URL


def test_it_is_what_the_schema_knows(dashboard):
    again = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    for annotation in dashboard["annotations"]["list"]:
        for key in UNTYPED:
            annotation.pop(key, None)
    assert again == dashboard


def test_variables_follow_each_other(dashboard):
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    names = list(variables)
    assert names[:3] == ["datasource", "cluster", "run"]
    assert variables["datasource"]["type"] == "datasource"
    assert (variables["cluster"]["includeAll"], variables["cluster"]["allValue"]) == (True, ".*")
    for name, variable in variables.items():
        assert variable["description"]
        if name == "datasource":
            continue
        assert variable["refresh"] == 2, "on every change of the time range"
        assert variable["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        used = re.findall(r"\$(\w+)", variable["query"]["query"])
        assert all(names.index(one) < names.index(name) for one in used if not one.startswith("__"))
    if "rank" in variables:
        assert "gradmon_rank_info" in variables["rank"]["query"]["query"]
        assert 'host=~"$host"' in variables["rank"]["query"]["query"]


def test_every_panel_says_what_it_shows(dashboard):
    for panel in panels(dashboard):
        title = panel["title"]
        assert panel["type"] in TYPES, title
        assert len(panel["description"]) > 20, title
        assert panel["description"].rstrip().endswith("."), title
        assert panel["datasource"]["uid"] == "${datasource}", title
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"]), title
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, title
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0, title


def test_ids_are_unique_and_nothing_overlaps(dashboard):
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)


def test_nothing_of_another_machine_is_left(dashboard):
    text = json.dumps(dashboard)
    assert not re.search(r"\$\{DS_|__inputs|localhost|127\.0\.0\.1|\"id\": null, \"uid\": null", text)
    assert "angular" not in text.lower()


def _thresholds(dashboard):
    for panel in panels(dashboard):
        config = panel["fieldConfig"]
        overridden = [p["value"] for o in config["overrides"] for p in o["properties"] if p["id"] == "thresholds"]
        for thresholds in [config["defaults"].get("thresholds"), *overridden]:
            for step in (thresholds or {"steps": []})["steps"]:
                if step["value"] is not None:
                    yield panel["title"], step["value"]


def test_thresholds_are_those_of_the_alerts(dashboard):
    shared = set(dataclasses.astuple(THRESHOLDS)) | NATURAL
    assert [found for found in _thresholds(dashboard) if found[1] not in shared] == []


@pytest.mark.parametrize(
    ("board", "panel", "name"),
    [
        ("fleet", "Runs, the worst first", "stuck_seconds"),
        ("fleet", "Runs, the worst first", "learning_rate_scale_ratio"),
        ("run", "Learning rate left", "learning_rate_scale_ratio"),
        ("ranks", "Slowest / median", "straggler_ratio"),
        ("ranks", "Waiting for data", "data_wait_ratio"),
        ("ranks", "Oldest heartbeat", "heartbeat_age_seconds"),
        ("ranks", "Longest without a step", "stuck_seconds"),
        ("gpu", "Fullest GPU", "gpu_memory_ratio"),
        ("gpu", "GPU memory at its fullest rank", "gpu_memory_ratio"),
        ("gpu", "Allocator retries", "allocator_retries"),
        ("gpu", "GPUs with most link errors", "nvlink_errors"),
        ("gpu", "Free memory of the hosts", "host_memory_available_ratio"),
    ],
)
def test_a_panel_has_its_alert_s_threshold(board, panel, name):
    assert (panel, getattr(THRESHOLDS, name)) in list(_thresholds(load(board)))


def test_links_to_the_runbook_are_of_alerts(dashboard):
    anchors = {alert.name.lower() for alert in rules.ALERTS}
    links = [link for panel in panels(dashboard) for link in panel.get("links", [])]
    assert links
    for link in links:
        address, _, anchor = link["url"].partition("#")
        assert address == RUNBOOK_URL
        assert anchor in anchors


def test_interventions_are_annotations(dashboard):
    annotations = {a["name"]: a for a in dashboard["annotations"]["list"]}
    assert "gradmon_actions_total" in annotations["Actions"]["expr"]
    assert "gradmon_events_total" in annotations["Events"]["expr"]
    for name in ("Actions", "Only watched", "Events", "Pages"):
        assert annotations[name]["datasource"]["uid"] == "${datasource}"
        # On the Fleet dashboard the marks of all runs would cover every chart.
        assert annotations[name]["enable"] is (dashboard["uid"] != "gradmon-fleet" or name == "Pages")
