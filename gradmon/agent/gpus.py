"""What the GPU's driver knows: memory, load, power, temperature, throttling and errors of each GPU of this node.

Asked through NVML, here in the agent and on a thread of its own: a driver call that hangs stops neither a rank's
heartbeat nor a scrape. Scrapes are given the newest finished sample, and none once that is too old. NVML counts all
GPUs that this process may open; CUDA_VISIBLE_DEVICES does not matter to it.

Where the agent can't reach a GPU there are no series, and that is no error: a host without one, a DaemonSet without
the NVIDIA runtime (it needs `runtimeClassName: nvidia`, NVIDIA_VISIBLE_DEVICES=all and
NVIDIA_DRIVER_CAPABILITIES=utility), a missing driver or `nvidia-ml-py`. A slice of a GPU (MIG) has no series either:
the driver measures none of this for slices.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

logger = logging.getLogger("gradmon.agent")

PERIOD_SECONDS = 5.0
#: A sample older than this is not served: better a gap in the graph than a value that stands still.
STALE_SECONDS = 30.0
#: Where NVML can't be opened it is tried again this often: the driver may be loaded after the agent has started.
RETRY_SECONDS = 60.0

#: A metric's name, its labels after run and rank, the value.
Reading = tuple[str, tuple[str, ...], float]


class Gpu(NamedTuple):
    """What the driver says of one GPU."""

    pci_bus_id: str
    """As NVML writes it, `00000000:3B:00.0`; empty where it does not tell."""
    readings: list[Reading]


#: Errors that say "not here": the GPU, its driver or this container has no such thing.
_ABSENT = (
    "NVMLError_NotSupported",
    "NVMLError_FunctionNotFound",
    "NVMLError_NoPermission",
    "NVMLError_ArgumentVersionMismatch",
    "NVMLError_Deprecated",
    "NVMLError_VgpuEccNotSupported",
)
#: Reasons to clock lower that hold a busy GPU back. An idle GPU or a clock set by hand is none.
_THROTTLE_REASONS = {
    "sw_power_cap": "SwPowerCap",
    "hw_slowdown": "HwSlowdown",
    "hw_thermal_slowdown": "HwThermalSlowdown",
    "hw_power_brake": "HwPowerBrakeSlowdown",
    "sw_thermal_slowdown": "SwThermalSlowdown",
    "sync_boost": "SyncBoost",
}
_ECC_KINDS = {
    "corrected": "NVML_MEMORY_ERROR_TYPE_CORRECTED",
    "uncorrected": "NVML_MEMORY_ERROR_TYPE_UNCORRECTED",
}
#: NVLink up to Hopper, counted per link. The field values that add up all links say 0 on Hopper whatever happens.
_LINK_COUNTERS = {
    "replay": ("NVML_NVLINK_ERROR_DL_REPLAY",),
    "recovery": ("NVML_NVLINK_ERROR_DL_RECOVERY",),
    "crc": ("NVML_NVLINK_ERROR_DL_CRC_FLIT", "NVML_NVLINK_ERROR_DL_CRC_DATA"),
}
#: NVLink from Blackwell on, where those above are gone.
_LINK_FIELDS = {
    "receive": "NVML_FI_DEV_NVLINK_COUNT_RCV_ERRORS",
    "recovery": "NVML_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_EVENTS",
}
_ALL_LINKS = 0xFFFFFFFF
_FIELD_MEMBERS = {
    "NVML_VALUE_TYPE_UNSIGNED_INT": "uiVal",
    "NVML_VALUE_TYPE_UNSIGNED_LONG": "ulVal",
    "NVML_VALUE_TYPE_UNSIGNED_LONG_LONG": "ullVal",
    "NVML_VALUE_TYPE_SIGNED_LONG_LONG": "sllVal",
}


def _load() -> Any:
    return importlib.import_module("pynvml")  # the module of nvidia-ml-py


class GpuSampler:
    """Samples all GPUs every few seconds from `start` to `stop`. `errors["nvml"]` counts each failure once.

    Args:
        errors: counters of the agent's failing parts.
        load: gives the `pynvml` module, or raises.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        errors: Counter[str],
        *,
        load: Callable[[], Any] = _load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._errors = errors
        self._load = load
        self._clock = clock
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradmon-gpus", daemon=True)
        # When the newest sample was begun (or, before the first, NVML opened; None without NVML), and what it says.
        # One tuple, put in place at once: readers need no lock that a hung call could hold.
        self._newest: tuple[float | None, dict[str, Gpu]] = (None, {})
        self._failing: set[str] = set()
        self._stale = False
        self._told_absence = False

    def start(self) -> None:
        """Begin to sample; returns at once."""
        self._thread.start()

    def stop(self, timeout: float = 1.0) -> None:
        """End the thread, which closes NVML. One that hangs in the driver is left behind."""
        self._ending.set()
        self._thread.join(timeout)

    def newest(self) -> Mapping[str, Gpu]:
        """UUID of a GPU -> what the newest sample says of it; empty without GPUs, and when that sample is too old."""
        since, readings = self._newest
        if since is None or self._clock() - since <= STALE_SECONDS:
            self._stale = False
            return readings
        if not self._stale:
            self._stale = True
            self._count("a call to the driver hangs")
        return {}

    def _run(self) -> None:
        nvml: Any = None
        while not self._ending.is_set():
            began = self._clock()
            if nvml is None:
                self._newest = (began, {})
                nvml = self._open()
            if nvml is not None:
                try:
                    self._newest = (began, self._sample(nvml))
                except Exception as error:  # not one GPU, but the driver as a whole
                    self._note({"the driver": error})
                    _close(nvml)
                    nvml = None
            if nvml is None:
                self._newest = (None, {})
            self._ending.wait(PERIOD_SECONDS if nvml is not None else RETRY_SECONDS)
        if nvml is not None:
            _close(nvml)

    def _open(self) -> Any:
        try:
            nvml = self._load()
            nvml.nvmlInit()
        except Exception as error:
            if not self._told_absence:
                self._told_absence = True
                logger.debug("no GPU metrics: %s: %s", type(error).__name__, error)
            return None
        return nvml

    def _sample(self, nvml: Any) -> dict[str, Gpu]:
        failed: dict[str, Exception] = {}
        gpus: dict[str, Gpu] = {}
        absent = _absent(nvml)
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                device = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = str(nvml.nvmlDeviceGetUUID(device))
                gpus[uuid] = Gpu(_bus_id(nvml, device), self._read(nvml, device, f"GPU {index}", failed))
            except absent:
                continue  # one that this container may not open
            except Exception as error:
                failed[f"GPU {index}"] = error
        self._note(failed)
        return gpus

    def _read(self, nvml: Any, device: Any, name: str, failed: dict[str, Exception]) -> list[Reading]:
        """All that one GPU tells. What it has not is left out, what fails goes into `failed`; raises if it is lost."""
        readings: list[Reading] = []
        absent = _absent(nvml)
        for what, source in _SOURCES.items():
            try:
                readings += source(nvml, device)
            except absent:
                continue
            except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired):
                raise  # one failure, not one for each thing asked
            except Exception as error:
                failed[f"{what} of {name}"] = error
        return readings

    def _note(self, failed: Mapping[str, Exception]) -> None:
        """Count and log what has begun to fail; what goes on failing is not news."""
        for what, error in failed.items():
            if what not in self._failing:
                self._count(f"{what}: {type(error).__name__}: {error}")
        self._failing = set(failed)

    def _count(self, why: str) -> None:
        self._errors["nvml"] += 1
        logger.warning("GPU metrics are missing: %s", why)


