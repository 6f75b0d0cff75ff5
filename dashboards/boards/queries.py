"""The queries of a dashboard as Grafana would send them: variables resolved from a Prometheus, and put in."""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Values = Mapping[str, str | Sequence[str]]
ALL = "$__all"
#: What Grafana computes; in seconds, for 15 s between scrapes and a step of 15 s.
DEFAULTS = {"__interval": "15s", "__rate_interval": "60s", "__range": "3600s", "__range_s": "3600"}

_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")
_LABEL_VALUES = re.compile(r"label_values\((?:(.+),\s*)?(\w+)\)\s*", re.DOTALL)
_QUERY_RESULT = re.compile(r"query_result\((.+)\)\s*", re.DOTALL)
#: RE2's special characters; '-' and the like need no backslash, and PromQL knows none of Python's others.
_SPECIAL = re.compile(r"([\\^$.*+?()\[\]{}|])")


class PanelQuery(NamedTuple):
    """One expression of one panel."""

    panel: str
    """Title of the panel."""
    expr: str
    """With all variables put in."""
    instant: bool
    points: int | None = None
    """Of a range: at most so many are asked for; None: as many as the panel has pixels."""


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All panels that show something, so without the rows' headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_queries(dashboard: Mapping[str, Any], values: Values | None = None) -> list[PanelQuery]:
    """Every query of every panel.

    Args:
        dashboard: a dashboard as in its JSON file.
        values: of the variables, as `resolve` gives them; `$__interval` and its kin may be among them. By default all
            clusters, runs, hosts and ranks.
    """
    given = dict(values) if values is not None else defaults(dashboard)
    return [
        PanelQuery(
            panel["title"], put_in(target["expr"], given), bool(target.get("instant")), panel.get("maxDataPoints")
        )
        for panel in panels(dashboard)
        for target in panel.get("targets", [])
    ]


def annotation_queries(dashboard: Mapping[str, Any], values: Values | None = None) -> list[PanelQuery]:
    """The queries behind the annotations, all over a range."""
    given = dict(values) if values is not None else defaults(dashboard)
    return [
        PanelQuery(annotation["name"], put_in(annotation["expr"], given), False)
        for annotation in dashboard["annotations"]["list"]
        if "expr" in annotation
    ]


def defaults(dashboard: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:
    """Values that need no Prometheus: everything, and a heatmap row for each 100 ranks."""
    every = {variable["name"]: ".*" for variable in dashboard["templating"]["list"]}
    return {**every, "drop": ".."}


def put_in(expr: str, values: Values) -> str:
    """The expression with its variables' values.

    Raises:
        ValueError: a variable has no value.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name.isdigit():  # $1 of a label_replace
            return match.group(0)
        found = values.get(name, DEFAULTS.get(name))
        if found is None:
            raise ValueError(f"${name} has no value in {expr!r}")
        if isinstance(found, str):
            return found
        # In a PromQL string a backslash stands twice.
        escaped = [_SPECIAL.sub(r"\\\\\1", one) for one in found]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return _VARIABLE.sub(value, expr)


def resolve(
    dashboard: Mapping[str, Any], prometheus: str, start: float, end: float, chosen: Values | None = None
) -> dict[str, str | Sequence[str]]:
    """The variables' values as Grafana would find them in a Prometheus between two times (Unix seconds).

    Args:
        dashboard: a dashboard as in its JSON file.
        prometheus: its address.
        start: of the range of time shown.
        end: of it.
        chosen: values picked by hand; the first one, or All, of the others.
    """
    values: dict[str, str | Sequence[str]] = dict(chosen or {})
    values.setdefault("__range", f"{max(1, round(end - start))}s")
    values.setdefault("__range_s", f"{max(1, round(end - start))}")
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        if name in values:
            continue
        if variable["type"] == "datasource":
            values[name] = prometheus
        elif variable.get("includeAll") and variable.get("allValue"):
            values[name] = variable["allValue"]
        else:
            found = _options(variable, put_in(variable["query"]["query"], values), prometheus, start, end)
            values[name] = found if variable.get("includeAll") else (found[0] if found else "")
    return values


def _options(variable: Mapping[str, Any], query: str, prometheus: str, start: float, end: float) -> list[str]:
    labels = _LABEL_VALUES.fullmatch(query)
    if labels is not None:
        span = {"match[]": labels.group(1), "start": f"{start:.3f}", "end": f"{end:.3f}"}
        found = [str(one) for one in ask(prometheus, f"/api/v1/label/{labels.group(2)}/values", span)]
    else:
        result = _QUERY_RESULT.fullmatch(query)
        if result is None:
            raise ValueError(f"variable {variable['name']}: neither label_values() nor query_result(): {query!r}")
        answer = ask(prometheus, "/api/v1/query", {"query": result.group(1), "time": f"{end:.3f}"})["result"]
        texts = ["{" + ",".join(f'{k}="{v}"' for k, v in one["metric"].items()) + "}" for one in answer]
        pattern = re.compile(variable["regex"].strip("/"))
        found = [match.group(1) for text in texts if (match := pattern.search(text)) is not None]
    return sorted(found, key=lambda text: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)])


def ask(prometheus: str, path: str, parameters: Mapping[str, str]) -> Any:
    """What Prometheus answers, its `data`.

    Raises:
        ValueError: it refuses, with its words and the query.
    """
    request = urllib.request.Request(
        prometheus.rstrip("/") + path, data=urllib.parse.urlencode(parameters).encode() if "query" in path else None
    )
    if request.data is None:
        request.full_url += "?" + urllib.parse.urlencode(parameters)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["data"]
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace")
        raise ValueError(f"{words} in {parameters.get('query', path)}") from None
