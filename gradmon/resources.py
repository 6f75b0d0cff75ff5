"""What a rank uses: its process and its host as psutil sees them, GPU memory as torch's allocator counts it.

Sampled on the journal's thread of the training process, so nothing here asks the GPU's driver: a driver call that
hangs would take the rank's heartbeat with it. What only the driver knows is sampled by the agent (`agent/gpus.py`).
Hardware that is not there gives no entry, never a zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import psutil
import torch

#: What the allocator calls it -> the name of our entry. Where one is missing (no CUDA context yet), so is the entry.
_ALLOCATOR = {
    "allocated_bytes.all.current": "gpu_memory_allocated_bytes",
    "reserved_bytes.all.current": "gpu_memory_reserved_bytes",
    "allocated_bytes.all.peak": "gpu_memory_peak_allocated_bytes",
    "reserved_bytes.all.peak": "gpu_memory_peak_reserved_bytes",
    "inactive_split_bytes.all.current": "gpu_memory_inactive_split_bytes",
    "num_alloc_retries": "gpu_allocator_retries",
    "num_ooms": "gpu_allocator_ooms",
}

#: One entry of a sample.
Entry = tuple[str, float]


class Sampler:
    """Call it for one sample: name (a key of `agent.exporter.SAMPLE_METRICS`) -> value in the unit its name ends in.

    A source that fails costs its own entries only. It is told to `on_error` once, and tried again each time.
    """

    def __init__(
        self, device: torch.device, on_error: Callable[[str, Exception], None] = lambda _part, _error: None
    ) -> None:
        self._device = device
        self._on_error = on_error
        self._process = psutil.Process()
        self._gpu_capacity: float | None = None
        self._failed: set[str] = set()
        self._untold: list[Exception] = []
        self._sources: dict[str, Callable[[], Iterator[Entry]]] = {
            "memory": self._memory,
            "cpu": self._cpu,
            "threads": self._threads,
            "files": self._files,
            "disk": self._disk,
            "host memory": _host_memory,
            "host swap": _host_swap,
            "host load": _host_load,
        }
        if device.type == "cuda":
            self._sources |= {"allocator": self._allocator, "device memory": self._device_memory}

    def __call__(self) -> dict[str, float]:
        """Take a sample. Costs some 200 microseconds and no synchronisation."""
        # Told with the next sample: the first is taken while the journal that is to count it is still being made.
        untold, self._untold = self._untold, []
        for error in untold:
            self._on_error("resources", error)
        sample: dict[str, float] = {}
        with self._process.oneshot():
            for name, source in self._sources.items():
                try:
                    sample.update(dict(source()))
                except (psutil.AccessDenied, NotImplementedError):
                    continue  # a container or a system that does not tell: absent, no error
                except Exception as error:
                    if name not in self._failed:
                        self._failed.add(name)
                        self._untold.append(error)
        return sample

    def _memory(self) -> Iterator[Entry]:
        yield "resident_memory_bytes", float(self._process.memory_info().rss)

    def _cpu(self) -> Iterator[Entry]:
        used = self._process.cpu_times()
        yield "cpu_seconds", used.user + used.system

    def _threads(self) -> Iterator[Entry]:
        yield "threads", float(self._process.num_threads())

    def _files(self) -> Iterator[Entry]:
        if hasattr(self._process, "num_fds"):
            yield "open_fds", float(self._process.num_fds())

    def _disk(self) -> Iterator[Entry]:
        if hasattr(self._process, "io_counters"):  # psutil has none on macOS
            done = self._process.io_counters()
            yield "read_bytes", float(done.read_bytes)
            yield "written_bytes", float(done.write_bytes)

    def _allocator(self) -> Iterator[Entry]:
        counted = torch.cuda.memory_stats(self._device)
        yield from ((name, float(counted[theirs])) for theirs, name in _ALLOCATOR.items() if theirs in counted)

    def _device_memory(self) -> Iterator[Entry]:
        if self._gpu_capacity is None:  # it does not change
            self._gpu_capacity = float(torch.cuda.get_device_properties(self._device).total_memory)
        yield "gpu_memory_capacity_bytes", self._gpu_capacity


def _host_memory() -> Iterator[Entry]:
    memory = psutil.virtual_memory()
    yield "host_memory_available_bytes", float(memory.available)
    yield "host_memory_capacity_bytes", float(memory.total)


def _host_swap() -> Iterator[Entry]:
    swap = psutil.swap_memory()
    if swap.total:
        yield "host_swap_used_bytes", float(swap.used)


def _host_load() -> Iterator[Entry]:
    yield "host_load_average", os.getloadavg()[0]
    count = psutil.cpu_count()
    if count is not None:
        yield "host_cpus", float(count)
