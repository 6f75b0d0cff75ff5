"""One real Prometheus watches simulated agents of many nodes: what it holds, what the rules and the dashboards cost.

Scraped, evaluated and asked as in production, all on this machine. Prometheus is first given most of an hour of
history, so that windows of rules are full and dashboards have something to show. It lies in its head, as the last hours
do in production: the same look back is dearer from blocks on disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "fleet"), str(ROOT / "dashboards")]

from boards import panel_queries, resolve  # noqa: E402
from simulate import FleetServer, History, SimulatedRun, fill_head  # noqa: E402

from gradmon import rules  # noqa: E402
from gradmon.metrics import METRICS_BY_NAME  # noqa: E402
from gradmon.stack.servers import Server, ServerError, start_prometheus, write_yaml  # noqa: E402

RANKS_PER_NODE = 8
#: What must hold at the largest size.
RULE_SECONDS, PANEL_SECONDS, PANEL_SERIES = 1.0, 2.0, 100
#: A dashboard's range, and the least step Grafana takes for it; a panel that asks for fewer points has a larger one.
SHOWN_SECONDS, STEP_SECONDS = 3600.0, 15.0
#: Prometheus takes samples of the last hour into its head; most rules look back half as far.
HISTORY_SECONDS, RULES_SECONDS = 3300.0, 2100.0
#: Rules that are evaluated every minute are so every 20 s here, to see them several times.
SLOW_SECONDS = 20


@dataclass(frozen=True)
class Setting:
    """What is watched, and how often."""

    nodes: int
    scrape: int
    """Seconds between scrapes, and between evaluations of the fastest rules."""
    runs: int = 1
    panels: bool = False
    """Whether the dashboards are asked too, after an hour of history."""

    def __str__(self) -> str:
        runs = f", {self.runs} runs" if self.runs > 1 else ""
        return f"{self.nodes} x {RANKS_PER_NODE}, every {self.scrape} s{runs}"


@dataclass(frozen=True)
class Panel:
    """One query of one panel."""

    name: str
    series: int
    seconds: float
    error: str = ""


@dataclass
class Result:
    """What was measured of a setting."""

    setting: Setting
    series: float = 0.0
    scraped: float = 0.0
    samples_per_second: float = 0.0
    resident_bytes: float = 0.0
    cores: float = 0.0
    failed_scrapes: float = 0.0
    groups: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rules: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    broken_rules: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    @property
    def rule_seconds(self) -> float:
        """All groups evaluated once, each in its median time."""
        return sum(statistics.median(times) for times in self.groups.values())


def measure(setting: Setting, seconds: float) -> Result:
    """Start all for one setting, watch it for so many seconds, ask the dashboards if wanted."""
    each = setting.nodes // setting.runs
    fleet_runs = [SimulatedRun(f"run-{i}", each, RANKS_PER_NODE, seed=i) for i in range(setting.runs)]
    result = Result(setting)
    with tempfile.TemporaryDirectory(prefix="gradmon-fleet-") as name, FleetServer(fleet_runs) as fleet:
        directory = Path(name)
        _fill(directory, setting, fleet)
        files = _rule_files(directory, setting)
        config = {
            "global": {"evaluation_interval": f"{setting.scrape}s"},
            "rule_files": [str(file) for file in files],
            "scrape_configs": fleet.scrape_config(f"{setting.scrape}s"),
        }
        with start_prometheus(directory, config) as prometheus:
            prometheus.wait_ready()
            _wait_for_all(prometheus, setting)
            _watch(prometheus, result, 1.5 * seconds if setting.panels else seconds)
            if setting.panels:
                result.panels = list(_ask_panels(prometheus))
    return result


def _rule_files(directory: Path, setting: Setting) -> list[Path]:
    settings = rules.SETTINGS if setting.scrape <= 5 else rules.SETTINGS_15S
    settings = dataclasses.replace(settings, slow_interval=f"{SLOW_SECONDS}s")
    made = {"recording": rules.recording_rules, "alerts": rules.alert_rules, "targets": rules.target_rules}
    return [write_yaml(directory / f"{name}.yml", make(settings)) for name, make in made.items()]


def _fill(directory: Path, setting: Setting, fleet: FleetServer) -> None:
    """What the rules look back at, and most of an hour of what the panels show: densely only where rates are taken."""
    looked_back_at = _looked_back_at(r["expr"] for file in _rule_files(directory, setting) for r in _rules_in(file))
    parts = [History(looked_back_at, RULES_SECONDS, 30.0)]
    if setting.panels:
        queries = [query.expr for _, query in _all_panels()]
        shown = frozenset(name for expr in queries for name in _names(expr)) & frozenset(METRICS_BY_NAME)
        rates = _looked_back_at(queries) | looked_back_at
        parts = [History(rates, HISTORY_SECONDS, 15.0), History(shown - rates, HISTORY_SECONDS, 120.0)]
    _say(f"{setting}: filling in {parts[0].seconds:g} s of history of {sum(len(part.names) for part in parts)} metrics")
    fill_head(directory, fleet, parts, max(5, setting.nodes // (5 if setting.panels else 20)))


def _rules_in(file: Path) -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(file.read_text())["groups"]:
        yield from group["rules"]


def _names(expression: str) -> set[str]:
    return set(re.findall(r"\bgradmon_\w+", expression))


def _looked_back_at(expressions: Iterable[str]) -> frozenset[str]:
    """Metrics with a window or an offset."""
    found = set()
    for expression in expressions:
        for name in re.findall(r"\b(gradmon_\w+)(?:\{[^}]*\})?(?:\[| offset)", expression):
            found.add(name)
    return frozenset(found) & frozenset(METRICS_BY_NAME)


def _wait_for_all(prometheus: Server, setting: Setting) -> None:
    deadline = time.monotonic() + 60 + 3 * setting.scrape
    while True:
        up = prometheus.query('count(up{job="gradmon"} == 1)')
        if up and float(up[0]["value"][1]) == setting.nodes:
            return
        if time.monotonic() > deadline:
            raise ServerError(f"{setting}: not all targets were scraped: {up}")
        time.sleep(0.5)


def _watch(prometheus: Server, result: Result, seconds: float) -> None:
    _say(f"{result.setting}: watching for {seconds:g} s")
    begin, before, used = time.monotonic(), _own_metrics(prometheus), _cpu_seconds(prometheus)
    seen: set[tuple[str, str]] = set()
    while time.monotonic() - begin < seconds:
        time.sleep(1.0)
        for group in prometheus.get("/api/v1/rules")["data"]["groups"]:
            key = (group["name"], group["lastEvaluation"])
            if key in seen or group["lastEvaluation"].startswith("0001"):
                continue
            seen.add(key)
            result.groups[group["name"]].append(group["evaluationTime"])
            for rule in group["rules"]:
                result.rules[rule["name"]].append(rule["evaluationTime"])
                if rule["health"] == "err":
                    result.broken_rules.append(f"{rule['name']}: {rule['lastError']}")
    passed = time.monotonic() - begin
    after = _own_metrics(prometheus)
    appended = "prometheus_tsdb_head_samples_appended_total"
    result.samples_per_second = (after[appended] - before[appended]) / passed
    result.series = after["prometheus_tsdb_head_series"]
    result.cores = (_cpu_seconds(prometheus) - used) / passed
    result.resident_bytes = _resident_bytes(prometheus)
    result.scraped = _number(prometheus, 'sum(scrape_samples_scraped{job="gradmon"})')
    active = prometheus.get("/api/v1/alerts")["data"]["alerts"]
    result.alerts = sorted({alert["labels"]["alertname"] for alert in active} - {"GradmonWatchdog"})
    lost = f"sum(count_over_time(up[{passed:.0f}s]) - sum_over_time(up[{passed:.0f}s]))"
    result.failed_scrapes = _number(prometheus, lost)


def _own_metrics(prometheus: Server) -> dict[str, float]:
    """What Prometheus says of itself, added up over labels."""
    found: dict[str, float] = defaultdict(float)
    with urllib.request.urlopen(f"{prometheus.url}/metrics", timeout=30) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
    return found


def _cpu_seconds(prometheus: Server) -> float:
    fields = Path(f"/proc/{prometheus.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(prometheus: Server) -> float:
    status = Path(f"/proc/{prometheus.process.pid}/status").read_text()
    return float(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]


def _number(prometheus: Server, expression: str) -> float:
    found = prometheus.query(expression)
    return float(found[0]["value"][1]) if found else 0.0


def _all_panels(values: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    for file in sorted((ROOT / "dashboards").glob("*.json")):
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        for query in panel_queries(dashboard, values):
            yield file.stem, query


def _ask_panels(prometheus: Server) -> Iterator[Panel]:
    """Every query of every panel, with the variables as they are when a dashboard is opened."""
    end = time.time()
    for file in sorted((ROOT / "dashboards").glob("*.json")):
        _say(f"asking the dashboard {file.stem}")
        dashboard = json.loads(file.read_text(encoding="utf-8"))
        values = resolve(dashboard, prometheus.url, end - SHOWN_SECONDS, end)
        for query in panel_queries(dashboard, values):
            begin = time.perf_counter()
            name = f"{file.stem}: {query.panel}"
            try:
                if query.instant:
                    series = prometheus.query(query.expr, end)
                else:
                    step = max(STEP_SECONDS, SHOWN_SECONDS / (query.points or 1000))
                    series = prometheus.query_range(query.expr, end - SHOWN_SECONDS, end, step)
                yield Panel(name, len(series), time.perf_counter() - begin)
            except ServerError as error:
                yield Panel(name, 0, time.perf_counter() - begin, str(error))


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# Tables


def document(results: list[Result]) -> list[str]:
    """The result file: tables with what must be known to read them."""
    return [
        "# A fleet in one Prometheus",
        "",
        "`python tests/bench/fleet.py`: simulated agents with 8 ranks each, all names in METRICS, the shipped rules. "
        "Prometheus, the agents and whatever else runs share this machine.",
        "",
        machine(),
        "",
        "## Sizes",
        "",
        *_sizes(results),
        "",
        f"Before each, {RULES_SECONDS / 60:g} minutes of what rules look back at were put into the head; where "
        f"dashboards are asked, {HISTORY_SECONDS / 60:g} minutes of what they show.",
        "",
        "Asked for: series scraped over the interval. Memory and cores: of Prometheus alone. Rules: all groups once, "
        f"each in its median time, those of every minute once in {SLOW_SECONDS} s; at best: each in "
        "its shortest; longest: the slowest evaluation of any group that was seen. On a machine that does other things "
        "besides, the best is nearer to what the rules cost.",
        "",
        *_details([r for r in results if r.setting.panels] or results[-1:]),
    ]


def _sizes(results: list[Result]) -> list[str]:
    lines = [
        "| nodes x ranks | targets | series in head | samples/s asked for | samples/s stored | memory, MiB | cores "
        "| rules, s | at best, s | longest, s | scrapes that failed | bar |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in results:
        best = sum(min(times) for times in r.groups.values())
        longest = max(max(times) for times in r.groups.values())
        bar = _judged(longest <= RULE_SECONDS, f"each evaluation <= {RULE_SECONDS:g} s")
        lines.append(
            f"| {r.setting} | {r.setting.nodes} | {r.series:,.0f} | {r.scraped / r.setting.scrape:,.0f} "
            f"| {r.samples_per_second:,.0f} | {r.resident_bytes / 2**20:,.0f} | {r.cores:.2f} "
            f"| {r.rule_seconds:.3f} | {best:.3f} | {longest:.3f} | {r.failed_scrapes:.0f} | {bar} |"
        )
    return lines


def _details(results: list[Result]) -> list[str]:
    lines = []
    for r in results:
        lines += [f"## Rules at {r.setting}", "", "| group | median, s | longest, s |", "|---|---:|---:|"]
        lines += [f"| {n} | {statistics.median(t):.3f} | {max(t):.3f} |" for n, t in sorted(r.groups.items())]
        slow = sorted(r.rules.items(), key=lambda item: -statistics.median(item[1]))[:10]
        told = ", ".join(f"`{name}` {1000 * statistics.median(times):.0f} ms" for name, times in slow)
        lines += ["", f"Slowest rules: {told}.", ""]
        lines += [f"Alerts pending or firing beside the Watchdog, though all runs are healthy: {_list(r.alerts)}.", ""]
        if r.broken_rules:
            lines += ["**Rules that failed:** " + "; ".join(sorted(set(r.broken_rules))), ""]
        if r.panels:
            lines += [f"## Dashboards at {r.setting}", "", *_panel_table(r.panels)]
    return lines


def _panel_table(panels: list[Panel]) -> list[str]:
    slow, many = max(p.seconds for p in panels), max(p.series for p in panels)
    failed = [p for p in panels if p.error]
    lines = [
        f"{len(panels)} queries, an hour at a step of {STEP_SECONDS:g} s. The worst five by time, then by series.",
        "",
        "| panel | series | seconds |",
        "|---|---:|---:|",
    ]
    worst = sorted(panels, key=lambda p: -p.seconds)[:5] + sorted(panels, key=lambda p: -p.series)[:5]
    lines += [f"| {p.name} | {p.series} | {p.seconds:.2f} |" for p in worst]
    lines += [
        "",
        f"Slowest {slow:.2f} s, {_judged(slow <= PANEL_SECONDS, f'<= {PANEL_SECONDS:g} s')}; most series {many}, "
        f"{_judged(many <= PANEL_SERIES, f'<= {PANEL_SERIES}')}; failed: "
        + ("; ".join(f"{p.name}: {p.error}" for p in failed) or "none")
        + ".",
    ]
    return lines


def _list(words: list[str]) -> str:
    return ", ".join(words) or "none"


def _judged(met: bool, text: str) -> str:
    return f"{text}: {'met' if met else '**missed**'}"


def machine() -> str:
    """Date, processor, cores, memory, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    told = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"version (\S+)", told.stdout + told.stderr)
    return (
        f"{datetime.date.today().isoformat()}; {names[0] if names else platform.machine()}, {os.cpu_count()} shared "
        f"cores, {memory:.0f} GiB; Prometheus {version.group(1) if version else 'unknown'}, "
        f"Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default="16,64,128,512", help="sizes, each scraped every 5 s (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=22.0,
        help="how long each is watched, the one with dashboards for half as long again (%(default)g)",
    )
    args = parser.parse_args()
    sizes = sorted(int(nodes) for nodes in args.nodes.split(","))
    settings = [Setting(nodes, 5, panels=nodes == sizes[-1]) for nodes in sizes]
    settings.append(Setting(sizes[-1], 15))
    if sizes[-1] >= 64:
        settings.append(Setting(sizes[-1], 5, runs=sizes[-1] // 8))
    results = []
    for setting in settings:
        results.append(measure(setting, args.seconds))
        _say(_sizes(results)[-1])
    text = "\n".join(document(results)) + "\n"
    file = Path(__file__).parent / "results" / f"{datetime.date.today().isoformat()}-fleet.md"
    file.write_text(text, encoding="utf-8")
    print(text)
    _say(f"written to {file}")


if __name__ == "__main__":
    main()
