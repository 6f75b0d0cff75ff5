"""How long a scrape of one node takes, as Prometheus sees it: a real agent over 8 ranks that make a step before each.

    python tests/bench/scrape.py [--rounds 200] [--output tests/bench/results/DATE-scrape.md]

The goal is a 99th percentile of 50 ms at 8 ranks x 200 series.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent"))

from fake_journals import AgentProcess, FakeRank, _Landed, detail, identity, record, row, until

from gradmon.agent.exporter import SAMPLE_METRICS

RANKS = 8
GOAL_MS = 50.0
#: With the series of the ranks and of the run 8 x 200 and some more.
LAYERS = 264
#: As Prometheus 2.42 asks.
ACCEPT = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"
#: All that `resources` tells on a GPU.
SAMPLE = {name: 123456789.0 for name in SAMPLE_METRICS if name not in ("healthy", "paused", "validation_loss")}


def main() -> None:
    """Measure and print a table, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="scrapes of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the result (default: print only)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = measure(Path(folder), args.rounds)
    print(text, end="")
    if args.output:
        args.output.write_text(text)


def measure(directory: Path, rounds: int) -> str:
    """The result as Markdown."""
    parameters = [f"blocks.{layer}.weight" for layer in range(LAYERS)]
    ranks = [
        FakeRank(directory, identity(run="bench", rank=r, world_size=RANKS), SAMPLE, parameters=parameters)
        for r in range(RANKS)
    ]
    with AgentProcess(directory) as agent:
        client = http.client.HTTPConnection(urlsplit(agent.address).netloc, timeout=20)
        step(ranks, 1)
        until(lambda: b"gradmon_layer_grad_norm" in scrape(client)[1])
        fresh, body = [], b""
        for number in range(2, rounds + 2):
            time.sleep(1.1)  # no rendering is used twice
            step(ranks, number)
            time.sleep(random.uniform(0, 0.5))  # wherever the agent is between two looks at the journals
            milliseconds, body = scrape(client)
            fresh.append(milliseconds)
        scrape(client)
        cached = [scrape(client)[0] for _ in range(rounds)]
        client.close()
        code, log = agent.end()
    for rank in ranks:
        rank.end()
    if code:
        raise RuntimeError(log)
    series = sum(1 for line in body.splitlines() if not line.startswith(b"#"))
    return report(rounds, series, len(body), {"a new step before each": fresh, "within the same second": cached})


def step(ranks: list[FakeRank], number: int) -> None:
    """All ranks finish a step, committed when this returns; rank 0 with its full statistics."""
    for rank in ranks:
        full = [detail(number, *(row(1 + i / number) for i in range(LAYERS)))] if rank.identity.rank == 0 else []
        rank.writer.put(_Landed(record(number), [], full))
    for rank in ranks:
        if not rank.writer.flush(30):
            raise RuntimeError("the journal does not keep up")


def scrape(client: http.client.HTTPConnection) -> tuple[float, bytes]:
    """(milliseconds until the last byte, body) over a connection that stays open, as Prometheus' does."""
    began = time.perf_counter()
    client.request("GET", "/metrics", headers={"Accept": ACCEPT})
    body = client.getresponse().read()
    return 1000 * (time.perf_counter() - began), body


def report(rounds: int, series: int, size: int, found: dict[str, list[float]]) -> str:
    """The table."""
    p99 = quantiles(found["a new step before each"], n=100, method="inclusive")[98]
    lines = [
        "# What a scrape costs",
        "",
        f"`python tests/bench/scrape.py`: {RANKS} ranks on one node, {series:,} series in all (200 per rank and more), "
        f"{size / 1024:.0f} KiB of OpenMetrics; milliseconds from the request to the last byte, {rounds} scrapes each, "
        "1.1 s and more apart where a step comes before each. Ranks, agent and client share the machine.",
        "",
        machine(),
        "",
        "| scrapes | p50 | p90 | p99 | longest |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, times in found.items():
        cuts = quantiles(times, n=100, method="inclusive")
        lines.append(f"| {name} | {cuts[49]:.1f} | {cuts[89]:.1f} | {cuts[98]:.1f} | {max(times):.1f} |")
    verdict = "reached" if p99 <= GOAL_MS else "**missed**"
    return "\n".join([*lines, "", f"Goal: p99 <= {GOAL_MS:g} ms with a new step before each scrape: {verdict}.", ""])


def machine() -> str:
    """Date, processor, cores, Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    today = datetime.date.today().isoformat()
    where = processor or platform.machine()
    return f"{today}; {where}, {os.cpu_count()} shared cores; Python {platform.python_version()}"


if __name__ == "__main__":
    main()
