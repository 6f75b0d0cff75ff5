"""What happens to a simulated run: changes of single metrics, put together to faults as gradmon would show them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from values import GIB, LAYERS, MIB


@dataclass(frozen=True, slots=True)
class Change:
    """From `since` to `until` (seconds after the run's start) a metric shows something else.

    Attributes:
        metric: its name.
        rank: the only rank that changes; None: all of them.
        labels: the only labels after run and rank that change; (): all of them.
        put: shown instead.
        factor: the value is multiplied by it, less and less if `fade` seconds are given.
        rate: added per second, and kept after `until`.
        gone: the series is not there.
    """

    metric: str
    since: float
    until: float = math.inf
    rank: int | None = None
    labels: tuple[str, ...] = ()
    put: float | None = None
    factor: float = 1.0
    fade: float = math.inf
    rate: float = 0.0
    gone: bool = False

    def apply(self, value: float | None, elapsed: float) -> float | None:
        """The value of a series that this change is for."""
        since = elapsed - self.since
        if value is None or since < 0:
            return value
        if elapsed < self.until:
            if self.gone:
                return None
            value = value if self.put is None else self.put
            value *= 1.0 + (self.factor - 1.0) * math.exp(-since / self.fade)
        return value + self.rate * min(since, self.until - self.since)


class Incident(NamedTuple):
    """Shown as the newest one from `since` on."""

    since: float
    rank: str
    parameter: str
    kind: str


class Scenario(NamedTuple):
    """All that happens to a run."""

    changes: tuple[Change, ...] = ()
    incidents: tuple[Incident, ...] = ()
    hangs: float = math.inf
    """Seconds after the run's start at which it makes its last step."""

    def __add__(self, other: Scenario) -> Scenario:  # type: ignore[override]
        """Both happen."""
        return Scenario(self.changes + other.changes, self.incidents + other.incidents, min(self.hangs, other.hangs))


def _count(metric: str, since: float, count: float, seconds: float, **selected: object) -> Change:
    """A counter grows by `count` within `seconds`."""
    return Change(metric, since, since + seconds, rate=count / seconds, **selected)  # type: ignore[arg-type]


def _action(since: float, count: float, seconds: float, *labels: str, applied: str = "yes") -> Change:
    return _count("gradmon_actions_total", since, count, seconds, labels=(*labels, applied))


def _event(since: float, kind: str) -> Change:
    return _count("gradmon_events_total", since, 1.0, 0.5, labels=(kind,))


def _incident(since: float, rank: int, layer: str, kind: str, count: float, seconds: float) -> Scenario:
    counted = _count("gradmon_incidents_total", since, count, seconds, rank=rank, labels=(kind,))
    return Scenario((counted,), (Incident(since, str(rank), f"{layer}.attn.weight", kind),))


def spikes(since: float, seconds: float, rank: int, *, factor: float, count: float, applied: str = "yes") -> Scenario:
    """The norm is `factor` times its level, because of one rank; rescaled, then skipped."""
    until = since + seconds
    layer = LAYERS[5]
    globally = ("gradmon_grad_norm", "gradmon_grad_abs_max", "gradmon_grad_min", "gradmon_grad_max")
    changes = [Change(name, since, until, factor=factor) for name in globally]
    changes += [
        Change("gradmon_local_grad_norm_max", since, until, factor=3 * factor),
        Change("gradmon_local_grad_norm_rms", since, until, factor=1.2 * factor),
        Change("gradmon_local_grad_norm", since, until, factor=3 * factor, rank=rank),
        Change("gradmon_layer_grad_norm", since, until, factor=2.5 * factor, labels=(layer,)),
        Change("gradmon_layer_grad_norm", since, until, factor=factor / 2, labels=(LAYERS[6],)),
        Change("gradmon_layer_grad_abs_max", since, until, factor=4 * factor, labels=(layer,)),
        _action(since, max(1.0, count // 4), seconds, "rescale", "spike", applied=applied),
        _action(since, count - max(1.0, count // 4), seconds, "skip", "spike", applied=applied),
    ]
    return Scenario(tuple(changes)) + _incident(since, rank, layer, "spike", count, seconds)


def nonfinite(since: float, seconds: float, rank: int, *, count: float, applied: str = "yes") -> Scenario:
    """One rank's gradients hold NaN in `count` steps; these are skipped."""
    layer, until = LAYERS[12], since + max(seconds, 10.0)
    elements = _count(
        "gradmon_local_nonfinite_elements_total", since, 4096 * count, seconds, rank=rank, labels=("nan",)
    )
    changes = (
        _count("gradmon_nonfinite_steps_total", since, count, seconds),
        _count("gradmon_nonfinite_elements_total", since, 4096 * count, seconds, labels=("nan",)),
        elements,
        _action(since, count, seconds, "skip", "nonfinite", applied=applied),
        Change("gradmon_layer_nonfinite_elements", since, until, put=4096.0, labels=(layer,)),
        Change("gradmon_healthy_ranks", since, until, rate=-1.0 / seconds),
        Change("gradmon_grad_norm_applied", since, until, put=0.0),
        Change("gradmon_healthy", since, until, put=0.0),
    )
    # `rate` stays after its end, so the rank that is well again is given back.
    back = Change("gradmon_healthy_ranks", until, until + seconds, rate=1.0 / seconds)
    return Scenario((*changes, back)) + _incident(since, rank, layer, "nonfinite", count, seconds)


def backoff(since: float, *, fade: float, applied: str = "yes") -> Scenario:
    """The learning rate is lowered after a streak of spikes, and comes back."""
    lowered = Change("gradmon_learning_rate_scale_ratio", since, factor=0.3, fade=fade)
    done = _action(since, 1.0, 0.5, "backoff", "spike_streak", applied=applied)
    return Scenario((_event(since, "spike_streak"), done, *((lowered,) if applied == "yes" else ())))


def story(seed_rank: int = 1) -> Scenario:
    """An hour worth looking at: a spike, NaN, a learning rate set wrong and healed, a straggler, memory that grows."""
    losses = ("gradmon_mean_loss", "gradmon_max_loss", "gradmon_loss")
    wrong_rate = [
        Change("gradmon_learning_rate", 2400.0, 2440.0, factor=12.0),
        *(Change(name, 2420.0, factor=1.28, fade=150.0) for name in losses),
        Change("gradmon_validation_loss", 2460.0, factor=1.15, fade=240.0),
        Change("gradmon_update_ratio", 2400.0, 2440.0, factor=9.0),
        Change("gradmon_healthy", 2400.0, 2640.0, put=0.0),
    ]
    # A learning rate that is too high widens the gap: the run learns its training data by heart.
    gap = [Change("gradmon_validation_loss", 2800.0, rate=2.5e-5)]
    slow = [
        Change("gradmon_busy_seconds_total", 1500.0, 2100.0, rank=3, rate=0.22),
        Change("gradmon_step_duration_seconds", 1500.0, 2100.0, factor=1.3),
        Change("gradmon_gpu_throttled", 1500.0, 2100.0, rank=3, labels=("hw_thermal_slowdown",), put=1.0),
        Change("gradmon_gpu_temperature_celsius", 1480.0, 2130.0, rank=3, factor=1.42),
        Change("gradmon_gpu_power_watts", 1500.0, 2100.0, rank=3, factor=0.7),
    ]
    grows = [
        Change("gradmon_gpu_memory_allocated_bytes", 900.0, rank=2, rate=6 * MIB),
        Change("gradmon_gpu_memory_peak_allocated_bytes", 1700.0, rank=2, rate=6 * MIB),
        Change("gradmon_gpu_memory_reserved_bytes", 2100.0, rank=2, rate=6 * MIB),
        Change("gradmon_gpu_device_memory_used_bytes", 2100.0, rank=2, rate=6 * MIB),
    ]
    saves = [Change("gradmon_paused", at, at + 25.0, put=1.0) for at in (600.0, 1200.0, 1800.0, 3000.0)]
    bad_data = [_count("gradmon_data_findings_total", 1280.0, 2.0, 40.0, rank=5)]
    told = Scenario(tuple(wrong_rate + gap + slow + grows + saves + bad_data))
    told += spikes(720.0, 10.0, seed_rank, factor=9.0, count=2.0)
    told += nonfinite(1300.0, 4.0, 5, count=3.0)
    told += spikes(2405.0, 45.0, 0, factor=5.0, count=6.0)
    return told + backoff(2420.0, fade=140.0)


def broken(at: float, early: float) -> dict[str, Scenario]:
    """Name of a run -> what breaks `at` so many seconds after its start, for good; together all that alerts tell of.

    What is seen only over hours, a loss that stands still or a leak, begins `early` so many seconds after the start,
    and a hang, which is told of after ten minutes, a quarter of an hour before the rest.
    """
    return {
        "explodes": _explodes(at),
        "stops": nonfinite(at, 1e6, 1, count=1e6) + _stops(at, "skip_streak") + _stops(at, "diverging"),
        "watched": spikes(at, 1e6, 2, factor=30.0, count=1e6, applied="no") + backoff(at, fade=1e9, applied="no"),
        "healed": spikes(at, 3.0, 1, factor=9.0, count=4.0) + nonfinite(at + 5.0, 3.0, 1, count=4.0),
        "leaves-out": _leaves_out(at),
        "vanishes": Scenario((Change("gradmon_grad_norm", at, factor=1e-7), _event(at, "vanish"))),
        "replicas": Scenario((_event(at, "replicas"),)) + _stops(at, "replicas"),
        "overflows": Scenario(
            (
                Change("gradmon_scaler_skips_total", at, rate=2.0),
                Change("gradmon_loss_scale", at, put=1.0),
            )
        )
        + _stops(at, "scaler_streak"),
        "learns-nothing": _learns_nothing(at, early),
        "hangs": Scenario(hangs=at - 900.0),
        "freezes": Scenario(
            (Change("gradmon_last_heartbeat_age_seconds", at - 900.0, rank=3, put=0.0, rate=1.0),), hangs=at - 900.0
        ),
        "pauses": Scenario((Change("gradmon_paused", at, put=1.0),), hangs=at),
        "killed": Scenario(_ended(at, 2)),
        "fails": Scenario((*_ended(at, 1), Change("gradmon_rank_failed", at, rank=1, put=1.0))),
        "slow": _slow(at),
        "gpus": _gpus(at, early),
        "hosts": _hosts(at, early),
        "unwell": Scenario(
            (
                Change("gradmon_errors_total", at, rate=0.5, rank=0),
                Change("gradmon_agent_errors_total", at, rate=0.5),
                Change("gradmon_series_dropped", at, put=480.0),
            )
        ),
    }


def _stops(at: float, why: str) -> Scenario:
    kind = () if why in ("diverging", "replicas") else (_event(at, why),)
    return Scenario((*kind, _action(at, 1.0, 0.5, "stop", why)))


def _explodes(at: float) -> Scenario:
    losses = ("gradmon_mean_loss", "gradmon_max_loss", "gradmon_loss")
    changes = [Change(name, at, factor=3.0) for name in losses]
    changes += [_event(at, "drift"), _event(at, "diverging"), _action(at, 3.0, 5.0, "rollback", "diverging")]
    changes += [Change("gradmon_healthy", at, put=0.0)]
    return spikes(at, 1e6, 1, factor=30.0, count=1e6) + backoff(at, fade=1e9) + Scenario(tuple(changes))


def _leaves_out(at: float) -> Scenario:
    changes = (
        Change("gradmon_left_out_steps_total", at, rate=2.0, rank=2),
        Change("gradmon_incidents_total", at, rate=2.0, rank=2, labels=("left_out",)),
        Change("gradmon_local_nonfinite_elements_total", at, rate=900.0, rank=2, labels=("nan",)),
        Change("gradmon_healthy_ranks", at, factor=0.75),
        Change("gradmon_actions_total", at, rate=2.0, labels=("leave_out", "left_out", "yes")),
        _event(at, "left_out_streak"),
    )
    return Scenario(changes, (Incident(at, "2", f"{LAYERS[3]}.mlp.weight", "left_out"),))


def _learns_nothing(at: float, early: float) -> Scenario:
    losses = ("gradmon_mean_loss", "gradmon_max_loss", "gradmon_loss")
    return Scenario(
        (
            *(Change(name, early, put=3.2) for name in losses),
            *(Change(name, early + 1.0, rate=1e-5) for name in losses),
            Change("gradmon_validation_loss", early, put=5.0),
            Change("gradmon_nonfinite_losses_total", at, rate=1.0, rank=1),
            Change("gradmon_data_findings_total", at, rate=1.0, rank=1),
            Change("gradmon_early_stop", at, put=1.0),
            _event(at, "loss_flat"),
            _event(at, "weights_unchanged"),
        )
    )


def _ended(at: float, rank: int) -> tuple[Change, ...]:
    """What is shown of a rank whose process is gone."""
    ages = ("gradmon_last_step_age_seconds", "gradmon_last_heartbeat_age_seconds")
    return (
        Change("gradmon_rank_up", at, rank=rank, put=0.0),
        *(Change(name, at, rank=rank, gone=True) for name in ages),
    )


def _slow(at: float) -> Scenario:
    return Scenario(
        (
            Change("gradmon_busy_seconds_total", at, rank=3, rate=0.7),
            Change("gradmon_step_duration_seconds", at, factor=2.0),
            Change("gradmon_data_wait_seconds_total", at, rate=0.9),
        )
    )


def _gpus(at: float, early: float) -> Scenario:
    leak = 6 * GIB / 3600.0
    return Scenario(
        (
            Change("gradmon_gpu_memory_allocated_bytes", early, rank=1, rate=leak),
            Change("gradmon_gpu_memory_peak_allocated_bytes", at, rank=1, put=79.0 * GIB),
            Change("gradmon_gpu_memory_peak_reserved_bytes", at, rank=1, put=79.5 * GIB),
            Change("gradmon_gpu_memory_reserved_bytes", at, rank=1, put=79.5 * GIB),
            Change("gradmon_gpu_device_memory_used_bytes", at, rank=1, put=79.8 * GIB),
            Change("gradmon_gpu_memory_inactive_split_bytes", at, rank=2, put=30 * GIB),
            Change("gradmon_gpu_allocator_retries_total", at, rank=1, rate=1.0),
            Change("gradmon_gpu_allocator_ooms_total", at, rank=1, rate=0.2),
            Change("gradmon_gpu_temperature_celsius", at, rank=2, put=96.0),
            Change("gradmon_gpu_throttled", at, rank=2, put=1.0),
            Change("gradmon_gpu_ecc_errors_total", at, rank=0, rate=2.0),
            Change("gradmon_gpu_nvlink_errors_total", at, rank=0, rate=20.0),
            Change("gradmon_gpu_utilisation_ratio", at, rank=2, put=0.02),
        )
    )


def _hosts(at: float, early: float) -> Scenario:
    return Scenario(
        (
            Change("gradmon_host_memory_available_bytes", at, put=8 * GIB),
            Change("gradmon_host_swap_used_bytes", at, put=0.0, rate=256 * MIB),
            Change("gradmon_host_load_average", at, put=900.0),
            Change("gradmon_process_resident_memory_bytes", early, rank=0, rate=20 * MIB),
            Change("gradmon_process_open_fds", early, rank=0, rate=2.0),
        )
    )
