"""The store's runs as Prometheus metrics. Names, labels, kinds and help come from METRICS, nothing is typed twice.

prometheus_client renders and negotiates the format. Whoever has read the journals renders anew what was asked for
lately, so that a scrape only sends bytes; only where that is late does the scrape render itself.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from gradmon import __version__
from gradmon.agent.gpus import Gpu
from gradmon.agent.layer_gauges import LAYER_GAUGES
from gradmon.agent.store import Rank, Run, Store
from gradmon.metrics import METRICS, METRICS_BY_NAME

logger = logging.getLogger("gradmon.agent")

#: An exposition is used for this long: longer than the agent takes from one look at the journals to the next.
CACHE_SECONDS = 2.0
#: A format nobody has asked for in this time is not rendered anew; Prometheus is rarely told to scrape less often.
WANTED_SECONDS = 150.0
#: An ended run stays this long: long enough for every alert about its end, short enough that a node forgets old runs.
ENDED_SECONDS = 3600.0

#: Gauges equal on all ranks, and the field of StepRecord each shows.
RUN_GAUGES = {
    "gradmon_grad_norm": "grad_norm",
    "gradmon_grad_norm_applied": "grad_norm_applied",
    "gradmon_grad_norm_limit": "grad_norm_limit",
    "gradmon_learning_rate": "learning_rate",
    "gradmon_learning_rate_scale_ratio": "learning_rate_scale",
    "gradmon_grad_abs_max": "grad_abs_max",
    "gradmon_grad_min": "grad_min",
    "gradmon_grad_max": "grad_max",
    "gradmon_local_grad_norm_rms": "local_grad_norm_rms",
    "gradmon_local_grad_norm_max": "local_grad_norm_max",
    "gradmon_healthy_ranks": "healthy_ranks",
    "gradmon_mean_loss": "mean_loss",
    "gradmon_max_loss": "max_loss",
    "gradmon_loss_scale": "loss_scale",
    "gradmon_grad_noise_scale_ratio": "noise_scale_ratio",
    "gradmon_update_ratio": "update_ratio",
}
RANK_GAUGES = {
    "gradmon_local_grad_norm": "local_grad_norm",
    "gradmon_loss": "loss",
    "gradmon_step_duration_seconds": "step_seconds",
}

#: Names that a sample of the rank may carry (`resources`, `JournalWriter.keep`), and the metric each becomes.
SAMPLE_METRICS: dict[str, str] = {
    "healthy": "gradmon_healthy",
    "last_healthy_step": "gradmon_last_healthy_step",
    "validation_loss": "gradmon_validation_loss",
    "early_stop": "gradmon_early_stop",
    "first_moment_norm": "gradmon_first_moment_norm",
    "second_moment_norm": "gradmon_second_moment_norm",
    "class_imbalance_ratio": "gradmon_class_imbalance_ratio",
    "token_share_ratio": "gradmon_token_share_ratio",
    "paused": "gradmon_paused",
    "snapshot_memory_bytes": "gradmon_snapshot_memory_bytes",
    "resident_memory_bytes": "gradmon_process_resident_memory_bytes",
    "cpu_seconds": "gradmon_process_cpu_seconds_total",
    "threads": "gradmon_process_threads",
    "open_fds": "gradmon_process_open_fds",
    "read_bytes": "gradmon_process_read_bytes_total",
    "written_bytes": "gradmon_process_written_bytes_total",
    "host_memory_available_bytes": "gradmon_host_memory_available_bytes",
    "host_memory_capacity_bytes": "gradmon_host_memory_capacity_bytes",
    "host_swap_used_bytes": "gradmon_host_swap_used_bytes",
    "host_load_average": "gradmon_host_load_average",
    "host_cpus": "gradmon_host_cpus",
    "gpu_memory_allocated_bytes": "gradmon_gpu_memory_allocated_bytes",
    "gpu_memory_reserved_bytes": "gradmon_gpu_memory_reserved_bytes",
    "gpu_memory_peak_allocated_bytes": "gradmon_gpu_memory_peak_allocated_bytes",
    "gpu_memory_peak_reserved_bytes": "gradmon_gpu_memory_peak_reserved_bytes",
    "gpu_memory_inactive_split_bytes": "gradmon_gpu_memory_inactive_split_bytes",
    "gpu_memory_capacity_bytes": "gradmon_gpu_memory_capacity_bytes",
    "gpu_allocator_retries": "gradmon_gpu_allocator_retries_total",
    "gpu_allocator_ooms": "gradmon_gpu_allocator_ooms_total",
}

#: One sample: a metric's name, its labels in the order METRICS lists them, the value.
Sample = tuple[str, tuple[str, ...], float]
#: By UUID: what the driver says of each GPU now.
Gpus = Mapping[str, Gpu]

_PAUSED = "gradmon_paused"


class Exporter:
    """Renders /metrics. A part that fails is left out and counted; the scrape never fails with it."""

    def __init__(self, store: Store, gpus: Callable[[], Gpus] = dict) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StoreCollector(store, gpus))
        self._formats: dict[str, _Format] = {}

    def ready(self, accept: str) -> tuple[bytes, str] | None:
        """The exposition and its content type, in the format the Accept header asks for; None if it must be made."""
        wanted, content_type = self._format(accept)
        body = wanted.ready()
        return None if body is None else (body, content_type)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The same, made if need be. Of several who wait for it, one makes it."""
        wanted, content_type = self._format(accept)
        with wanted.lock:
            body = wanted.ready()
            return wanted.make(self._registry) if body is None else body, content_type

    def prepare(self) -> None:
        """Make anew what was asked for lately."""
        for wanted in list(self._formats.values()):
            if time.monotonic() - wanted.asked <= WANTED_SECONDS:
                with wanted.lock:
                    wanted.make(self._registry)

    def _format(self, accept: str) -> tuple[_Format, str]:
        encoder, content_type = choose_encoder(accept)
        wanted = self._formats.setdefault(content_type, _Format(encoder))
        wanted.asked = time.monotonic()
        return wanted, content_type


