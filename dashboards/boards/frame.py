"""What all dashboards share: variables, links, annotations, and how panels lie on the grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard as dash
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from boards.parts import BAD, CALM, NOTE, SOURCE, WARN
from gradmon.rules import RUNBOOK_URL

TAG = "gradmon"
#: Selectors in every query. An empty `cluster` (no such label) is matched by All.
RUN = 'cluster=~"$cluster",run=~"$run"'
#: Rank 0 speaks for all where they go in step, which spares a look at thousands.
FIRST = f'{RUN},rank="0"'
RANK = f'{RUN},rank=~"$rank"'
HOST = 'cluster=~"$cluster",host=~"$host"'

#: Names of the variables a dashboard has besides the data source and the cluster.
RUNS, ONE_RUN, HOSTS, RANKS, GROUPS = "runs", "run", "host", "rank", "drop"


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of (title, panels)."""

    name: str
    title: str
    description: str
    variables: Sequence[str]
    rows: Callable[[], Sequence[tuple[str, Sequence[Any]]]]
    marked: bool = True
    """Actions and events are marked on every chart from the start; where many runs are shown, only pages are."""

    @property
    def uid(self) -> str:
        """Grafana's identifier, also in its URL."""
        return f"gradmon-{self.name}"


def living(metric: str, selector: str = RUN) -> str:
    """The series of agents on whose node ranks of the run live.

    After a requeue on other nodes the old agent exports its last values for an hour; gradmon_world_size it does not.
    """
    return f"({metric}{{{selector}}} and on (job, instance, run) gradmon_world_size{{{RUN}}})"


def of_run(metric: str) -> str:
    """A value that is equal on all ranks, one series per run."""
    return f"max by (cluster, run) {living(metric)}"


def peak(metric: str, selector: str = RUN) -> str:
    """The largest value since the step before, so that no spike falls between two points."""
    return (
        f"(max_over_time({metric}{{{selector}}}[$__rate_interval]) "
        f"and on (job, instance, run) gradmon_world_size{{{RUN}}})"
    )


def ranked(metric: str) -> str:
    """Series per rank, of the chosen ranks that agents with living ranks export."""
    return living(metric, RANK)


def build(board: Board) -> str:
    """The dashboard as Grafana imports it: JSON with two spaces, the same text for the same content."""
    builder = dash.Dashboard(board.title).uid(board.uid).description(board.description).tags([TAG])
    builder.timezone("browser").editable().refresh("30s").time("now-1h", "now").tooltip(DashboardCursorSync.CROSSHAIR)
    for variable in _variables(board.variables):
        builder.with_variable(variable)
    for link in _links():
        builder.link(link)
    for annotation in _annotations(board.marked):
        builder.annotation(annotation)
    for title, panels in board.rows():
        builder.with_row(dash.Row(title))
        for panel in panels:
            builder.with_panel(panel)
    made = builder.build()
    for number, panel in enumerate(made.panels or [], start=1):
        panel.id_val = number
    content = json.loads(json.dumps(made, cls=JSONEncoder))
    _finish(content)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


#: What the SDK's types lack and Grafana reads: titles of annotations, and what is not taken over from a link.
ANNOTATION_WORDS = {
    "Actions": ("{{action}}: {{reason}}", "gradmon: {{action}} because of {{reason}} in run {{run}}"),
    "Only watched": ("would {{action}}: {{reason}}", "gradmon only watches; it would {{action}} because of {{reason}}"),
    "Events": ("{{kind}}", "{{kind}} in run {{run}}"),
}


def _finish(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]["list"]:
        if annotation["name"] in ANNOTATION_WORDS:
            title, text = ANNOTATION_WORDS[annotation["name"]]
            annotation.update(titleFormat=title, textFormat=text, tagKeys="run", step="10s")
    for variable in content["templating"]["list"]:
        variable["skipUrlSync"] = variable["name"] == GROUPS


