"""Every panel against a real Prometheus that holds simulated runs and has the shipped rules: is there data to see?"""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest
from boards.queries import annotation_queries, ask, panel_queries, resolve
from committed import load
from simulate import SimulatedRun, backfill, broken_runs

from gradmon.rules import DEMO, alert_rules, recording_rules
from gradmon.stack.servers import start_prometheus, write_yaml

STEP, SPAN = 15.0, 1500.0
#: Panels that show nothing here -> why. A panel that does show something must not stand here.
EMPTY: dict[tuple[str, str], str] = {}
MOST_SERIES = 100


class Past(NamedTuple):
    url: str
    start: float
    end: float


@pytest.fixture(scope="module")
def past(prometheus, tmp_path_factory):
    """Small runs in which everything breaks, a run with a story, and one with 320 ranks for a minute."""
    directory = tmp_path_factory.mktemp("prometheus")
    end = time.time()
    story = SimulatedRun("story", scenario="story", start=end - 2600.0)
    runs = [story, *broken_runs(end - 600.0, start=end - 2600.0)]
    backfill(directory, end - SPAN, end, STEP, runs)
    large = SimulatedRun("large", nodes=40, scenario=broken_runs(end - 600.0)[0].scenario, start=end - 7200.0)
    backfill(directory, end - 4 * STEP, end, STEP, [large])
    files = [
        write_yaml(directory / "recording.yml", recording_rules(DEMO)),
        write_yaml(directory / "alerts.yml", alert_rules(DEMO)),
    ]
    config = {"global": {"evaluation_interval": "1s"}, "rule_files": [str(file) for file in files]}
    with start_prometheus(directory, config, flags=["--storage.tsdb.retention.time=10y"]) as server:
        server.wait_ready()
        deadline = time.monotonic() + 40
        while not server.query('ALERTS{alertstate="firing",severity="page"}'):
            assert time.monotonic() < deadline, "no alert fires"
            time.sleep(0.3)
        yield Past(server.url, end - SPAN, time.time())


def _series(past, query):
    if query.instant:
        found = ask(past.url, "/api/v1/query", {"query": query.expr, "time": f"{past.end:.3f}"})
    else:
        step = max(STEP, (past.end - past.start) / (query.points or 200))
        first = past.end - int((past.end - past.start) / step) * step  # the last point is now, where the alerts are
        span = {"start": f"{first:.3f}", "end": f"{past.end:.3f}", "step": f"{step:.3f}"}
        found = ask(past.url, "/api/v1/query_range", {"query": query.expr, **span})
    return found["result"]


def _queries(past, dashboard, run):
    values = resolve(dashboard, past.url, past.start, past.end, {"run": run})
    return panel_queries(dashboard, values) + annotation_queries(dashboard, values)


def test_every_query_of_every_panel_returns_data(past, dashboard):
    name = dashboard["uid"].removeprefix("gradmon-")
    queries = _queries(past, dashboard, ".+")
    empty = {(name, query.panel) for query in queries if not _series(past, query)}
    assert empty == {key for key in EMPTY if key[0] == name}


def test_a_query_without_data_would_be_found(past):
    board = load("run")
    board["panels"][1]["targets"][0]["expr"] = 'gradmon_grad_norm{run="nobody"}'
    assert [query.panel for query in _queries(past, board, ".+") if not _series(past, query)] == ["State"]


def test_hundreds_of_ranks_are_no_hundreds_of_lines(past, dashboard):
    queries = _queries(past, dashboard, "large")
    counts = {query.panel: len(_series(past, query)) for query in queries}
    assert max(counts.values()) <= MOST_SERIES, counts
    if dashboard["uid"] == "gradmon-ranks":
        assert counts["Local gradient norm, rank by time"] == 32, "ten ranks share a row"


def test_the_variables_are_found(past):
    values = resolve(load("ranks"), past.url, past.start, past.end, {"run": "story"})
    assert values["host"] == ["story-0000"]
    assert values["rank"] == [str(rank) for rank in range(8)]
    assert values["drop"] == "()"
    assert resolve(load("ranks"), past.url, past.start, past.end, {"run": "large"})["drop"] == "."
    picked = resolve(load("ranks"), past.url, past.start, past.end, {"run": "large", "host": ["large-0003"]})
    assert picked["rank"] == [str(rank) for rank in range(24, 32)]


def test_a_refused_query_says_why(past):
    with pytest.raises(ValueError, match=r"parse error.* in sum\("):
        ask(past.url, "/api/v1/query", {"query": "sum("})
