"""Series of simulated runs as `promtool test rules` takes them: a run is healthy until a test changes something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gradmon.metrics import METRICS, METRICS_BY_NAME

#: Value at a second; None: not exported then.
Value = Callable[[int], float | None]
GIB = 2.0**30
FOREVER = 10**9

#: Label values of the metrics that have more labels than run and rank.
LABELS: dict[str, list[dict[str, str]]] = {
    "gradmon_actions_total": [
        {"action": action, "reason": reason, "applied": applied}
        for applied in ("yes", "no")
        for action, reason in (
            ("rescale", "spike"), ("skip", "spike"), ("rescale", "max_norm"), ("skip", "nonfinite"),
            ("leave_out", "left_out"), ("backoff", "spike_streak"), ("rollback", "diverging"),
            ("stop", "skip_streak"), ("stop", "scaler_streak"), ("stop", "diverging"), ("stop", "replicas"),
        )
    ],
    "gradmon_events_total": [
        {"kind": kind}
        for kind in ("spike_streak", "skip_streak", "scaler_streak", "left_out_streak", "drift", "vanish",
                     "diverging", "replicas", "loss_spike", "weights_unchanged")
    ],
    "gradmon_gpu_throttled": [{"reason": r} for r in ("sw_power_cap", "hw_slowdown", "hw_thermal_slowdown")],
    "gradmon_gpu_ecc_errors_total": [{"kind": "corrected"}, {"kind": "uncorrected"}],
    "gradmon_gpu_nvlink_errors_total": [{"kind": "replay"}, {"kind": "crc"}],
    "gradmon_errors_total": [{"part": "local"}],
    "gradmon_agent_errors_total": [{"part": "store"}, {"part": "exporter"}],
    "gradmon_local_nonfinite_elements_total": [{"kind": "nan"}, {"kind": "inf"}],
    "gradmon_nonfinite_elements_total": [{"kind": "nan"}, {"kind": "inf"}],
    "gradmon_incidents_total": [{"kind": "spike"}, {"kind": "nonfinite"}],
}  # fmt: skip

#: Values of gauges in a healthy run; other gauges are 1, counters 0.
GAUGES: dict[str, float] = {
    "gradmon_paused": 0,
    "gradmon_last_heartbeat_age_seconds": 2,
    "gradmon_rank_finished": 0,
    "gradmon_rank_failed": 0,
    "gradmon_gpu_throttled": 0,
    "gradmon_gpu_memory_allocated_bytes": 40 * GIB,
    "gradmon_gpu_memory_reserved_bytes": 70 * GIB,
    "gradmon_gpu_memory_peak_allocated_bytes": 60 * GIB,
    "gradmon_gpu_memory_peak_reserved_bytes": 70 * GIB,
    "gradmon_gpu_memory_capacity_bytes": 80 * GIB,
    "gradmon_host_memory_available_bytes": 500 * GIB,
    "gradmon_host_memory_capacity_bytes": 1000 * GIB,
    "gradmon_validation_loss": 0.9,
    "gradmon_series_dropped": 0,
    "gradmon_early_stop": 0,
}
#: Absent in a healthy run.
ABSENT = {"gradmon_last_incident_info", "gradmon_last_incident_step", "gradmon_last_incident_timestamp_seconds"}


def text(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ", ".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}"


def step(at: int, before: float = 0, after: float = 1) -> Value:
    """A value that changes once, counters for instance."""
    return lambda t: before if t < at else after


def ramp(begin: int, per_second: float, end: int = FOREVER, base: float = 0) -> Value:
    """A counter that grows from `begin` to `end`."""
    return lambda t: base + max(0, min(t, end) - begin) * per_second


@dataclass
class Run:
    """One job: ranks on nodes whose agents are scraped from `begin` on and export the run after its end too.

    `ends` says how its ranks end: finished, failed or killed. `steps` None: one step per `step_seconds`.
    """

    name: str = "llama"
    world: int = 4
    per_node: int = 2
    nodes: str = "node"
    begin: int = 0
    end: int = FOREVER
    ends: str = "finished"
    step_seconds: float = 1.0
    mode: str = "guard"
    steps: Value | None = None
    age: Value | None = None
    away: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Host -> seconds in which its agent is not there."""
    changes: list[tuple[str, dict[str, str], Value]] = field(default_factory=list)

    def change(self, name: str, value: Value | float, **labels: str) -> Run:
        """Other values for all series of a name that have these labels; a series that is not there is added."""
        constant = value
        self.changes.append((name, labels, constant if callable(constant) else lambda _: constant))
        return self

    def incident(self, at: int, rank: str, parameter: str, kind: str, until: int = FOREVER) -> Run:
        """The newest incident from `at` on, until the next one."""
        shown = {"rank": rank, "parameter": parameter, "kind": kind}
        self.change("gradmon_last_incident_info", lambda t: 1 if at <= t < until else None, **shown)
        for name, value in (("step", at / self.step_seconds), ("timestamp_seconds", at)):
            earlier = [v for n, _, v in self.changes if n == f"gradmon_last_incident_{name}"]
            before = earlier[-1] if earlier else lambda _: None
            self.change(f"gradmon_last_incident_{name}", lambda t, v=value, b=before: v if t >= at else b(t))
        return self

    def hosts(self) -> list[str]:
        return [f"{self.nodes}{n}" for n in range(-(-self.world // self.per_node))]

    def series(self) -> dict[str, Value]:
        """Every metric of every node, as Prometheus stores it."""
        made: dict[str, tuple[str, dict[str, str], Value]] = {}
        for name, labels, value in self._healthy():
            made[text(name, labels)] = (name, labels, value)
        for name, wanted, value in self.changes:
            found = [k for k, (n, labels, _) in made.items() if n == name and wanted.items() <= labels.items()]
            if not found:
                labels = {**self._target(self.hosts()[0]), "run": self.name, **wanted}
                assert set(METRICS_BY_NAME[name].labels) <= labels.keys(), (name, labels)
                made[text(name, labels)] = (name, labels, value)
            for key in found:
                made[key] = (*made[key][:2], value)
        return {key: self._exported(labels["instance"], name, v) for key, (name, labels, v) in made.items()}

    def _exported(self, instance: str, name: str, value: Value) -> Value:
        gone = self.away.get(instance.partition(":")[0], (0, 0))
        last = self.end if name in _WHILE_ALIVE else self.end + 3600
        return lambda t: None if not self.begin <= t < last or gone[0] <= t < gone[1] else value(t)

    def _target(self, host: str) -> dict[str, str]:
        return {"job": "gradmon", "cluster": "main", "instance": f"{host}:10855"}

    def _healthy(self) -> Iterator[tuple[str, dict[str, str], Value]]:
        for number, host in enumerate(self.hosts()):
            here = range(number * self.per_node, min(self.world, (number + 1) * self.per_node))
            for metric in METRICS:
                if metric.name in ABSENT or metric.name.startswith("gradmon_agent"):
                    continue
                labels = {**self._target(host), **self._fixed(metric.labels)}
                if "rank" in metric.labels:
                    for rank in here:
                        extra = self._of_rank(metric.labels, host, rank)
                        yield from self._one(metric.name, {**labels, "rank": str(rank), **extra})
                elif metric.labels == ("host",):
                    yield from self._one(metric.name, {**labels, "host": host})
                elif number == 0 or metric.name == "gradmon_world_size":
                    yield from self._one(metric.name, labels)

    def _fixed(self, names: tuple[str, ...]) -> dict[str, str]:
        known = {"run": self.name, "layer": "blocks.0", "mode": self.mode, "world_size": str(self.world)}
        known |= {"run_instance": f"{self.nodes}-{self.begin}", "attempt": "0", "topology": "ddp"}
        known |= {"script": "train.py", "version": "0.1.0"}
        return {name: known[name] for name in names if name in known}

    def _of_rank(self, names: tuple[str, ...], host: str, rank: int) -> dict[str, str]:
        known = {"host": host, "local_rank": str(rank % self.per_node), "device": "cuda", "gpu_uuid": f"GPU-{rank}"}
        return {name: known.get(name, "x") for name in names if name in known or name == "gpu_pci_bus_id"}

    def _one(self, name: str, labels: dict[str, str]) -> Iterator[tuple[str, dict[str, str], Value]]:
        for more in LABELS.get(name, [{}]):
            yield name, {**labels, **more}, self._value(name)

    def _value(self, name: str) -> Value:
        steps = self.steps or ramp(self.begin, 1 / self.step_seconds, self.end)
        special: dict[str, Value] = {
            "gradmon_rank_up": lambda t: float(t < self.end),
            "gradmon_rank_finished": lambda t: float(t >= self.end and self.ends == "finished"),
            "gradmon_rank_failed": lambda t: float(t >= self.end and self.ends == "failed"),
            "gradmon_world_size": lambda _: float(self.world),
            "gradmon_steps_total": steps,
            "gradmon_last_step_age_seconds": self.age or (lambda t: min(t - self.begin, self.step_seconds)),
            "gradmon_step_duration_seconds": lambda _: self.step_seconds,
            "gradmon_busy_seconds_total": lambda t: (steps(t) or 0) * self.step_seconds * 0.6,
            "gradmon_data_wait_seconds_total": lambda t: (steps(t) or 0) * self.step_seconds * 0.05,
            "gradmon_mean_loss": lambda t: 2 - (steps(t) or 0) * 1e-5,
        }
        if name in special:
            return special[name]
        counter = METRICS_BY_NAME[name].kind == "counter"
        constant = GAUGES.get(name, 0.0 if counter else 1.0)
        return lambda _: constant


_WHILE_ALIVE = {"gradmon_last_step_age_seconds", "gradmon_last_heartbeat_age_seconds", "gradmon_world_size"}


def fleet(*hosts: str) -> dict[str, Value]:
    """What is there without a run: targets that answer, and their agents' own metrics."""
    made: dict[str, Value] = {}
    for host in hosts or ("node0", "node1"):
        target = {"job": "gradmon", "cluster": "main", "instance": f"{host}:10855"}
        made[text("up", target)] = lambda _: 1.0
        made[text("gradmon_agent_info", {**target, "host": host, "version": "0.1.0"})] = lambda _: 1.0
        made[text("gradmon_agent_journals", target)] = lambda _: 2.0
        for more in LABELS["gradmon_agent_errors_total"]:
            made[text("gradmon_agent_errors_total", {**target, **more})] = lambda _: 0.0
    return made


def input_series(series: dict[str, Value], interval: int, length: int) -> list[dict[str, str]]:
    """As promtool takes them. A series that stops is marked stale, as a scrape without it does."""
    made = []
    for name, value in series.items():
        words, there = [], False
        for t in range(0, length + 1, interval):
            now = value(t)
            words.append(f"{now:.10g}" if now is not None else "stale" if there else "_")
            there = now is not None
        if set(words) != {"_"}:
            made.append({"series": name, "values": " ".join(words)})
    return made
