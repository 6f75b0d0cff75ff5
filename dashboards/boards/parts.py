"""The panels of the dashboards: one function per panel type, so that all of them look and behave alike.

Every function returns a builder of grafana-foundation-sdk. Widths are in columns of Grafana's grid (24 in a row),
heights in its rows of 30 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    statushistory,
    table,
    text,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as dash
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import text as text_models
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from gradmon.rules import RUNBOOK_URL

#: The variable every panel takes its data from.
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

#: Colours by meaning, Grafana's names: the same thing has the same colour on every dashboard.
GOOD, NOTE, WARN, BAD, CALM, REST = "green", "blue", "orange", "red", "purple", "#7b8087"

#: (lower bound, colour); the first bound is None.
Steps = Sequence[tuple[float | None, str]]
OK: Steps = ((None, GOOD),)

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of its series (Grafana's `{{label}}`)."""

    expr: str
    name: str = ""


@dataclass(frozen=True)
class Line:
    """How one series of a time series panel looks."""

    color: str | None = None
    dash: bool = False
    width: float | None = None
    fill_to: str | None = None
    """Name of the series below, the space between them is filled: a band."""
    right: bool = False
    """On the right axis."""
    unit: str | None = None
    unnamed: bool = False
    """Left out of the legend."""


@dataclass(frozen=True)
class Column:
    """One column of a table. Without `expr` it shows the label `label`."""

    title: str
    expr: str = ""
    label: str = ""
    unit: str = "short"
    decimals: int | None = None
    steps: Steps | None = None
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """value -> (word, colour)"""
    gauge: bool = False
    top: float | None = None
    """Right end of the gauge."""
    width: int | None = None
    link: str = ""
    hidden: bool = False
    """The query is there for its labels; `label` is shown, not its value."""
    text: Mapping[str, str] = field(default_factory=dict)
    """text -> colour"""


def thresholds(steps: Steps) -> dash.ThresholdsConfig:
    """Absolute thresholds."""
    made = [Threshold(value=value, color=color) for value, color in steps]
    return dash.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def mapping(words: Mapping[str, tuple[str, str]]) -> ValueMap:
    """Values shown as words in colours."""
    return ValueMap(
        options={
            value: ValueMappingResult(text=word, color=color, index=i)
            for i, (value, (word, color)) in enumerate(words.items())
        }
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, cls=JSONEncoder))


def _fixed(color: str) -> dash.FieldColor:
    return dash.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(color)


def _by_steps() -> dash.FieldColor:
    return dash.FieldColor().mode(FieldColorModeId.THRESHOLDS)


def _dress(panel: Any, title: str, description: str, width: int, height: int, runbook: str) -> Any:
    panel.title(title).description(description).datasource(SOURCE).span(width).height(height)
    if runbook:
        link = dash.DashboardLink("What to do").type(DashboardLinkType.LINK).target_blank(True)
        panel.links([link.url(f"{RUNBOOK_URL}#{runbook.lower()}").tooltip(f"Runbook of the alert {runbook}")])
    return panel


def _targets(panel: Any, queries: Sequence[Query], *, instant: bool = False, as_table: bool = False) -> Any:
    for letter, query in zip(_LETTERS, queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).ref_id(letter).datasource(SOURCE)
        target = target.instant() if instant else target.range()
        target.format(PromQueryFormat.TABLE if as_table else PromQueryFormat.TIME_SERIES)
        if query.name:
            target.legend_format(query.name)
        panel.with_target(target)
    return panel


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    height: int = 8,
    look: Mapping[str, Line] | None = None,
    steps: Steps | None = None,
    log: bool = False,
    bars: bool = False,
    fill: int = 8,
    lowest: float | None = None,
    highest: float | None = None,
    legend: Sequence[str] = (),
    points: int | None = None,
    color: str | None = None,
    runbook: str = "",
) -> Any:
    """A time series panel; `steps` are drawn as dashed lines, `legend` names calculations (last, max, ...) shown in it.

    `points` bounds the points asked of Prometheus, for queries over every rank.
    """
    panel = _dress(timeseries.Panel(), title, description, width, height, runbook)
    _targets(panel, queries).unit(unit).line_width(2 if not bars else 1).fill_opacity(80 if bars else fill)
    panel.show_points(common_models.VisibilityMode.NEVER).span_nulls(False)
    panel.line_interpolation(common_models.LineInterpolation.LINEAR)
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    place = common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM)
    mode = common_models.LegendDisplayMode.LIST
    panel.legend(place.display_mode(mode).calcs(list(legend)))
    if bars:
        panel.draw_style(common_models.GraphDrawStyle.BARS)
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    if log:
        panel.scale_distribution(common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10))
    if steps is not None:
        panel.thresholds(thresholds(steps))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED))
    if lowest is not None or bars:
        panel.min(lowest or 0)
    if highest is not None:
        panel.max(highest)
    if points is not None:
        panel.max_data_points(points)
    if color is not None:
        panel.color_scheme(_fixed(color))
    for name, line in (look or {}).items():
        panel.override_by_name(name, _line_overrides(line))
    return panel


