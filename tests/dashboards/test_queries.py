"""The dashboards' PromQL, read by a parser: only names and labels that exist, and variables put in as Grafana does."""

from __future__ import annotations

import re

import promql_parser
import pytest
from boards.queries import annotation_queries, panel_queries, panels, put_in
from committed import NAMES

from gradmon.metrics import METRICS_BY_NAME
from gradmon.rules import ALERTS, recorded_names

#: Put on by Prometheus and the scrape configuration.
TARGET = {"cluster", "job", "instance"}
#: Prometheus' own series -> their labels.
OTHERS = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity", "run"}}


def _walk(node):
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        below = getattr(node, name, None)
        if below is not None:
            yield from _walk(below)
    for below in getattr(node, "args", []):
        yield from _walk(below)


def _checked(expr: str) -> set[str]:
    """The labels a query may speak of; each selector is checked on the way."""
    labels = set(TARGET)
    for node in _walk(promql_parser.parse(expr)):
        if isinstance(node, promql_parser.VectorSelector):
            name = node.name
            known = OTHERS.get(name)
            if known is None:
                assert name in METRICS_BY_NAME or name in recorded_names(), f"{name} in {expr}"
                known = set(METRICS_BY_NAME[name].labels) if name in METRICS_BY_NAME else {"run"}
            for matcher in node.matchers.matchers:
                assert matcher.name in known | TARGET, f"{matcher.name} of {name} in {expr}"
            labels |= known
        elif isinstance(node, promql_parser.Call) and node.func.name == "label_replace":
            labels.add(node.args[1].val)
    for node in _walk(promql_parser.parse(expr)):
        modifier = getattr(node, "modifier", None)
        wanted = getattr(modifier, "labels", None) or getattr(getattr(modifier, "matching", None), "labels", None)
        assert set(wanted or ()) <= labels, f"{wanted} in {expr}"
    return labels


def test_queries_use_what_exists(dashboard):
    queries = panel_queries(dashboard) + annotation_queries(dashboard)
    assert len(queries) > 10
    for query in queries:
        _checked(query.expr)
    for panel in panels(dashboard):
        for target in panel["targets"]:
            named = re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))
            labels = _checked(put_in(target["expr"], dict.fromkeys(_names(dashboard), "x")))
            assert set(named) <= labels, panel["title"]


def _names(dashboard):
    return [variable["name"] for variable in dashboard["templating"]["list"]]


@pytest.mark.parametrize(
    "expr", ["gradmon_gone", 'gradmon_grad_norm{rank="0"}', "sum by (layer) (gradmon_loss)", "sum(gradmon_loss"]
)
def test_a_query_of_what_does_not_exist_is_found(expr):
    with pytest.raises((AssertionError, ValueError)):
        _checked(expr)


def test_every_query_is_of_the_chosen_runs(dashboard):
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for node in _walk(promql_parser.parse(put_in(target["expr"], dict.fromkeys(_names(dashboard), "x")))):
                if isinstance(node, promql_parser.VectorSelector):
                    chosen = {matcher.name for matcher in node.matchers.matchers}
                    assert "cluster" in chosen, panel["title"]
                    assert chosen & {"run", "host"} or node.name.startswith(("up", "gradmon_agent")), panel["title"]


def test_table_columns_come_from_their_queries(dashboard):
    for panel in panels(dashboard):
        if panel["type"] != "table":
            continue
        organize = next(t for t in panel["transformations"] if t["id"] == "organize")["options"]
        several = len(panel["targets"]) > 1
        values = {f"Value #{target['refId']}" if several else "Value" for target in panel["targets"]}
        labels = set.union(*(_checked(q.expr) for q in panel_queries({**dashboard, "panels": [panel]})))
        assert set(organize["renameByName"]) <= values | labels, panel["title"]
        titles = set(organize["renameByName"].values())
        assert {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]} <= titles
        assert panel["options"]["sortBy"][0]["displayName"] in titles


def test_alerts_name_dashboards_that_exist():
    assert {alert.board for alert in ALERTS} <= {f"gradmon-{name}" for name in NAMES}


def test_values_are_put_in_as_grafana_does():
    assert put_in('a{run=~"$run"}[$__rate_interval]', {"run": ["x"]}) == 'a{run=~"x"}[60s]'
    assert put_in('a{run=~"${run:regex}"}', {"run": ["x.1", "y"]}) == 'a{run=~"(x\\\\.1|y)"}'
    assert put_in('a{run=~"$run"}', {"run": ".*"}) == 'a{run=~".*"}'
    assert put_in('label_replace(a, "b", "$1", "c", "(.*)")', {}) == 'label_replace(a, "b", "$1", "c", "(.*)")'
    with pytest.raises(ValueError, match=r"\$nobody has no value"):
        put_in("$nobody", {})