def _variables(names: Sequence[str]) -> list[Any]:
    made: list[Any] = [
        dash.DatasourceVariable("datasource").label("Data source").type("prometheus").description("A Prometheus"),
        _query(
            "cluster", "Cluster", "label_values(gradmon_run_info, cluster)", "Label the scrape configuration sets"
        ).all_value(".*"),
    ]
    info = f"gradmon_rank_info{{{RUN}"
    for name in names:
        if name == RUNS:
            query = 'label_values(gradmon_run_info{cluster=~"$cluster"}, run)'
            made.append(_query("run", "Run", query, "Training runs by name").all_value(".+"))
        elif name == ONE_RUN:
            query = 'label_values(gradmon_run_info{cluster=~"$cluster"}, run)'
            made.append(_query("run", "Run", query, "The training run to look at", several=False))
        elif name == HOSTS:
            query = f"label_values({info}}}, host)"
            made.append(_query("host", "Host", query, "Nodes the run has ranks on").sort(VariableSort.NATURAL_ASC))
        elif name == RANKS:
            query = f'label_values({info},host=~"$host"}}, rank)'
            ranks = _query("rank", "Rank", query, "Ranks of the run on the chosen hosts")
            made.append(ranks.sort(VariableSort.NUMERICAL_ASC))
        elif name == GROUPS:
            made.append(_groups())
    return made


def _query(name: str, label: str, query: str, description: str, *, several: bool = True) -> Any:
    variable = dash.QueryVariable(name).label(label).description(description).datasource(SOURCE)
    variable.query({"query": query, "refId": f"{name}-variable"}).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    variable.sort(VariableSort.NATURAL_ASC)
    if several:
        variable.multi(True).include_all(True).current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    return variable


def _groups() -> Any:
    """Digits to cut off a rank's number, so that a heatmap has 100 rows at most: 1 from 100 ranks on, 2 from 1,000."""
    expr = f"topk(1, max by (world_size) (last_over_time(gradmon_run_info{{{RUN}}}[$__range])))"
    for size, cut in ((".*", "()"), ("...", "."), ("....", ".."), (".....", "...")):
        expr = f'label_replace({expr}, "drop", "{cut}", "world_size", "{size}")'
    variable = _query(GROUPS, "Digits cut", f"query_result({expr})", "Chosen by the number of ranks", several=False)
    return variable.regex('/drop="([^"]*)"/').hide(VariableHide.HIDE_VARIABLE)


def _links() -> list[Any]:
    boards = dash.DashboardLink("gradmon").type(DashboardLinkType.DASHBOARDS).tags([TAG]).include_vars(True)
    runbook = dash.DashboardLink("Runbook").type(DashboardLinkType.LINK).icon("doc").target_blank(True)
    return [
        boards.keep_time(True).tooltip("The other dashboards, with the same run and time").icon("dashboard"),
        runbook.url(RUNBOOK_URL).tooltip("What each alert means and what to do"),
    ]


def _annotations(marked: bool) -> list[Any]:
    builtin = dash.AnnotationQuery().name("Annotations & Alerts").built_in(1).hide(True).enable(True)
    builtin.datasource(DataSourceRef(type_val="datasource", uid="grafana")).icon_color("rgba(0, 211, 255, 1)")
    made = [builtin.type("dashboard")]
    actions, events = f"gradmon_actions_total{{{RUN}", f"gradmon_events_total{{{RUN}"
    for name, color, counter, labels in (
        ("Actions", NOTE, f'{actions},applied="yes"}}', "run, action, reason"),
        ("Only watched", CALM, f'{actions},applied="no"}}', "run, action, reason"),
        ("Events", WARN, f"{events}}}", "run, kind"),
    ):
        expr = grown(counter, labels)
        one = dash.AnnotationQuery().name(name).enable(marked).hide(False).icon_color(color).datasource(SOURCE)
        made.append(one.expr(expr))
    firing = f'max by (run, alertname) (ALERTS{{alertstate="firing",severity="page",{RUN}}})'
    alerts = dash.AnnotationQuery().name("Pages").enable(True).hide(False).icon_color(BAD).datasource(SOURCE)
    made.append(alerts.expr(firing))
    return made


def grown(counter: str, labels: str) -> str:
    """By how much a counter grew since the step before: exact, where increase() extrapolates and loses the seams."""
    return f"sum by ({labels}) ({counter}) - sum by ({labels}) ({counter} offset $__interval) > 0"