def _line_overrides(line: Line) -> list[DynamicConfigValue]:
    made = []
    if line.color is not None:
        made.append(DynamicConfigValue("color", {"mode": "fixed", "fixedColor": line.color}))
    if line.dash:
        made.append(DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}))
        made.append(DynamicConfigValue("custom.fillOpacity", 0))
    if line.width is not None:
        made.append(DynamicConfigValue("custom.lineWidth", line.width))
    if line.fill_to is not None:
        made.append(DynamicConfigValue("custom.fillBelowTo", line.fill_to))
        made.append(DynamicConfigValue("custom.fillOpacity", 18))
    if line.right:
        made.append(DynamicConfigValue("custom.axisPlacement", "right"))
    if line.unnamed:
        made.append(DynamicConfigValue("custom.hideFrom", {"legend": True, "tooltip": False, "viz": False}))
    if line.unit is not None:
        made.append(DynamicConfigValue("unit", line.unit))
    return made


def number(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 3,
    height: int = 4,
    steps: Steps = OK,
    words: Mapping[str, tuple[str, str]] | None = None,
    decimals: int | None = None,
    spark: bool = True,
    instant: bool = False,
    empty: str = "-",
    runbook: str = "",
) -> Any:
    """A stat panel: one number, coloured by `steps`, with a line of how it went."""
    panel = _dress(stat.Panel(), title, description, width, height, runbook)
    _targets(panel, [query], instant=instant).unit(unit).thresholds(thresholds(steps)).color_scheme(_by_steps())
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.color_mode(common_models.BigValueColorMode.VALUE).no_value(empty)
    panel.graph_mode(
        common_models.BigValueGraphMode.AREA if spark and not instant else common_models.BigValueGraphMode.NONE
    )
    panel.max_data_points(100)
    if words:
        panel.mappings([mapping(words)]).graph_mode(common_models.BigValueGraphMode.NONE)
        panel.color_mode(common_models.BigValueColorMode.BACKGROUND)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def grid(
    title: str,
    description: str,
    *columns: Column,
    sort: str,
    width: int = 24,
    height: int = 9,
    ascending: bool = False,
    empty: str = "-",
    runbook: str = "",
) -> Any:
    """A table, one query per column with `expr`, joined by their labels and sorted by the column `sort`."""
    panel = _dress(table.Panel(), title, description, width, height, runbook)
    asked = [column for column in columns if column.expr]
    _targets(panel, [Query(column.expr) for column in asked], instant=True, as_table=True)
    values = {c.title: "Value" if len(asked) == 1 else f"Value #{_LETTERS[i]}" for i, c in enumerate(asked)}
    fields = {c.title: c.label if c.hidden or not c.expr else values[c.title] for c in columns}
    if len(asked) > 1:
        panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    order = {name: i for i, name in enumerate(fields.values())}
    keep = {"include": {"names": list(fields.values())}}
    panel.with_transformation(DataTransformerConfig(id_val="filterFieldsByName", options=keep))
    renamed = {name: title for title, name in fields.items()}
    options = {"excludeByName": {}, "indexByName": order, "renameByName": renamed}
    panel.with_transformation(DataTransformerConfig(id_val="organize", options=options))
    panel.unit("short").align(common_models.FieldTextAlignment.AUTO).thresholds(thresholds(OK)).cell_height(
        common_models.TableCellHeight.SM
    )
    panel.sort_by([common.TableSortByFieldState().display_name(sort).desc(not ascending)]).no_value(empty)
    for column in columns:
        made = _column_overrides(column)
        if made:
            panel.override_by_name(column.title, made)
    return panel


def _column_overrides(column: Column) -> list[DynamicConfigValue]:
    made = []
    if column.expr and not column.hidden:
        made.append(DynamicConfigValue("unit", column.unit))
        made.append(DynamicConfigValue("custom.align", "right" if not column.words else "left"))
    if column.decimals is not None:
        made.append(DynamicConfigValue("decimals", column.decimals))
    words = column.words or {text: (text, color) for text, color in column.text.items()}
    if words:
        made.append(DynamicConfigValue("mappings", [_plain(mapping(words))]))
        made.append(DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}))
    if column.steps is not None:
        steps = [{"value": value, "color": color} for value, color in column.steps]
        made.append(DynamicConfigValue("thresholds", {"mode": "absolute", "steps": steps}))
        if not column.gauge:
            made.append(DynamicConfigValue("custom.cellOptions", {"type": "color-text"}))
    if column.gauge:
        made.append(DynamicConfigValue("custom.cellOptions", {"type": "gauge", "mode": "basic"}))
        made.append(DynamicConfigValue("min", 0))
    if column.top is not None:
        made.append(DynamicConfigValue("max", column.top))
    if column.width is not None:
        made.append(DynamicConfigValue("custom.width", column.width))
    if column.link:
        link = {"title": f"Open {column.title.lower()}", "url": column.link, "targetBlank": False}
        made.append(DynamicConfigValue("links", [link]))
    return made


