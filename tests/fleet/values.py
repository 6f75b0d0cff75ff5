"""What each metric of a simulated run shows at a moment: plausible, moving, and the same again for the same moment.

Every value is a function of the time alone, so that history can be written for any span and goes on without a seam in
the scrapes that follow. Counters only grow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from gradmon import __version__
from gradmon.metrics import METRICS_BY_NAME
from gradmon.record import StreakReason, WatchReason

GIB = float(2**30)
MIB = float(2**20)

#: The gradmon layers of a small GPT: token embedding, blocks, final norm.
LAYERS = ("transformer.wte", *(f"transformer.h.{i}" for i in range(22)), "transformer.ln_f")
EVENT_KINDS = (*get_args(StreakReason), *get_args(WatchReason))
ACTIONS = (
    ("rescale", "spike"), ("skip", "spike"), ("rescale", "max_norm"), ("skip", "nonfinite"), ("leave_out", "left_out"),
    ("backoff", "spike_streak"), ("rollback", "diverging"), ("stop", "skip_streak"), ("stop", "scaler_streak"),
    ("stop", "diverging"), ("stop", "replicas"),
)  # fmt: skip
INCIDENT_KINDS = ("spike", "nonfinite", "left_out")
NONFINITE_KINDS = ("nan", "inf")
THROTTLE_REASONS = (
    "sw_power_cap", "hw_slowdown", "hw_thermal_slowdown", "hw_power_brake", "sw_thermal_slowdown", "sync_boost",
)  # fmt: skip
BUSY_RATIO = 0.7
"""Share of a step that a rank is busy before its gradients meet the others'."""

_GENERATOR = random.Random(5)
#: Normal noise, looked up and not drawn: a node has hundreds of values per scrape.
_NOISE = [_GENERATOR.gauss(0.0, 1.0) for _ in range(4096)]


def noise(seed: int, place: int, step: int) -> float:
    """A standard normal value, the same for the same arguments."""
    return _NOISE[(seed * 2221 + place * 1627 + step * 389) & 4095]


class Moment(NamedTuple):
    """A run at one time, before any scenario changes it."""

    elapsed: float
    step: int
    step_seconds: float
    world_size: int
    seed: int
    norm: float
    loss: float
    learning_rate: float

    def near(self, centre: float, spread: float, place: int) -> float:
        """A value around `centre`, whose noise has the share `spread` and is new in each step."""
        return centre * (1.0 + spread * noise(self.seed, place, self.step))


def moment(elapsed: float, step_seconds: float, world_size: int, seed: int, hangs: float = math.inf) -> Moment:
    """The run `elapsed` seconds after its start: the norm is log-normal around a decay, the loss a power law.

    It makes no step after `hangs` seconds.
    """
    elapsed = max(0.0, elapsed)
    step = int(min(elapsed, hangs) / step_seconds)
    norm = (0.25 + 2.5 / math.sqrt(1.0 + step / 150.0)) * math.exp(0.08 * noise(seed, 1, step))
    loss = (1.7 + 9.0 * (1.0 + step / 10.0) ** -0.3) * (1.0 + 0.002 * noise(seed, 2, step))
    rate = 3e-4 * min(1.0, (step + 1) / 200.0) * (0.55 + 0.45 * math.cos(min(1.0, step / 60_000.0) * math.pi))
    return Moment(elapsed, step, step_seconds, world_size, seed, norm, loss, rate)


#: A value at a moment, of a rank (the node's first one where the metric has none) and the labels after run and rank.
Value = Callable[[Moment, int, Sequence[str]], float]


def _counted(per_second: float) -> Value:
    return lambda m, _rank, _labels: per_second * m.elapsed


def _around(centre: float, spread: float) -> Value:
    return lambda m, rank, _labels: m.near(centre, spread, rank)