def _close(nvml: Any) -> None:
    with contextlib.suppress(Exception):
        nvml.nvmlShutdown()


def _bus_id(nvml: Any, device: Any) -> str:
    try:
        return str(nvml.nvmlDeviceGetPciInfo(device).busId)
    except Exception:  # the metrics matter more, and they tell of a GPU that is lost
        return ""


def _absent(nvml: Any) -> tuple[type[Exception], ...]:
    """The error classes of _ABSENT that this release of nvidia-ml-py has."""
    return tuple(getattr(nvml, name) for name in _ABSENT if hasattr(nvml, name))


def _ask(nvml: Any, names: tuple[str, ...], *arguments: Any) -> Any:
    """Call the first of `names` that answers: drivers lose old functions and learn new ones over the years.

    Raises:
        NVMLError: the last one's refusal.
    """
    refusal: Exception = nvml.NVMLError(nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    for name in names:
        if hasattr(nvml, name):
            try:
                return getattr(nvml, name)(*arguments)
            except _absent(nvml) as error:
                refusal = error
    raise refusal


def _memory(nvml: Any, device: Any) -> Iterator[Reading]:
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    yield "gradmon_gpu_device_memory_used_bytes", (), float(memory.used)
    yield "gradmon_gpu_device_memory_capacity_bytes", (), float(memory.total)


def _utilisation(nvml: Any, device: Any) -> Iterator[Reading]:
    yield "gradmon_gpu_utilisation_ratio", (), nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100  # percent


def _power(nvml: Any, device: Any) -> Iterator[Reading]:
    yield "gradmon_gpu_power_watts", (), nvml.nvmlDeviceGetPowerUsage(device) / 1000  # milliwatts


def _temperature(nvml: Any, device: Any) -> Iterator[Reading]:
    names = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
    yield "gradmon_gpu_temperature_celsius", (), float(_ask(nvml, names, device, nvml.NVML_TEMPERATURE_GPU))


def _throttling(nvml: Any, device: Any) -> Iterator[Reading]:
    # The new and the old name of the same thing.
    current = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    supported = ("nvmlDeviceGetSupportedClocksEventReasons", "nvmlDeviceGetSupportedClocksThrottleReasons")
    active, known = _ask(nvml, current, device), _ask(nvml, supported, device)
    for reason, bit in _throttle_bits(nvml).items():
        if bit & known:
            yield "gradmon_gpu_throttled", (reason,), float(bool(bit & active))


def _throttle_bits(nvml: Any) -> dict[str, int]:
    """Reason -> its bit, of those that this release of nvidia-ml-py knows."""
    bits = {}
    for reason, name in _THROTTLE_REASONS.items():
        old = getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
        bits[reason] = getattr(nvml, f"nvmlClocksEventReason{name}", old)
    return bits


def _ecc(nvml: Any, device: Any) -> Iterator[Reading]:
    for kind, name in _ECC_KINDS.items():
        count = nvml.nvmlDeviceGetTotalEccErrors(device, getattr(nvml, name), nvml.NVML_VOLATILE_ECC)
        yield "gradmon_gpu_ecc_errors_total", (kind,), float(count)


def _nvlink(nvml: Any, device: Any) -> Iterator[Reading]:
    links = _links(nvml, device)
    if not links:
        return
    counted = dict(_link_counters(nvml, device, links)) or dict(_link_fields(nvml, device))
    for kind, count in counted.items():
        yield "gradmon_gpu_nvlink_errors_total", (kind,), float(count)


def _links(nvml: Any, device: Any) -> list[int]:
    """The links this GPU has, if one of them is up: a socket without a bridge has no errors to count."""
    states: dict[int, int] = {}
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):  # of the largest GPU there is; a smaller one refuses the rest
        try:
            states[link] = nvml.nvmlDeviceGetNvLinkState(device, link)
        except (nvml.NVMLError_InvalidArgument, *_absent(nvml)):
            continue
    return list(states) if any(states.values()) else []


