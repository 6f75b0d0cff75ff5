"""NVML as nvidia-ml-py shows it, for machines that have none: same names, same structures, same error classes.

Constants, structures and errors are those of the real `pynvml`; only what would call the driver is replaced.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import pynvml

A, B = "GPU-aaaaaaaa-0000-1111-2222-333333333333", "GPU-bbbbbbbb-0000-1111-2222-333333333333"
#: What Hopper says it can tell; no hw_power_brake, to see a reason that is not supported.
REASONS = (
    pynvml.nvmlClocksEventReasonGpuIdle
    | pynvml.nvmlClocksEventReasonSwPowerCap
    | pynvml.nvmlClocksEventReasonHwSlowdown
    | pynvml.nvmlClocksEventReasonSyncBoost
    | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    | pynvml.nvmlClocksEventReasonHwThermalSlowdown
)
REPLAY, RECOVERY = pynvml.NVML_NVLINK_ERROR_DL_REPLAY, pynvml.NVML_NVLINK_ERROR_DL_RECOVERY
FLIT, DATA = pynvml.NVML_NVLINK_ERROR_DL_CRC_FLIT, pynvml.NVML_NVLINK_ERROR_DL_CRC_DATA


@dataclass(eq=False)
class Gpu:
    """One GPU; its object is its handle."""

    uuid: str
    used: int = 70 << 30
    total: int = 80 << 30
    percent: int = 97
    milliwatts: int = 650_500
    celsius: int = 61
    throttled: int = 0
    ecc: tuple[int, int] = (3, 1)
    links: list[dict[int, int]] = field(default_factory=list)
    """Error counters of each NVLink."""
    up: bool = True
    """Whether its links are."""
    fields: dict[int, int] = field(default_factory=dict)
    """Field values for all links together; another one is not supported."""
    refuses: dict[str, int] = field(default_factory=dict)
    """Function -> error code."""
    hangs: dict[str, threading.Event] = field(default_factory=dict)
    """Function -> what it waits for."""


class FakeNvml:
    """Stands for the module `pynvml`."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = list(gpus)
        self.opened = 0
        self.refuses: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.hanging = threading.Event()

    def __getattr__(self, name: str):
        if name.startswith(("NVML_", "NVMLError", "nvmlClocks")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        self._called("nvmlInit", opened=True)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._called("nvmlDeviceGetHandleByIndex", self.gpus[index])

    def nvmlDeviceGetUUID(self, handle) -> str:
        return self._called("nvmlDeviceGetUUID", handle).uuid

    def nvmlDeviceGetPciInfo(self, handle):
        self._called("nvmlDeviceGetPciInfo", handle)
        return pynvml.nvmlPciInfo_t(busId=f"00000000:{self.gpus.index(handle):02X}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        gpu = self._called("nvmlDeviceGetMemoryInfo", handle)
        return pynvml.c_nvmlMemory_t(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return pynvml.c_nvmlUtilization_t(gpu=self._called("nvmlDeviceGetUtilizationRates", handle).percent, memory=40)

    def nvmlDeviceGetPowerUsage(self, handle) -> int:
        return self._called("nvmlDeviceGetPowerUsage", handle).milliwatts

    def nvmlDeviceGetTemperatureV(self, handle, sensor, version=pynvml.nvmlTemperature_v1) -> int:
        return self._temperature("nvmlDeviceGetTemperatureV", handle, sensor)

    def nvmlDeviceGetTemperature(self, handle, sensor) -> int:
        return self._temperature("nvmlDeviceGetTemperature", handle, sensor)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle) -> int:
        return self._called("nvmlDeviceGetCurrentClocksEventReasons", handle).throttled

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle) -> int:
        return self._called("nvmlDeviceGetCurrentClocksThrottleReasons", handle).throttled

    def nvmlDeviceGetSupportedClocksEventReasons(self, handle) -> int:
        self._called("nvmlDeviceGetSupportedClocksEventReasons", handle)
        return REASONS

    def nvmlDeviceGetSupportedClocksThrottleReasons(self, handle) -> int:
        self._called("nvmlDeviceGetSupportedClocksThrottleReasons", handle)
        return REASONS

    def nvmlDeviceGetTotalEccErrors(self, handle, errorType, counterType) -> int:
        gpu = self._called("nvmlDeviceGetTotalEccErrors", handle)
        return gpu.ecc[errorType] + (1000 if counterType == pynvml.NVML_AGGREGATE_ECC else 0)

    def nvmlDeviceGetNvLinkState(self, device, link) -> int:
        self._link(self._called("nvmlDeviceGetNvLinkState", device), link)
        return int(device.up)

    def nvmlDeviceGetNvLinkErrorCounter(self, device, link, counter) -> int:
        counters = self._link(self._called("nvmlDeviceGetNvLinkErrorCounter", device), link)
        if counter not in counters:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return counters[counter]

    def nvmlDeviceGetFieldValues(self, handle, fieldIds):
        gpu = self._called("nvmlDeviceGetFieldValues", handle)
        values = (pynvml.c_nvmlFieldValue_t * len(fieldIds))()
        for value, (name, scope) in zip(values, fieldIds, strict=True):
            value.fieldId, value.scopeId = name, scope
            value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
            known = name in gpu.fields and scope == 0xFFFFFFFF
            value.nvmlReturn = pynvml.NVML_SUCCESS if known else pynvml.NVML_ERROR_NOT_SUPPORTED
            value.value.ullVal = gpu.fields.get(name, 0)
        return values

    def _called(self, name: str, gpu: Gpu | None = None, *, opened: bool = False):
        self.calls[name] += 1
        if not opened and not self.opened:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        for refuses in (self.refuses, gpu.refuses if gpu else {}):
            code = refuses.get(name, refuses.get("*"))
            if code is not None:
                raise pynvml.NVMLError(code)
        if gpu and name in gpu.hangs:
            self.hanging.set()
            gpu.hangs[name].wait(60)
        return gpu

    def _temperature(self, name: str, gpu: Gpu, sensor: int) -> int:
        self._called(name, gpu)
        if sensor != pynvml.NVML_TEMPERATURE_GPU:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return gpu.celsius

    def _link(self, gpu: Gpu, link: int) -> dict[int, int]:
        if not gpu.links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if link >= len(gpu.links):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return gpu.links[link]


def hopper(uuid: str, **changes) -> Gpu:
    """A GPU that can tell everything, with 18 links."""
    links = [{REPLAY: 0, RECOVERY: 0, FLIT: 0, DATA: 0} for _ in range(18)]
    links[4] = {REPLAY: 7, RECOVERY: 1, FLIT: 20, DATA: 4}
    return Gpu(uuid, **{"links": links, "throttled": pynvml.nvmlClocksEventReasonSwPowerCap, **changes})
