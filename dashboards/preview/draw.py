"""Draws a dashboard with data from a Prometheus into one picture, so that a person sees what they will get.

    python dashboards/preview/draw.py --prometheus http://127.0.0.1:9090 --dashboard run --var run=demo --out run.png

It is not Grafana: the panels' types, places, units, colours, thresholds, legends and annotations are drawn as the JSON
says, with uPlot, the library Grafana itself draws with. It needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "dashboards"), str(ROOT)]

from boards.queries import ask, put_in, resolve  # noqa: E402

_UPLOT = ROOT / "gradmon" / "agent" / "static"
_SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
#: Steps Grafana rounds to, in seconds.
_STEPS = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
#: Pixels: of the picture, and of one column of the grid, for the points a panel asks for.
WIDTH = 1600
_COLUMN = WIDTH // 24


def gather(
    dashboard: Mapping[str, Any],
    prometheus: str,
    start: float,
    end: float,
    *,
    chosen: Mapping[str, str | Sequence[str]] | None = None,
    scrape: float = 15.0,
) -> dict[str, Any]:
    """Everything the page draws: the dashboard, its variables, and what Prometheus says to each query.

    Args:
        dashboard: as in its JSON file.
        prometheus: its address.
        start: Unix time of the left edge.
        end: Unix time of the right edge.
        chosen: values of variables; the others as Grafana would choose them.
        scrape: seconds between two scrapes, for $__rate_interval.

    Raises:
        ValueError: Prometheus refuses a query.
    """
    values = resolve(dashboard, prometheus, start, end, chosen)
    results = {}
    for panel in dashboard["panels"]:
        width = panel["gridPos"]["w"] * _COLUMN
        step = _step((end - start) / panel.get("maxDataPoints", width), scrape)
        with_step = {**values, "__interval": f"{step}s", "__rate_interval": f"{max(step + scrape, 4 * scrape):g}s"}
        results[str(panel["id"])] = [
            _result(target, with_step, prometheus, start, end, step) for target in panel.get("targets", [])
        ]
    events = []
    step = _step((end - start) / 200, scrape)
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation and annotation["enable"]:
            found = _result(annotation, {**values, "__interval": f"{step}s"}, prometheus, start, end, step)
            regions = [region for one in found["series"] for region in _regions(one["values"], step)]
            events.append({"name": annotation["name"], "color": annotation["iconColor"], "regions": regions})
    shown = {v["name"]: _words(v, values) for v in dashboard["templating"]["list"] if v.get("hide") != 2}
    return {
        "dashboard": dashboard,
        "results": results,
        "events": events,
        "variables": shown,
        "start": start,
        "end": end,
    }


def _regions(values: Sequence[tuple[float, str]], step: float) -> list[list[float]]:
    """First and last time of each stretch above 0, as Grafana makes one annotation of it."""
    regions: list[list[float]] = []
    for at in (float(t) for t, value in values if float(value) > 0):
        if regions and at - regions[-1][1] <= step:
            regions[-1][1] = at
        else:
            regions.append([at, at])
    return regions


def _step(seconds: float, scrape: float) -> int:
    wanted = max(seconds, scrape)
    return next((step for step in _STEPS if step >= wanted), math.ceil(wanted))


def _result(
    target: Mapping[str, Any], values: Mapping[str, Any], prometheus: str, start: float, end: float, step: int
) -> dict[str, Any]:
    query = put_in(target["expr"], values)
    if target.get("instant"):
        series = ask(prometheus, "/api/v1/query", {"query": query, "time": f"{end:.3f}"})["result"]
    else:
        # Grafana aligns a range to its step.
        first, last = math.floor(start / step) * step, math.floor(end / step) * step
        span = {"query": query, "start": str(first), "end": str(last), "step": str(step)}
        series = ask(prometheus, "/api/v1/query_range", span)["result"]
    return {"series": series, "step": step}


def _words(variable: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    value = values[variable["name"]]
    if variable["type"] == "datasource":
        text = "Prometheus"
    elif variable.get("includeAll"):
        text = "All" if not isinstance(value, str) or value in (".*", ".+") else value
    else:
        text = str(value)
    return {"label": variable["label"], "text": text}


def page(data: Mapping[str, Any]) -> str:
    """The whole page as one text: nothing is fetched from anywhere."""
    content = json.dumps(data).replace("<", "\\u003c")
    # A page of its own origin may not read files, so styles and scripts stand in it.
    style = (_UPLOT / "uPlot.min.css").read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8")
    scripts = [(_UPLOT / "uPlot.iife.min.js"), *(HERE / name for name in ("values.js", "charts.js", "page.js"))]
    code = "\n".join(script.read_text(encoding="utf-8") for script in scripts)
    logo = base64.b64encode((_UPLOT / "favicon.svg").read_bytes()).decode()
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><style>{style}</style></head><body>'
        f'<img id="logo" src="data:image/svg+xml;base64,{logo}" alt=""><div id="page"></div>'
        f"<script>const DATA = {content};</script><script>{code}</script></body></html>"
    )


class View(NamedTuple):
    """What a page showed."""

    drawn: int
    """Number of panels."""
    empty: list[str]
    """Titles of those without data."""
    complaints: list[str]
    """Of the browser."""


def shoot(html: str, picture: Path, chromium: str, *, width: int = WIDTH, scale: float = 1.0) -> View:
    """Screenshot of a page.

    Raises:
        RuntimeError: a panel could not be drawn.
    """
    from playwright.sync_api import sync_playwright  # needed here only

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_SWITCHES))
        context = browser.new_context(
            viewport={"width": width, "height": 1000}, device_scale_factor=scale, offline=True, color_scheme="dark"
        )
        view = context.new_page()
        view.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.set_content(html)
        view.wait_for_function("window.DRAWN !== undefined", timeout=30_000)
        drawn, failed = view.evaluate("window.DRAWN")
        if failed:
            raise RuntimeError("; ".join(failed))
        view.screenshot(path=picture, full_page=True)
        empty = view.evaluate("[...document.querySelectorAll('.none')].map((e) => e.parentElement.panel.title)")
        browser.close()
    return View(drawn, empty, complaints)


def main(arguments: list[str] | None = None) -> int:
    """Draw one picture; 1 if that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prometheus", required=True, help="its address")
    parser.add_argument("--dashboard", required=True, help="fleet, run, ranks, layers or gpu")
    parser.add_argument("--var", action="append", default=[], metavar="NAME=VALUE", help="value of a variable")
    parser.add_argument("--from", dest="start", type=float, help="Unix time; an hour before --to by default")
    parser.add_argument("--to", dest="end", type=float, help="Unix time; now by default")
    parser.add_argument("--scrape", type=float, default=15.0, help="seconds between two scrapes")
    parser.add_argument("--scale", type=float, default=1.0, help="pixels per pixel")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png")
    options = parser.parse_args(arguments)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("no Chromium is installed; cure: sudo apt install chromium", file=sys.stderr)
        return 1
    file = ROOT / "dashboards" / f"{options.dashboard}.json"
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    end = options.end if options.end is not None else time.time()
    start = options.start if options.start is not None else end - 3600
    chosen = dict(one.split("=", 1) for one in options.var)
    try:
        data = gather(dashboard, options.prometheus, start, end, chosen=chosen, scrape=options.scrape)
        view = shoot(page(data), options.out, chromium, scale=options.scale)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    for complaint in view.complaints:
        print(complaint, file=sys.stderr)
    return 1 if view.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
