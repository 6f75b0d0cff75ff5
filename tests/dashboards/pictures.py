"""Makes the pictures of the dashboards: `python tests/dashboards/pictures.py` writes dashboards/{fleet,run,...}.png.

An hour of simulated runs, one of which exploded and was healed, in a real Prometheus with the shipped rules.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from committed import NAMES, ROOT, load

sys.path[:0] = [str(ROOT)]

import draw  # noqa: E402
import scenarios  # noqa: E402
from scenarios import Change, Scenario  # noqa: E402
from simulate import FleetServer, SimulatedRun, backfill, broken_runs  # noqa: E402

from gradmon.rules import SETTINGS, alert_rules, recording_rules, target_rules  # noqa: E402
from gradmon.stack.servers import start_prometheus, write_yaml  # noqa: E402

SHOWN, AHEAD = 3300.0, 25.0
#: Fault of tests/fleet -> name of a run that has it.
BROKEN = {"explodes": "vit-h14", "slow": "mixtral-8x7b", "learns-nothing": "whisper-s"}


def _runs(now: float) -> list[SimulatedRun]:
    begin = now - SHOWN
    told = scenarios.story()
    changes = tuple(change for change in told.changes if change.metric != "gradmon_healthy_ranks")
    changes += (
        Change("gradmon_healthy_ranks", 1300.0, 1310.0, put=15.0),
        Change("gradmon_last_healthy_step", 2400.0, 2640.0, put=4800.0),
    )
    runs = [
        SimulatedRun("llama-7b", nodes=2, scenario=Scenario(changes, told.incidents), start=begin),
        SimulatedRun("gpt2-medium", ranks_per_node=4, start=now - 5000.0, seed=4, step_seconds=0.3),
    ]
    faults = {run.name: run for run in broken_runs(now - 150.0, start=begin)}
    for fault, name in BROKEN.items():
        run = faults[fault]
        runs.append(SimulatedRun(name, ranks_per_node=4, scenario=run.scenario, start=begin, seed=run.seed))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dashboards", help="folder of the pictures")
    parser.add_argument("--wait", type=float, default=75.0, help="seconds that the rules are evaluated before")
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium is not installed"
    made = {"recording": recording_rules, "alerts": alert_rules, "targets": target_rules}
    with tempfile.TemporaryDirectory(prefix="gradmon-pictures-") as name:
        directory, now = Path(name), time.time()
        runs = _runs(now)
        # A little beyond now: it takes seconds until the first scrape, and a gap would bend all rates.
        backfill(directory, now - SHOWN, now + AHEAD, 15.0, runs)
        files = [write_yaml(directory / f"{key}.yml", make(SETTINGS)) for key, make in made.items()]
        with FleetServer(runs) as fleet:
            config = {
                "global": {"evaluation_interval": "5s"},
                "rule_files": [str(file) for file in files],
                "scrape_configs": fleet.scrape_config("5s"),
            }
            with start_prometheus(directory, config, flags=["--storage.tsdb.retention.time=10y"]) as server:
                server.wait_ready()
                time.sleep(options.wait)
                end = time.time()
                for board in NAMES:
                    chosen = {} if board == "fleet" else {"run": "llama-7b"}
                    data = draw.gather(load(board), server.url, end - SHOWN, end, chosen=chosen)
                    view = draw.shoot(draw.page(data), options.out / f"{board}.png", chromium)
                    print(board, view)


if __name__ == "__main__":
    main()
