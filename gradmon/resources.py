"""What a rank uses: process memory and CPU from psutil, GPU memory from torch's allocator.

Sampled on the journal's thread. Hardware that is not there gives no entry, never a zero.
"""

from __future__ import annotations

import psutil
import torch


class Sampler:
    """Call it for one sample: name (a key of `record.RESOURCE_METRICS`) -> value in the unit its name ends in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()

    def __call__(self) -> dict[str, float]:
        """Take a sample. Costs some 50 microseconds and no synchronisation."""
        with self._process.oneshot():
            cpu = self._process.cpu_times()
            sample = {
                "resident_memory_bytes": float(self._process.memory_info().rss),
                "cpu_seconds": cpu.user + cpu.system,
            }
        sample["host_memory_available_bytes"] = float(psutil.virtual_memory().available)
        if self._device.type == "cuda":
            allocator = torch.cuda.memory_stats(self._device)
            sample["gpu_memory_allocated_bytes"] = float(allocator.get("allocated_bytes.all.current", 0))
            sample["gpu_memory_reserved_bytes"] = float(allocator.get("reserved_bytes.all.current", 0))
            sample["gpu_memory_peak_allocated_bytes"] = float(allocator.get("allocated_bytes.all.peak", 0))
            sample["gpu_allocator_retries"] = float(allocator.get("num_alloc_retries", 0))
        return sample
