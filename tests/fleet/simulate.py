"""Simulated agents: every name in METRICS, from as many nodes and ranks as wanted, in health, broken or with a story.

`SimulatedRun` renders what the agent of a node would answer, `FleetServer` serves that for all nodes of some runs to a
real Prometheus, and `backfill` writes the hours before into Prometheus' directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import scenarios
from scenarios import Change, Incident, Scenario
from values import LABELS, LAYERS, VALUES, Moment, Value, constant_labels, moment

from gradmon.metrics import METRICS, Metric
from gradmon.stack.servers import Server, start_prometheus, write_yaml

CLUSTER = "main"
JOB = "gradmon"
PORT = 10855
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Units of counters that need not be whole numbers.
_FRACTIONAL = frozenset({"seconds"})
#: Long ago and healed; in a healthy run it is only here so that the names are.
_OLD_INCIDENT = Incident(6.0, "0", f"{LAYERS[2]}.attn.weight", "spike")
#: Shown by every agent of a run, though its label is the run alone.
_EVERY_NODE = frozenset({"gradmon_world_size"})


#: Which metrics; None: all.
Names = frozenset[str] | None


class _Series(NamedTuple):
    """One line of an exposition: the text before its value, and where that comes from."""

    text: str
    value: Value | float
    rank: int
    labels: tuple[str, ...]
    changes: tuple[Change, ...]
    whole: bool

    def at(self, now: Moment) -> float | None:
        """None: not there now."""
        value: float | None = self.value if isinstance(self.value, float) else self.value(now, self.rank, self.labels)
        for change in self.changes:
            value = change.apply(value, now.elapsed)
        return float(int(value)) if self.whole and value is not None else value

    @property
    def constant(self) -> bool:
        return isinstance(self.value, float) and not self.changes


@dataclass
class SimulatedRun:
    """A run on nodes of its own.

    Args:
        name: label `run`; its hosts are `NAME-0000` and so on.
        nodes: each with an agent.
        ranks_per_node: rank r is on node r // ranks_per_node.
        gpu: False leaves out the metrics of GPUs.
        scenario: "healthy", "story", or what is to happen.
        start: Unix time; two hours ago if None.
        step_seconds: of one optimizer step.
        mode: guard or observe, shown in gradmon_run_info.
        seed: of the noise.
    """

    name: str
    nodes: int = 1
    ranks_per_node: int = 8
    gpu: bool = True
    scenario: str | Scenario = "healthy"
    start: float | None = None
    step_seconds: float = 0.5
    mode: str = "guard"
    seed: int = 0
    _built: dict[tuple[int, str, Names], tuple[list[tuple[str, _Series]], str]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.start is None:
            self.start = time.time() - 7200.0
        if self.scenario == "story":
            self.scenario = scenarios.story()
        elif self.scenario == "healthy":
            self.scenario = Scenario()
        elif not isinstance(self.scenario, Scenario):
            raise ValueError(f"scenario must be healthy, story or a Scenario (got {self.scenario!r})")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": {}}

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def hosts(self) -> list[str]:
        """The nodes' names."""
        return [f"{self.name}-{node:04d}" for node in range(self.nodes)]

    def moment(self, t: float) -> Moment:
        """The run at a Unix time, before its scenario."""
        assert self.start is not None
        assert isinstance(self.scenario, Scenario)
        return moment(t - self.start, self.step_seconds, self.world_size, self.seed, self.scenario.hangs)

    def render(self, node: int, t: float) -> bytes:
        """The exposition of a node's agent at a Unix time, in Prometheus' text format."""
        return self._text(node, t, "", "\n").encode()

    def lines(self, node: int, t: float, names: Names = None) -> str:
        """The same as OpenMetrics samples with a time and the labels a scrape adds; without HELP and TYPE."""
        target = f'job="{JOB}",cluster="{CLUSTER}",instance="{self.hosts[node]}:{PORT}"'
        return self._text(node, t, target, f" {t:.3f}\n", names)

    def _text(self, node: int, t: float, target: str, end: str, names: Names = None) -> str:
        key = (node, target, names)
        if key not in self._built:
            self._built[key] = _build(list(self._pieces(node, target, names)), bake=not target)
        now = self.moment(t)
        lines, tail = self._built[key]
        out = []
        for before, series in lines:
            value = series.at(now)
            if value is None:
                out.append(before)
            else:
                out.append(f"{before}{series.text}{value:.12g}{end}")
        out.append(tail)
        return "".join(out)

    def _pieces(self, node: int, target: str, names: Names) -> Iterator[str | _Series]:
        for metric in METRICS:
            if names is not None and metric.name not in names:
                continue
            if metric.name not in VALUES:
                raise LookupError(f"{metric.name} is in METRICS; cure: say in tests/fleet/values.py what it shows")
            series = list(self._series(metric, node, target))
            if series and not target:
                yield f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n"
            yield from series

    def _series(self, metric: Metric, node: int, target: str) -> Iterator[_Series]:
        assert isinstance(self.scenario, Scenario)
        name, host = metric.name, self.hosts[node]
        if name.startswith("gradmon_gpu_") and not self.gpu:
            return
        if name.startswith("gradmon_last_incident_"):
            if node == 0:
                yield from self._incident_series(metric, target)
            return
        first = node * self.ranks_per_node
        if "rank" in metric.labels:
            ranks: Iterable[int] = range(first, first + self.ranks_per_node)
        elif "run" in metric.labels and node > 0 and name not in _EVERY_NODE:
            return
        else:
            ranks = (first,)
        known = {"run": self.name, "host": host}
        for rank in ranks:
            constant = constant_labels(
                name, run=self.name, host=host, rank=rank, rank_in_node=rank - first,
                world_size=self.world_size, mode=self.mode,
            )  # fmt: skip
            known["rank"] = str(rank)
            for labels in self._labels(name):
                rest = [label for label in metric.labels if label not in known]
                pairs = [f'{label}="{known[label]}"' for label in metric.labels if label in known]
                pairs = [pair for pair in pairs if pair.partition("=")[0] not in _keys(constant)]
                pairs += [constant] if constant else [f'{k}="{v}"' for k, v in zip(rest, labels, strict=True)]
                changes = tuple(
                    change for change in self.scenario.changes
                    if change.metric == name and change.rank in (None, rank) and change.labels in ((), labels)
                )  # fmt: skip
                whole = metric.kind == "counter" and metric.unit not in _FRACTIONAL
                yield _Series(_line(name, pairs, target), VALUES[name], rank, labels, changes, whole)

    def _labels(self, name: str) -> Sequence[tuple[str, ...]]:
        if name != "gradmon_actions_total":
            return LABELS.get(name, ((),))
        applied = "no" if self.mode == "observe" else "yes"
        return [(*action, applied) for action in LABELS[name]]

    def _incident_series(self, metric: Metric, target: str) -> Iterator[_Series]:
        """One series per incident, of which only the newest is there."""
        assert isinstance(self.scenario, Scenario)
        assert self.start is not None
        incidents = sorted((_OLD_INCIDENT, *self.scenario.incidents))
        for incident, until in zip(incidents, [*(i.since for i in incidents[1:]), float("inf")], strict=True):
            shown = {
                "gradmon_last_incident_info": 1.0,
                "gradmon_last_incident_step": float(int(incident.since / self.step_seconds)),
                "gradmon_last_incident_timestamp_seconds": self.start + incident.since,
            }[metric.name]
            values = {"run": self.name, "rank": incident.rank, "parameter": incident.parameter, "kind": incident.kind}
            pairs = [f'{label}="{values[label]}"' for label in metric.labels]
            changes = [Change(metric.name, until, gone=True)] if until < float("inf") else []
            if incident is not incidents[0]:
                changes.append(Change(metric.name, 0.0, incident.since, gone=True))
            yield _Series(_line(metric.name, pairs, target), shown, 0, (), tuple(changes), False)