def _link_counters(nvml: Any, device: Any, links: list[int]) -> Iterator[tuple[str, int]]:
    for kind, names in _LINK_COUNTERS.items():
        counters = [getattr(nvml, name) for name in names]
        # All links or none: without one of them the sum would fall, which reads as a counter begun anew.
        with contextlib.suppress(nvml.NVMLError_InvalidArgument, *_absent(nvml)):
            yield kind, sum(nvml.nvmlDeviceGetNvLinkErrorCounter(device, link, c) for link in links for c in counters)


def _link_fields(nvml: Any, device: Any) -> Iterator[tuple[str, int]]:
    kinds = [kind for kind, name in _LINK_FIELDS.items() if hasattr(nvml, name)]
    asked = [(getattr(nvml, _LINK_FIELDS[kind]), _ALL_LINKS) for kind in kinds]
    members = {getattr(nvml, name): member for name, member in _FIELD_MEMBERS.items()}
    try:
        answers = nvml.nvmlDeviceGetFieldValues(device, asked)
    except (nvml.NVMLError_InvalidArgument, *_absent(nvml)):
        return
    for kind, answer in zip(kinds, answers, strict=True):
        if answer.nvmlReturn == nvml.NVML_SUCCESS and answer.valueType in members:
            yield kind, getattr(answer.value, members[answer.valueType])


_SOURCES: dict[str, Callable[[Any, Any], Iterator[Reading]]] = {
    "memory": _memory,
    "utilisation": _utilisation,
    "power": _power,
    "temperature": _temperature,
    "throttling": _throttling,
    "ECC": _ecc,
    "NVLink": _nvlink,
}
