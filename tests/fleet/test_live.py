"""A real Prometheus with the real rules watches simulated runs: broken ones set off every rule, healthy ones none."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from simulate import FleetServer, SimulatedRun, backfill, backfill_rules, broken_runs

from gradmon import rules
from gradmon.metrics import METRICS_BY_NAME
from gradmon.rules import DEMO
from gradmon.stack.servers import Server, start_prometheus, write_yaml

HISTORY_SECONDS = 4 * 3600.0
RECENT_SECONDS = 15 * 60.0
#: Recorded series that alerts look back at over hours.
RECORDED_OVER_HOURS = ("run:gradmon_gpu_memory_allocated_bytes:max", "run:gradmon_gpu_memory_capacity_bytes:min")
#: From the start of the agents to the first fault; the first scrape comes some seconds after Prometheus' start.
LEAD_SECONDS = 10.0
#: At most. Shares over a minute pass their thresholds 20 s after the fault.
WATCHED_SECONDS = 75.0
#: Rules that need not say anything here, and why.
EXCEPTIONS: Mapping[str, str] = {
    "GradmonNoTarget": "needs a Prometheus without a single target; it is asked of one, see below",
}

RULES = {
    "recording": rules.recording_rules(DEMO),
    "alerts": rules.alert_rules(DEMO),
    "targets": rules.target_rules(DEMO),
}
ALL_RULES = [rule for file in RULES.values() for group in file["groups"] for rule in group["rules"]]
ALERT_RULES = [rule for rule in ALL_RULES if "alert" in rule]
#: What those are made of, and what alerts themselves look back at over hours.
OVER_HOURS = frozenset(METRICS_BY_NAME) & {
    name
    for rule in ALL_RULES
    if rule.get("record") in RECORDED_OVER_HOURS or re.search(r"\d(h|\dm)\b", rule["expr"])
    for name in re.findall(r"\bgradmon_\w+", rule["expr"])
}
RECORDS = sorted({rule["record"] for rule in ALL_RULES if "record" in rule})


def start(directory: Path, exits: ExitStack, make: Callable[[float], list[SimulatedRun]], **fleet: Any) -> Server:
    """A Prometheus that has scraped for hours, as far as it can tell, the runs that are made for a time of faults."""
    now = time.time()
    before, recent = now - HISTORY_SECONDS, now - RECENT_SECONDS
    runs = make(now + LEAD_SECONDS)
    backfill(directory, before, recent, 60.0, runs, names=OVER_HOURS)
    backfill(directory, recent, now, 15.0, runs)
    slow = [rule for rule in ALL_RULES if rule.get("record") in RECORDED_OVER_HOURS]
    with start_prometheus(directory, {"scrape_configs": []}) as historian:
        historian.wait_ready()
        backfill_rules(historian, directory, before, now, {"groups": [{"name": "slow", "rules": slow}]})
    files = [str(write_yaml(directory / f"{name}.yml", content)) for name, content in RULES.items()]
    # However long that took, the faults begin only after Prometheus has seen the runs.
    server = exits.enter_context(FleetServer(make(time.time() + LEAD_SECONDS), **fleet))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": files,
        "scrape_configs": server.scrape_config("1s"),
    }
    found = exits.enter_context(start_prometheus(directory, config)).wait_ready()
    deadline = time.monotonic() + 60.0
    while len(found.query("up")) < len(server.hosts):
        assert time.monotonic() < deadline, "not all targets were scraped"
        time.sleep(0.2)
    return found


def active(prometheus: Server) -> set[tuple[str, str, str]]:
    """Name, severity and state of the alerts that are pending or firing."""
    found = prometheus.get("/api/v1/alerts")["data"]["alerts"]
    return {(a["labels"]["alertname"], a["labels"]["severity"], a["state"]) for a in found}


class Seen:
    """What a Prometheus has said while it was watched."""

    def __init__(self) -> None:
        self.alerts: set[tuple[str, str]] = set()
        self.records: set[str] = set()
        self.expressions: set[str] = set()
        self.unhealthy: dict[str, str] = {}

    def look(self, prometheus: Server) -> None:
        """Once more."""
        self.alerts |= {(name, severity) for name, severity, _ in active(prometheus)}
        for name in set(RECORDS) - self.records:
            if prometheus.query(f'last_over_time({{__name__="{name}"}}[3s])'):
                self.records.add(name)
        for group in prometheus.get("/api/v1/rules")["data"]["groups"]:
            for rule in group["rules"]:
                if rule["health"] == "err":
                    self.unhealthy[rule["name"]] = rule["lastError"]


@pytest.fixture(scope="module")
def servers(prometheus: str, promtool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    began = time.time() - HISTORY_SECONDS

    def healthy(_: float) -> list[SimulatedRun]:
        return [SimulatedRun(f"fine-{i}", nodes=2, ranks_per_node=4, start=began, seed=50 + i) for i in range(3)]

    def broken(at: float) -> list[SimulatedRun]:
        return broken_runs(at, began)

    with ExitStack() as exits:
        yield {
            "healthy": start(tmp_path_factory.mktemp("healthy"), exits, healthy),
            "broken": start(tmp_path_factory.mktemp("broken"), exits, broken, down=["killed-0000"]),
        }


@pytest.fixture(scope="module")
def seen(servers: dict[str, Server]) -> dict[str, Seen]:
    watched = {name: Seen() for name in servers}
    deadline = time.monotonic() + WATCHED_SECONDS
    wanted = {(rule["alert"], rule["labels"]["severity"]) for rule in ALERT_RULES if rule["alert"] not in EXCEPTIONS}
    while time.monotonic() < deadline:
        for name, server in servers.items():
            watched[name].look(server)
        if wanted <= watched["broken"].alerts and set(RECORDS) <= watched["broken"].records:
            break
        time.sleep(0.7)
    return watched


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_broken_runs_set_off_every_alert(seen: dict[str, Seen], rule: Mapping[str, Any]) -> None:
    if rule["alert"] in EXCEPTIONS:
        return
    assert (rule["alert"], rule["labels"]["severity"]) in seen["broken"].alerts


@pytest.mark.parametrize("name", RECORDS)
def test_every_recording_rule_has_data(seen: dict[str, Seen], name: str) -> None:
    assert name in seen["broken"].records


@pytest.mark.parametrize("which", ["broken", "healthy"])
def test_no_rule_fails(seen: dict[str, Seen], which: str) -> None:
    assert not seen[which].unhealthy


def test_healthy_runs_set_off_only_the_watchdog(servers: dict[str, Server], seen: dict[str, Seen]) -> None:
    assert len(servers["healthy"].query("gradmon_grad_norm")) == 3
    assert {"run:gradmon_straggler:ratio", *RECORDED_OVER_HOURS} <= seen["healthy"].records
    seen["healthy"].look(servers["healthy"])
    assert seen["healthy"].alerts == {("GradmonWatchdog", "none")}


def test_no_target_at_all_is_seen(prometheus: str, tmp_path: Path) -> None:
    (expr,) = (rule["expr"] for rule in ALERT_RULES if rule["alert"] == "GradmonNoTarget")
    with start_prometheus(tmp_path, {"scrape_configs": []}) as alone:
        assert alone.wait_ready().query(expr)


def test_exceptions_are_rules() -> None:
    assert set(EXCEPTIONS) <= {rule["alert"] for rule in ALERT_RULES}
