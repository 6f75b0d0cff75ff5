"""The preview draws each dashboard with data from a real Prometheus; the pictures lie in tests/artifacts."""

from __future__ import annotations

import time
from pathlib import Path

import draw
import pytest
from boards.queries import panels
from committed import NAMES, load
from simulate import SimulatedRun, backfill

from gradmon.stack.servers import start_prometheus

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
#: Panels with nothing to see in a run that was healed and lost no rank.
QUIET = {
    "fleet": {"Alerts now"},
    "gpu": {"GPUs with most link errors", "GPUs with most memory errors"},
}


@pytest.fixture(scope="module")
def past(prometheus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prometheus")
    end = time.time()
    runs = [SimulatedRun("story", scenario="story", start=end - 3300.0), SimulatedRun("calm", ranks_per_node=4, seed=3)]
    backfill(directory, end - 3300.0, end, 15.0, runs)
    with start_prometheus(directory, {"global": {}}, flags=["--storage.tsdb.retention.time=10y"]) as server:
        server.wait_ready()
        yield server.url, end - 3300.0, end - 1.0


@pytest.mark.parametrize("name", NAMES)
def test_it_draws(past, chromium, name):
    url, start, end = past
    ARTIFACTS.mkdir(exist_ok=True)
    picture = ARTIFACTS / f"dashboard-{name}.png"
    board = load(name)
    data = draw.gather(board, url, start, end, chosen={} if name == "fleet" else {"run": "story"})
    view = draw.shoot(draw.page(data), picture, chromium)
    assert view.complaints == []
    assert set(view.empty) == QUIET.get(name, set())
    assert view.drawn == len(panels(board))
    assert picture.stat().st_size > 50_000


def test_a_failing_panel_is_told(past, chromium, tmp_path):
    url, start, end = past
    board = load("run")
    data = draw.gather(board, url, start, end, chosen={"run": "story"})
    panels(board)[0]["type"] = "graph"
    with pytest.raises(RuntimeError, match="State"):
        draw.shoot(draw.page(data), tmp_path / "no.png", chromium)


def test_a_stretch_of_events_is_one_mark():
    values = [(0.0, "0"), (10.0, "2"), (20.0, "1"), (30.0, "0"), (60.0, "1")]
    assert draw._regions(values, 10.0) == [[10.0, 20.0], [60.0, 60.0]]


def test_main_says_what_is_wrong(tmp_path, chromium, capsys):
    arguments = ["--prometheus", "http://127.0.0.1:1", "--dashboard", "run", "--out", str(tmp_path / "x.png")]
    assert draw.main(arguments) == 1
    assert "refused" in capsys.readouterr().err