def _layer_norm(m: Moment, _rank: int, labels: Sequence[str]) -> float:
    place = LAYERS.index(labels[0])
    share = (1.6 - place / len(LAYERS)) / math.sqrt(len(LAYERS))
    return m.norm * share * math.exp(0.1 * noise(m.seed, 40 + place, m.step // 10))


def _layer_update(m: Moment, _rank: int, labels: Sequence[str]) -> float:
    return m.near(1e-3, 0.1, 80 + LAYERS.index(labels[0]))


def _steady(centre: float, spread: float) -> Value:
    """A constant of each rank, for what hardly moves: peaks, reserved memory."""
    return lambda m, rank, _labels: centre * (1.0 + spread * noise(m.seed, rank, 0))


def _busy(m: Moment, rank: int, _labels: Sequence[str]) -> float:
    return m.step * m.step_seconds * BUSY_RATIO * (1.0 + 0.01 * noise(m.seed, rank, 0))


#: Metric -> its value, or a number where it stands still.
VALUES: dict[str, float | Value] = {
    "gradmon_run_info": 1.0,
    "gradmon_rank_info": 1.0,
    "gradmon_world_size": lambda m, _rank, _labels: float(m.world_size),
    "gradmon_grad_norm": lambda m, _rank, _labels: m.norm,
    "gradmon_grad_norm_applied": lambda m, _rank, _labels: min(m.norm, 1.0),
    "gradmon_grad_norm_limit": lambda m, _rank, _labels: 4.0 * (0.25 + 2.5 / math.sqrt(1.0 + m.step / 150.0)),
    "gradmon_learning_rate": lambda m, _rank, _labels: m.learning_rate,
    "gradmon_learning_rate_scale_ratio": 1.0,
    "gradmon_nonfinite_steps_total": 0.0,
    "gradmon_actions_total": 0.0,
    "gradmon_events_total": 0.0,
    "gradmon_healthy": 1.0,
    "gradmon_last_healthy_step": lambda m, _rank, _labels: float(m.step),
    # The incidents' own series say these: see SimulatedRun.
    "gradmon_last_incident_info": 1.0,
    "gradmon_last_incident_step": 0.0,
    "gradmon_last_incident_timestamp_seconds": 0.0,
    "gradmon_grad_abs_max": lambda m, _rank, _labels: 0.04 * m.norm,
    "gradmon_grad_min": lambda m, _rank, _labels: -0.04 * m.norm,
    "gradmon_grad_max": lambda m, _rank, _labels: 0.038 * m.norm,
    "gradmon_grad_zero_ratio": _around(0.02, 0.05),
    "gradmon_local_grad_norm_rms": lambda m, _rank, _labels: 1.5 * m.norm,
    "gradmon_local_grad_norm_max": lambda m, _rank, _labels: 1.8 * m.norm,
    "gradmon_healthy_ranks": lambda m, _rank, _labels: float(m.world_size),
    "gradmon_mean_loss": lambda m, _rank, _labels: m.loss,
    "gradmon_max_loss": lambda m, _rank, _labels: 1.04 * m.loss,
    "gradmon_validation_loss": lambda m, _rank, _labels: 1.02 * m.loss,
    "gradmon_early_stop": 0.0,
    "gradmon_loss_scale": 65536.0,
    "gradmon_scaler_skips_total": 0.0,
    "gradmon_grad_noise_scale_ratio": lambda m, _rank, _labels: m.near(0.5 + m.step / (m.step + 5000.0), 0.03, 3),
    "gradmon_update_ratio": _around(1.2e-3, 0.05),
    "gradmon_first_moment_norm": lambda m, _rank, _labels: 0.3 * m.norm,
    "gradmon_second_moment_norm": lambda m, _rank, _labels: 1e-4 * m.norm**2,
    "gradmon_layer_grad_norm": _layer_norm,
    "gradmon_layer_grad_abs_max": lambda m, rank, labels: 0.05 * _layer_norm(m, rank, labels),
    "gradmon_layer_nonfinite_elements": 0.0,
    "gradmon_layer_grad_zero_ratio": lambda m, _rank, labels: 0.93 if labels[0].endswith("wte") else 0.01,
    "gradmon_layer_update_ratio": _layer_update,
    "gradmon_series_dropped": 0.0,
    "gradmon_steps_total": lambda m, _rank, _labels: float(m.step),
    "gradmon_local_grad_norm": lambda m, rank, _labels: 1.5 * m.norm * math.exp(0.1 * noise(m.seed, rank, m.step)),
    "gradmon_local_nonfinite_elements_total": 0.0,
    "gradmon_nonfinite_elements_total": 0.0,
    "gradmon_incidents_total": 0.0,
    "gradmon_left_out_steps_total": 0.0,
    "gradmon_loss": lambda m, rank, _labels: m.near(m.loss, 0.015, rank),
    "gradmon_nonfinite_losses_total": 0.0,
    "gradmon_data_findings_total": 0.0,
    "gradmon_class_imbalance_ratio": _steady(1.4, 0.05),
    "gradmon_token_share_ratio": _steady(0.06, 0.05),
    "gradmon_last_step_age_seconds": lambda m, _rank, _labels: m.elapsed - m.step * m.step_seconds,
    "gradmon_step_duration_seconds": lambda m, rank, _labels: m.near(m.step_seconds, 0.01, rank),
    "gradmon_busy_seconds_total": _busy,
    "gradmon_data_wait_seconds_total": _counted(0.01),
    "gradmon_paused": 0.0,
    "gradmon_rank_up": 1.0,
    "gradmon_rank_finished": 0.0,
    "gradmon_rank_failed": 0.0,
    "gradmon_last_heartbeat_age_seconds": lambda m, rank, _labels: (m.elapsed + 0.7 * rank) % 5.0,
    "gradmon_process_resident_memory_bytes": _around(6 * GIB, 0.002),
    "gradmon_snapshot_memory_bytes": 9 * GIB,
    "gradmon_process_cpu_seconds_total": _counted(1.3),
    "gradmon_process_threads": 64.0,
    "gradmon_process_open_fds": _around(210.0, 0.02),
    "gradmon_process_read_bytes_total": _counted(8 * MIB),
    "gradmon_process_written_bytes_total": _counted(1 * MIB),
    "gradmon_host_memory_available_bytes": _around(1400 * GIB, 0.003),
    "gradmon_host_memory_capacity_bytes": 2000 * GIB,
    "gradmon_host_swap_used_bytes": 0.0,
    "gradmon_host_load_average": _around(14.0, 0.1),
    "gradmon_host_cpus": 96.0,
    "gradmon_gpu_memory_allocated_bytes": _around(52 * GIB, 0.004),
    "gradmon_gpu_memory_reserved_bytes": _steady(60 * GIB, 0.002),
    "gradmon_gpu_memory_peak_allocated_bytes": _steady(57 * GIB, 0.002),
    "gradmon_gpu_memory_peak_reserved_bytes": _steady(60.5 * GIB, 0.002),
    "gradmon_gpu_memory_inactive_split_bytes": _around(1.2 * GIB, 0.05),
    "gradmon_gpu_memory_capacity_bytes": 80 * GIB,
    "gradmon_gpu_allocator_retries_total": 0.0,
    "gradmon_gpu_allocator_ooms_total": 0.0,
    "gradmon_gpu_device_memory_used_bytes": _steady(62 * GIB, 0.002),
    "gradmon_gpu_device_memory_capacity_bytes": 80 * GIB,
    "gradmon_gpu_utilisation_ratio": lambda m, rank, _labels: min(1.0, m.near(0.96, 0.02, rank)),
    "gradmon_gpu_power_watts": _around(640.0, 0.02),
    "gradmon_gpu_temperature_celsius": lambda m, rank, _labels: float(round(m.near(61.0, 0.03, rank))),
    "gradmon_gpu_throttled": 0.0,
    "gradmon_gpu_ecc_errors_total": 0.0,
    "gradmon_gpu_nvlink_errors_total": 0.0,
    "gradmon_errors_total": 0.0,
    "gradmon_agent_errors_total": 0.0,
    "gradmon_agent_journals": 8.0,
    "gradmon_agent_info": 1.0,
}

#: Metric -> the labels after run and rank of each of its series; a metric that is not here has one series without any.
LABELS: dict[str, tuple[tuple[str, ...], ...]] = {
    **{m.name: tuple((layer,) for layer in LAYERS) for m in METRICS_BY_NAME.values() if m.labels == ("run", "layer")},
    "gradmon_actions_total": ACTIONS,  # and whether it was applied
    "gradmon_events_total": tuple((kind,) for kind in EVENT_KINDS),
    "gradmon_local_nonfinite_elements_total": tuple((kind,) for kind in NONFINITE_KINDS),
    "gradmon_nonfinite_elements_total": tuple((kind,) for kind in NONFINITE_KINDS),
    "gradmon_incidents_total": tuple((kind,) for kind in INCIDENT_KINDS),
    "gradmon_gpu_throttled": tuple((reason,) for reason in THROTTLE_REASONS),
    "gradmon_gpu_ecc_errors_total": (("corrected",), ("uncorrected",)),
    "gradmon_gpu_nvlink_errors_total": (("replay",), ("recovery",), ("crc",)),
    "gradmon_errors_total": (("journal",),),
    "gradmon_agent_errors_total": (("exporter",),),
}


def constant_labels(name: str, *, run: str, host: str, rank: int, rank_in_node: int, world_size: int, mode: str) -> str:
    """The labels after run and rank of an info metric, as they stand in an exposition; empty for all others."""
    labels = {
        "gradmon_run_info": {
            "run_instance": f"{run}-4711", "attempt": "0", "world_size": world_size, "mode": mode,
            "topology": "ddp", "script": "train.py", "version": __version__,
        },
        "gradmon_rank_info": {
            "local_rank": rank_in_node, "host": host, "world_size": world_size, "device": f"cuda:{rank_in_node}",
            "gpu_uuid": f"GPU-{rank:08x}-0000-4000-8000-{rank:012x}",
            "gpu_pci_bus_id": f"00000000:{16 + rank_in_node:02X}:00.0",
        },
        "gradmon_agent_info": {"version": __version__},
    }.get(name, {})  # fmt: skip
    return ",".join(f'{key}="{value}"' for key, value in labels.items())