def heat(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 24,
    height: int = 10,
    scheme: str = "Turbo",
    axis: str = "",
    decimals: int | None = None,
    lowest: float | None = None,
    highest: float | None = None,
    points: int = 120,
) -> Any:
    """A heatmap with one row per series and its value as colour; Grafana 11 to 13 keep the order of the series."""
    panel = _dress(heatmap.Panel(), title, description, width, height, "")
    _targets(panel, [query]).max_data_points(points)
    color = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme(scheme)
    color.scale(heatmap_models.HeatmapColorScale.LINEAR).exponent(0.5).steps(64).reverse(False).fill("dark-orange")
    if lowest is not None:
        color.min(lowest)
    if highest is not None:
        color.max(highest)
    y_axis = heatmap.YAxisConfig().axis_placement(common_models.AxisPlacement.LEFT).reverse(True).axis_label(axis)
    cells = heatmap.CellValues().unit(unit)
    if decimals is not None:
        cells.decimals(decimals)
    panel.calculate(False).color(color).y_axis(y_axis).cell_values(cells).cell_gap(0).unit(unit)
    # Values below 0 are logarithms and must show; the default hides all that is not above 0.
    panel.filter_values(heatmap.FilterValueRange().le(-1e9)).show_value(common_models.VisibilityMode.NEVER)
    panel.mode(common_models.TooltipDisplayMode.SINGLE).show_y_histogram()
    return panel.hide_from(common.HideSeriesConfig().tooltip(False).legend(False).viz(False))


def states(
    title: str,
    description: str,
    query: Query,
    words: Mapping[str, tuple[str, str]],
    *,
    width: int = 24,
    height: int = 7,
) -> Any:
    """A state timeline: one row per series, its value shown as a word in a colour."""
    panel = _dress(statetimeline.Panel(), title, description, width, height, "")
    _targets(panel, [query]).mappings([mapping(words)]).color_scheme(_by_steps()).thresholds(thresholds(OK))
    panel.show_value(common_models.VisibilityMode.AUTO).merge_values(True).row_height(0.85).fill_opacity(80)
    panel.line_width(0).align_value(common_models.TimelineValueAlignment.LEFT).unit("short").max_data_points(400)
    legend = common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM)
    return panel.legend(legend.display_mode(common_models.LegendDisplayMode.LIST).calcs([]))


def history(
    title: str,
    description: str,
    unit: str,
    query: Query,
    steps: Steps,
    *,
    width: int = 12,
    height: int = 8,
    points: int = 60,
    runbook: str = "",
) -> Any:
    """A status history: one row per series, one cell per moment, coloured by `steps`."""
    panel = _dress(statushistory.Panel(), title, description, width, height, runbook)
    _targets(panel, [query]).unit(unit).color_scheme(_by_steps()).thresholds(thresholds(steps)).max_data_points(points)
    panel.show_value(common_models.VisibilityMode.NEVER).row_height(0.85).col_width(0.9).fill_opacity(85).line_width(0)
    legend = common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM)
    return panel.legend(legend.display_mode(common_models.LegendDisplayMode.LIST).calcs([]))


def bars(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    steps: Steps = OK,
    width: int = 8,
    height: int = 8,
    decimals: int | None = None,
    lowest: float | None = 0,
    highest: float | None = None,
    runbook: str = "",
) -> Any:
    """A bar gauge of an instant query: the longest bar is the worst one."""
    panel = _dress(bargauge.Panel(), title, description, width, height, runbook)
    _targets(panel, [query], instant=True).unit(unit).thresholds(thresholds(steps)).color_scheme(_by_steps())
    panel.orientation(common_models.VizOrientation.HORIZONTAL).no_value("none")
    panel.display_mode(common_models.BarGaugeDisplayMode.GRADIENT).show_unfilled(True)
    panel.value_mode(common_models.BarGaugeValueMode.COLOR).name_placement(common_models.BarGaugeNamePlacement.LEFT)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    if decimals is not None:
        panel.decimals(decimals)
    if lowest is not None:
        panel.min(lowest)
    if highest is not None:
        panel.max(highest)
    return panel


def words(title: str, description: str, content: str, *, width: int = 8, height: int = 8) -> Any:
    """A text panel, in Markdown."""
    panel = _dress(text.Panel(), title, description, width, height, "")
    return panel.mode(text_models.TextMode.MARKDOWN).content(content)