class _Format:
    """One exposition format and what was made of it last."""

    def __init__(self, encoder: Callable[[CollectorRegistry], bytes]) -> None:
        self.lock = threading.Lock()
        self.asked = float("-inf")
        self._encoder = encoder
        self._made: tuple[float, bytes] = (float("-inf"), b"")

    def ready(self) -> bytes | None:
        made, body = self._made
        return body if time.monotonic() - made <= CACHE_SECONDS else None

    def make(self, registry: CollectorRegistry) -> bytes:
        """Hold `lock`."""
        began = time.monotonic()
        body = self._encoder(registry)
        self._made = (began, body)
        return body


class _StoreCollector(Collector):
    def __init__(self, store: Store, gpus: Callable[[], Gpus]) -> None:
        self._store = store
        self._gpus = gpus

    def describe(self) -> Iterable[Family]:
        return ()  # without this, registering would collect once

    def collect(self) -> Iterator[Family]:
        families = {m.name: _family(m.name) for m in METRICS}
        with self._store.lock:
            for part in self._parts():
                try:
                    samples = list(part)
                except Exception:
                    self._failed("a run could not be exported")
                    continue
                for name, labels, value in samples:
                    families[name].add_metric(labels, value)
        for name, labels, value in _agent(self._store):  # last, so that it counts what failed just now
            families[name].add_metric(labels, value)
        yield from (family for family in families.values() if family.samples)

    def _driver(self) -> Gpus:
        try:
            return self._gpus()
        except Exception:
            self._failed("GPUs could not be exported")
            return {}

    def _failed(self, what: str) -> None:
        self._store.errors["exporter"] += 1
        logger.exception(what)

    def _parts(self) -> Iterator[Iterator[Sample]]:
        """What may fail apart from each other."""
        now = time.time()
        runs = [
            run
            for run in self._store.runs
            if run.instance.living or now - run.instance.last_seen_seconds <= ENDED_SECONDS
        ]
        gpus = self._driver()
        yield _gpu_samples(runs, gpus)
        yield _host_samples(runs)
        for run in runs:
            ranks = run.ranks()
            yield _world_samples(run)
            if 0 in ranks:  # equal on all ranks, so one of them, on whatever node, tells it
                yield _run_samples(run, ranks[0])
                yield _layer_samples(run, ranks[0])
            for rank in ranks.values():
                yield _rank_samples(run.name, rank, gpus)


def _family(name: str) -> CounterMetricFamily | GaugeMetricFamily:
    metric = METRICS_BY_NAME[name]
    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return family(metric.name, metric.help, labels=metric.labels)


def _run_samples(run: Run, rank: Rank) -> Iterator[Sample]:
    labels = (run.name,)
    identity = rank.view.identity
    info = {name: str(getattr(identity, name, "")) for name in METRICS_BY_NAME["gradmon_run_info"].labels}
    info |= {"run": run.name, "run_instance": identity.instance}
    yield "gradmon_run_info", tuple(info.values()), 1.0
    for name, field in RUN_GAUGES.items():
        if field in rank.gauges:
            yield name, labels, rank.gauges[field]
    for name, value in _resources(rank, ("run",)):
        yield name, labels, value
    elements = rank.gauges.get("element_count", 0.0)
    if elements and "zero_count" in rank.gauges:
        yield "gradmon_grad_zero_ratio", labels, rank.gauges["zero_count"] / elements
    yield from _counter_samples(run.name, rank, of_rank=False)
    incident = rank.incident
    if incident is not None:
        culprit = "unknown" if incident.culprit_rank is None else str(incident.culprit_rank)
        yield (
            "gradmon_last_incident_info",
            (run.name, culprit, incident.parameter or "unknown", incident.reason),
            1.0,
        )
        yield "gradmon_last_incident_step", labels, float(incident.step)
        yield "gradmon_last_incident_timestamp_seconds", labels, incident.wall_seconds