def broken_runs(at: float, start: float | None = None) -> list[SimulatedRun]:
    """Small runs, each with faults that begin at the Unix time `at`; together they have all that alerts tell of.

    Args:
        at: Unix time; before it they are healthy, but for what takes minutes or hours to see.
        start: of all the runs, Unix time; four hours before `at` if None.
    """
    start = at - 14400.0 if start is None else start
    faults = scenarios.broken(at - start, early=900.0)
    return [
        SimulatedRun(
            name, ranks_per_node=4, scenario=scenario, start=start, seed=seed,
            mode="observe" if name == "watched" else "guard",
        )
        for seed, (name, scenario) in enumerate(faults.items())
    ]  # fmt: skip


def _keys(pairs: str) -> set[str]:
    return {pair.partition("=")[0] for pair in pairs.split(",") if pair}


def _line(name: str, pairs: Sequence[str], target: str) -> str:
    labels = ",".join([*pairs, *([target] if target else [])])
    return f"{name}{{{labels}}} " if labels else f"{name} "


def _build(pieces: Sequence[str | _Series], bake: bool) -> tuple[list[tuple[str, _Series]], str]:
    """Series that move, each with the text that stands still before it, and the text after the last."""
    lines, still = [], ""
    for piece in pieces:
        if isinstance(piece, str):
            still += piece
        elif bake and piece.constant:
            still += f"{piece.text}{piece.value:.12g}\n"
        else:
            lines.append((still, piece))
            still = ""
    return lines, still


