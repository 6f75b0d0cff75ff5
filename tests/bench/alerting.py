"""How long an explosion takes from the rank's journal to the webhook, through agent, Prometheus and Alertmanager.

    python tests/bench/alerting.py [--runs 12] [--write]

Each of several runs breaks once, at moments that have nothing to do with the scrapes. Settings: the demo's, and those
that deploy/ ships. Needs prometheus and alertmanager.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "agent"), str(ROOT / "tests" / "stack"), str(ROOT / "tests" / "bench")]

from detection import machine  # noqa: E402
from fake_journals import AgentProcess, FakeRank, explode, identity, record  # noqa: E402
from webhook import Webhook  # noqa: E402

from gradmon import rules  # noqa: E402
from gradmon.rules import RuleSettings  # noqa: E402
from gradmon.stack import Stack, StackOptions  # noqa: E402
from gradmon.stack.servers import find_program  # noqa: E402

#: Seconds from the event to the webhook that were set as goals.
GOALS = {"demo": 5.0, "deploy": 20.0}
SETTINGS = {"demo": rules.DEMO, "deploy": rules.SETTINGS}
_ALERTS = {"explosion": "GradmonGradientExplosion", "NaN": "GradmonNonfiniteGradients"}


def measure(settings: RuleSettings, runs: int, seed: int = 0) -> dict[str, list[float]]:
    """Latency of each run's alerts in seconds, by kind."""
    rng = random.Random(seed)
    scrape = float(settings.event_interval.removesuffix("s"))
    found: dict[str, list[float]] = {kind: [] for kind in _ALERTS}
    with tempfile.TemporaryDirectory(prefix="gradmon-alerting-") as folder:
        journals = Path(folder) / "journals"
        ranks = [FakeRank(journals, identity(run=f"run{n:02d}")).step(*map(record, range(1, 40))) for n in range(runs)]
        with Webhook() as webhook, AgentProcess(journals) as agent:
            if not agent.address:
                raise SystemExit("the agent did not start")
            options = StackOptions(Path(folder) / "stack", (journals,), webhook=webhook.url, settings=settings)
            with Stack(options) as stack:
                while len(stack.prometheus.query("gradmon_steps_total > 0")) < runs:
                    time.sleep(0.2)
                time.sleep(2 * scrape)
                told = {}
                for rank in ranks:
                    time.sleep(scrape * rng.random())
                    told[rank.identity.run] = time.time()
                    explode(rank, 40)
                for run, at in told.items():
                    for kind, name in _ALERTS.items():
                        found[kind].append(webhook.wait_for(name, "firing", 120, run=run).at - at)
        for rank in ranks:
            rank.end()
    return found


def _versions() -> str:
    lines = [
        subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        for name in ("prometheus", "alertmanager")
        if (program := find_program(name))
    ]
    return ", ".join(" ".join((done.stdout or done.stderr).split()[:3]).replace(", version", "") for done in lines)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """As Markdown."""
    lines = ["| settings | alert | median | worst | goal |", "|---|---|---:|---:|---:|"]
    for name, by_kind in results.items():
        settings = SETTINGS[name]
        said = f"{name}: scraped and evaluated every {settings.event_interval}"
        for kind, seconds in by_kind.items():
            lines.append(
                f"| {said} | {kind} | {statistics.median(seconds):.1f} s | {max(seconds):.1f} s | {GOALS[name]:g} s |"
            )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and write the dated result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12, help="runs that break (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the dated result")
    args = parser.parse_args()
    results = {}
    for name, settings in SETTINGS.items():
        print(f"{name}: {args.runs} runs break one after the other ...", flush=True)
        results[name] = measure(settings, args.runs)
    text = table(results)
    print(text)
    if args.write:
        day = time.strftime("%Y-%m-%d")
        head = (
            f"# From the explosion to the webhook\n\n{machine()}; {_versions()}\n\n`python tests/bench/alerting.py`: "
        )
        what = f"{args.runs} runs each; from the event's commit in the rank's journal to its arrival at a webhook.\n\n"
        (ROOT / "tests" / "bench" / "results" / f"{day}-alerting.md").write_text(head + what + text + "\n")
    met = all(max(seconds) <= GOALS[name] for name, by_kind in results.items() for seconds in by_kind.values())
    print("goals met" if met else "GOALS NOT MET")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
