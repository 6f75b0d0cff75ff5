"""The store's runs as Prometheus metrics. Names, labels, kinds and help come from METRICS, nothing is typed twice.

prometheus_client renders and negotiates the format; the values are collected afresh for each exposition, at most once
a second.
"""

from __future__ import annotations

import logging
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
from gradmon.agent.gpus import Reading
from gradmon.agent.layer_gauges import LAYER_GAUGES
from gradmon.agent.store import LIVING, Rank, Run, Store
from gradmon.metrics import METRICS, METRICS_BY_NAME, RESOURCE_METRICS

logger = logging.getLogger("gradmon.agent")

#: An exposition is used again for this long: two Prometheus servers and a curious person cost one rendering.
CACHE_SECONDS = 1.0
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
    "gradmon_last_step_timestamp_seconds": "wall_seconds",
    "gradmon_step_duration_seconds": "step_seconds",
}

#: One sample: a metric's name, its labels in the order METRICS lists them, the value.
Sample = tuple[str, tuple[str, ...], float]
#: UUID of a GPU -> what the driver says of it now.
Readings = Mapping[str, list[Reading]]


class Exporter:
    """Renders /metrics. A part that fails is left out and counted; the scrape never fails with it."""

    def __init__(self, store: Store, gpus: Callable[[], Readings] = dict) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StoreCollector(store, gpus))
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[float, bytes]] = {}

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format the Accept header asks for."""
        encoder, content_type = choose_encoder(accept)
        with self._lock:
            made, body = self._cache.get(content_type, (float("-inf"), b""))
            if time.monotonic() - made > CACHE_SECONDS:
                body = encoder(self._registry)
                self._cache[content_type] = (time.monotonic(), body)
        return body, content_type


class _StoreCollector(Collector):
    def __init__(self, store: Store, gpus: Callable[[], Readings]) -> None:
        self._store = store
        self._gpus = gpus

    def describe(self) -> Iterable[Family]:
        return ()  # without this, registering would collect once

    def collect(self) -> Iterator[Family]:
        families = {m.name: _family(m.name) for m in METRICS}
        errors = self._store.errors
        with self._store.lock:
            for part in self._parts():
                try:
                    samples = list(part)
                except Exception:
                    errors["exporter"] += 1
                    logger.exception("a run could not be exported")
                    continue
                for name, labels, value in samples:
                    families[name].add_metric(labels, value)
        for name, labels, value in _agent(self._store):  # last, so that it counts what failed just now
            families[name].add_metric(labels, value)
        yield from (family for family in families.values() if family.samples)

    def _parts(self) -> Iterator[Iterator[Sample]]:
        """What may fail apart from each other."""
        now = time.time()
        runs = [
            run
            for run in self._store.runs
            if run.instance.living or now - run.instance.last_seen_seconds <= ENDED_SECONDS
        ]
        yield _gpu_samples(runs, self._gpus)
        for run in runs:
            ranks = run.ranks()
            if 0 in ranks:  # equal on all ranks, so one of them, on whatever node, tells it
                yield _run_samples(run, ranks[0])
                yield _layer_samples(run, ranks[0])
            for rank in ranks.values():
                yield _rank_samples(run.name, rank)


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
    for key, name in RESOURCE_METRICS.items():
        if key in rank.view.samples and "rank" not in METRICS_BY_NAME[name].labels:
            yield name, labels, rank.view.samples[key]
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


def _layer_samples(run: Run, rank: Rank) -> Iterator[Sample]:
    """What the run's `metrics` settings allow; the values were taken in when they were read, not now."""
    gauges = rank.layers
    yield "gradmon_series_dropped", (run.name,), 0.0 if gauges is None else float(gauges.dropped)
    if gauges is not None:
        for layer, values in gauges.values.items():
            for name, field in LAYER_GAUGES.items():
                if field in values:
                    yield name, (run.name, layer), values[field]


def _rank_samples(run: str, rank: Rank) -> Iterator[Sample]:
    view = rank.view
    identity = view.identity
    labels = (run, str(rank.number))
    info = {name: str(getattr(identity, name)) for name in METRICS_BY_NAME["gradmon_rank_info"].labels}
    info |= {"run": run, "rank": str(rank.number)}  # as the path says: there a label set can't be twice
    yield "gradmon_rank_info", tuple(info.values()), 1.0
    for name, field in RANK_GAUGES.items():
        if field in rank.gauges:
            yield name, labels, rank.gauges[field]
    yield "gradmon_rank_up", labels, float(view.state in LIVING)
    yield "gradmon_rank_finished", labels, float(view.state == "finished")
    yield "gradmon_last_heartbeat_timestamp_seconds", labels, view.beat_seconds
    for key, name in RESOURCE_METRICS.items():
        if key in view.samples and "rank" in METRICS_BY_NAME[name].labels:
            yield name, labels, view.samples[key]
    yield from _counter_samples(run, rank, of_rank=True)


def _gpu_samples(runs: list[Run], gpus: Callable[[], Readings]) -> Iterator[Sample]:
    """What the driver says of each rank's GPU.

    A rank that ended keeps its GPU until another uses it: what killed it may be counted only after its end. Later the
    GPU's numbers are no longer its own.
    """
    users: dict[str, list[tuple[Run, Rank]]] = {}
    for run in runs:
        for rank in run.ranks().values():
            users.setdefault(rank.view.identity.gpu_uuid, []).append((run, rank))
    for uuid, of_gpu in gpus().items():
        ranks = users.get(uuid, [])
        living = [(run, rank) for run, rank in ranks if rank.view.state in LIVING]
        last = sorted(ranks, key=lambda user: user[1].view.identity.started_seconds)[-1:]
        for run, rank in living or last:
            for name, labels, value in of_gpu:
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