class FleetServer:
    """Plays the agents of all nodes of some runs, in a process of its own: /HOST/metrics on one port of loopback.

    Args:
        runs: whose hosts all differ.
        down: hosts that answer 503.
    """

    def __init__(self, runs: Sequence[SimulatedRun], *, down: Iterable[str] = ()) -> None:
        self.hosts = [host for run in runs for host in run.hosts]
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import simulate; simulate.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # It lives until its input ends, so it can't outlive us.
        pickle.dump((list(runs), frozenset(down)), self._process.stdin)
        self._process.stdin.flush()
        self.port = int(self._process.stdout.readline())

    def scrape_config(self, interval: str = "1s") -> list[dict[str, Any]]:
        """Prometheus' scrape_configs: a target per node, with the labels that the shipped configurations give."""
        return [{"job_name": JOB, "scrape_interval": interval, "scrape_timeout": interval, **self._targets("metrics")}]

    def history_config(self, end: float, parts: Sequence[History], interval: str) -> list[dict[str, Any]]:
        """Scrape configs that bring the time before the Unix time `end` once, spread over one interval: `fill_head`."""
        return [
            {
                "job_name": f"history-{i}", "scrape_interval": interval, "scrape_timeout": interval,
                "honor_labels": True,  # those of the samples, which are as if scraped by the usual job
                "params": {
                    "start": [f"{end - part.seconds:.3f}"], "end": [f"{end:.3f}"], "step": [f"{part.step:g}"],
                    "names": [",".join(sorted(part.names))],
                },
                **self._targets("history"),
            }
            for i, part in enumerate(parts)
        ]  # fmt: skip

    def _targets(self, page: str) -> dict[str, Any]:
        relabel = [
            {"source_labels": ["__address__"], "target_label": "instance"},
            {
                "source_labels": ["__address__"], "regex": f"(.+):{PORT}", "target_label": "__metrics_path__",
                "replacement": f"/$1/{page}",
            },
            {"target_label": "__address__", "replacement": f"127.0.0.1:{self.port}"},
        ]  # fmt: skip
        targets = [{"targets": [f"{host}:{PORT}" for host in self.hosts], "labels": {"cluster": CLUSTER}}]
        return {"static_configs": targets, "relabel_configs": relabel}

    def stop(self) -> None:
        """End it; a second call does nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> FleetServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve() -> None:
    """Main of the server's process: runs on standard input, its port on standard output."""
    runs, down = pickle.load(sys.stdin.buffer)  # from our own parent
    asyncio.run(_serve(runs, down))


async def _serve(runs: Sequence[SimulatedRun], down: frozenset[str]) -> None:
    nodes = {host: (run, node) for run in runs for node, host in enumerate(run.hosts)}
    told: set[str] = set()

    def page(path: str) -> tuple[str, str, bytes]:
        """Status, content type and body."""
        address = urllib.parse.urlsplit(path)
        host, _, name = address.path.strip("/").partition("/")
        if host not in nodes or host in down:
            return "503 Service Unavailable" if host in down else "404 Not Found", CONTENT_TYPE, b""
        run, node = nodes[host]
        if name != "history":
            return "200 OK", CONTENT_TYPE, run.render(node, time.time())
        body = "" if path in told else _history(run, node, urllib.parse.parse_qs(address.query))
        told.add(path)
        return "200 OK", OPENMETRICS_TYPE, f"{body}# EOF\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = page(request.split(b" ", 2)[1].decode())
                head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        writer.close()

    for run, node in nodes.values():
        run.render(node, time.time())  # what is built once is built before the first scrape
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