def _layer_samples(run: Run, rank: Rank) -> Iterator[Sample]:
    """What the run's `metrics` settings allow; the values were taken in when they were read, not now."""
    gauges = rank.layers
    yield "gradmon_series_dropped", (run.name,), 0.0 if gauges is None else float(gauges.dropped)
    if gauges is not None:
        for layer, values in gauges.values.items():
            for name, field in LAYER_GAUGES.items():
                if field in values:
                    yield name, (run.name, layer), values[field]


def _world_samples(run: Run) -> Iterator[Sample]:
    worlds = [rank.view.identity.world_size for rank in run.ranks().values() if rank.living]
    if worlds:
        yield "gradmon_world_size", (run.name,), float(max(worlds))


def _rank_samples(run: str, rank: Rank, gpus: Gpus) -> Iterator[Sample]:
    view = rank.view
    identity = view.identity
    labels = (run, str(rank.number))
    info = {name: str(getattr(identity, name)) for name in METRICS_BY_NAME["gradmon_rank_info"].labels}
    info |= {"run": run, "rank": str(rank.number)}  # as the path says: there a label set can't be twice
    if not identity.gpu_pci_bus_id and identity.gpu_uuid in gpus:
        info["gpu_pci_bus_id"] = gpus[identity.gpu_uuid].pci_bus_id
    yield "gradmon_rank_info", tuple(info.values()), 1.0
    for name, field in RANK_GAUGES.items():
        if field in rank.gauges:
            yield name, labels, rank.gauges[field]
    yield "gradmon_rank_up", labels, float(rank.living)
    yield "gradmon_rank_finished", labels, float(view.state == "finished")
    yield "gradmon_rank_failed", labels, float(view.state == "exception")
    if rank.living:
        since = time.monotonic() - rank.looked_monotonic
        yield "gradmon_last_step_age_seconds", labels, view.step_age_seconds + since
        yield "gradmon_last_heartbeat_age_seconds", labels, view.beat_age_seconds + since
    # Also where the writer never paused, and 0 for one killed in a pause.
    yield _PAUSED, labels, float(rank.living and view.samples.get("paused", 0.0) > 0)
    for name, value in _resources(rank, ("run", "rank")):
        if name != _PAUSED:
            yield name, labels, value
    yield from _counter_samples(run, rank, of_rank=True)


def _host_samples(runs: list[Run]) -> Iterator[Sample]:
    """Each host once, though all its ranks tell of it: the word of the one that was heard of last."""
    living = [rank for run in runs for rank in run.ranks().values() if rank.living]
    newest: dict[tuple[str, str], float] = {}
    for rank in sorted(living, key=lambda rank: rank.view.beat_seconds):
        newest |= {(name, rank.view.identity.host): value for name, value in _resources(rank, ("host",))}
    for (name, host), value in newest.items():
        yield name, (host,), value


def _resources(rank: Rank, labels: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """What the rank's newest sample says for metrics with these labels."""
    for key, value in rank.view.samples.items():
        name = SAMPLE_METRICS.get(key)
        if name is not None and METRICS_BY_NAME[name].labels == labels and math.isfinite(value):
            yield name, value


def _gpu_samples(runs: list[Run], gpus: Gpus) -> Iterator[Sample]:
    """What the driver says of each rank's GPU.

    A rank that ended keeps its GPU until another uses it: what killed it may be counted only after its end. Later the
    GPU's numbers are no longer its own.
    """
    users: dict[str, list[tuple[Run, Rank]]] = {}
    for run in runs:
        for rank in run.ranks().values():
            users.setdefault(rank.view.identity.gpu_uuid, []).append((run, rank))
    for uuid, gpu in gpus.items():
        ranks = users.get(uuid, [])
        living = [(run, rank) for run, rank in ranks if rank.living]
        last = sorted(ranks, key=lambda user: user[1].view.identity.started_seconds)[-1:]
        for run, rank in living or last:
            for name, labels, value in gpu.readings:
                yield name, (run.name, str(rank.number), *labels), value


def _counter_samples(run: str, rank: Rank, *, of_rank: bool) -> Iterator[Sample]:
    """The counters labelled by rank, or those that are not. A name METRICS does not know is left out."""
    place = (run, str(rank.number)) if of_rank else (run,)
    for (name, labels), value in sorted(rank.counters().items()):
        metric = METRICS_BY_NAME.get(name)
        if metric is not None and ("rank" in metric.labels) == of_rank:
            yield name, (*place, *labels), float(value)


def _agent(store: Store) -> Iterator[Sample]:
    errors: Counter[str] = store.errors
    for part, count in sorted(errors.items()):
        yield "gradmon_agent_errors_total", (part,), float(count)
    yield "gradmon_agent_journals", (), float(store.journals)
    yield "gradmon_agent_info", (socket.gethostname(), __version__), 1.0