def _history(run: SimulatedRun, node: int, parameters: Mapping[str, Sequence[str]]) -> str:
    start, end, step = (float(parameters[name][0]) for name in ("start", "end", "step"))
    names = frozenset(parameters["names"][0].split(","))
    return "".join(run.lines(node, start + k * step, names) for k in range(int((end - start) / step)))


class History(NamedTuple):
    """What is known of some metrics before the first scrape."""

    names: frozenset[str]
    seconds: float
    """How far back; less than an hour, as Prometheus takes no older samples into its head."""
    step: float
    """Seconds between two samples."""


def fill_head(directory: Path, fleet: FleetServer, parts: Sequence[History], interval: int) -> None:
    """Let a Prometheus in `directory` take history into its head, where the last hours are; `backfill` makes blocks.

    The next Prometheus that starts there goes on with it.

    Args:
        directory: as for `start_prometheus`.
        fleet: whose history.
        parts: which metrics, how far back and how densely.
        interval: seconds over which the agents are asked.

    Raises:
        RuntimeError: an agent's history did not arrive.
    """
    config = {"scrape_configs": fleet.history_config(time.time(), parts, f"{interval}s")}
    wanted = len(fleet.hosts) * len(parts)
    deadline = time.monotonic() + 60.0 + 2 * interval
    arrived = 'count(max_over_time(scrape_samples_scraped{job=~"history-.*"}[1h]) > 0)'
    with start_prometheus(directory, config) as prometheus:
        prometheus.wait_ready()
        while not (found := prometheus.query(arrived)) or float(found[0]["value"][1]) < wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"history of {wanted} agents and parts was asked for, there is that of {found}")
            time.sleep(0.5)


def backfill(
    directory: Path,
    start: float,
    end: float,
    step: float,
    runs: Sequence[SimulatedRun],
    *,
    names: Names = None,
) -> None:
    """Write the history of runs into `directory/prometheus`, before a Prometheus starts there.

    What is scraped afterwards must be newer than `end`.

    Args:
        directory: as for `start_prometheus`.
        start: Unix time of the first sample.
        end: Unix time after the last one.
        step: seconds between two samples.
        runs: each from its own start on.
        names: only these metrics; None: all.
    """
    file = directory / "history.txt"
    with file.open("w", encoding="utf-8") as out:
        for run in runs:
            assert run.start is not None
            for k in range(int((end - start) / step)):
                t = start + k * step
                if t < run.start:
                    continue
                for node in range(run.nodes):
                    out.write(run.lines(node, t, names))
        out.write("# EOF\n")
    _promtool("create-blocks-from", "openmetrics", str(file), str(directory / "prometheus"))
    file.unlink()


def backfill_rules(
    prometheus: Server, directory: Path, start: float, end: float, rules: Mapping[str, Any], step: str = "1m"
) -> None:
    """Have recording rules evaluated over the history that a running Prometheus holds.

    The blocks come into `directory/prometheus` and are seen by the Prometheus that starts there next. A rule that reads
    what another one records finds it only then: call this once more for those.

    Args:
        prometheus: started on `directory`.
        directory: as for `start_prometheus`.
        start: Unix time.
        end: Unix time.
        rules: content of a rule file.
        step: between two evaluations, whatever the groups' own intervals.
    """
    groups = [{**group, "interval": step} for group in rules["groups"]]
    file = write_yaml(directory / "history-rules.yml", {"groups": groups})
    _promtool(
        "create-blocks-from", "rules", f"--url={prometheus.url}", f"--start={start:.0f}", f"--end={end:.0f}",
        f"--output-dir={directory / 'prometheus'}", str(file),
    )  # fmt: skip


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", "tsdb", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"promtool tsdb {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
