"""What a rank uses: real psutil and torch on this machine, and the allocator's dictionary as torch documents it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import toy

import gradmon
from gradmon import plan
from gradmon.agent.exporter import SAMPLE_METRICS
from gradmon.journal import JournalWriter, read_journal
from gradmon.record import RankIdentity
from gradmon.resources import Sampler

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
#: As torch.cuda.memory_stats flattens it: pools by kind, and the plain counters.
STATS = {
    "active_bytes.all.current": 11 << 30,
    "allocated_bytes.all.allocated": 900 << 30,
    "allocated_bytes.all.current": 10 << 30,
    "allocated_bytes.all.freed": 890 << 30,
    "allocated_bytes.all.peak": 20 << 30,
    "allocated_bytes.large_pool.current": 9 << 30,
    "allocated_bytes.small_pool.current": 1 << 30,
    "inactive_split_bytes.all.current": 3 << 30,
    "inactive_split_bytes.all.peak": 4 << 30,
    "max_split_size": -1,
    "num_alloc_retries": 5,
    "num_ooms": 2,
    "reserved_bytes.all.current": 30 << 30,
    "reserved_bytes.all.peak": 40 << 30,
}
GPU = {
    "gpu_memory_allocated_bytes": 10 << 30,
    "gpu_memory_reserved_bytes": 30 << 30,
    "gpu_memory_peak_allocated_bytes": 20 << 30,
    "gpu_memory_peak_reserved_bytes": 40 << 30,
    "gpu_memory_inactive_split_bytes": 3 << 30,
    "gpu_memory_capacity_bytes": 80 << 30,
    "gpu_allocator_retries": 5,
    "gpu_allocator_ooms": 2,
}


@pytest.fixture
def stats(monkeypatch):
    """A GPU for torch to tell of; change the dictionary to change what it tells."""
    told = dict(STATS)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: told if device == CUDA else {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    return told


def of_gpu(sample: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in sample.items() if name.startswith("gpu_")}


def test_this_process_and_this_host():
    sampler = Sampler(CPU)
    first = sampler()
    assert set(first) <= set(SAMPLE_METRICS)
    assert all(type(value) is float for value in first.values())
    assert first["resident_memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert first["host_memory_available_bytes"] < first["host_memory_capacity_bytes"]
    assert first["host_cpus"] == os.cpu_count()
    assert first["host_load_average"] >= 0
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    release = threading.Event()
    threads = [threading.Thread(target=release.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    with open(os.devnull), open(os.devnull):
        second = sampler()
    release.set()
    for thread in threads:
        thread.join()
    assert second["cpu_seconds"] > first["cpu_seconds"]
    assert second["threads"] == first["threads"] + 3
    assert second["open_fds"] == first["open_fds"] + 2


def test_what_is_not_there_gives_no_entry():
    sample = Sampler(CPU)()
    assert of_gpu(sample) == {}
    assert ("host_swap_used_bytes" in sample) == (psutil.swap_memory().total > 0)


@pytest.mark.parametrize(("total", "expected"), [(0, {}), (8 << 30, {"host_swap_used_bytes": 1 << 30})])
def test_swap_is_absent_without_any(monkeypatch, total, expected):
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=total, used=total // 8))
    assert {name: value for name, value in Sampler(CPU)().items() if "swap" in name} == expected


def test_the_allocator(stats):
    assert of_gpu(Sampler(CUDA)()) == GPU


def test_an_allocator_that_tells_less_gives_fewer_entries(stats):
    del stats["num_ooms"], stats["inactive_split_bytes.all.current"]
    assert GPU.keys() - of_gpu(Sampler(CUDA)()).keys() == {"gpu_allocator_ooms", "gpu_memory_inactive_split_bytes"}
    stats.clear()  # no CUDA context yet
    assert of_gpu(Sampler(CUDA)()).keys() == {"gpu_memory_capacity_bytes"}


def test_a_container_that_does_not_tell_is_no_error(monkeypatch):
    def denied(self):
        raise psutil.AccessDenied

    whole = set(Sampler(CPU)())
    monkeypatch.setattr(psutil.Process, "io_counters", denied)
    errors = []
    sampler = Sampler(CPU, lambda *error: errors.append(error))
    for _ in range(3):
        assert whole - set(sampler()) == {"read_bytes", "written_bytes"}
    assert errors == []


def test_a_failing_source_costs_its_own_entries_and_is_counted_once(stats, monkeypatch):
    def broken(_):
        raise RuntimeError("driver shutting down")

    errors = []
    sampler = Sampler(CUDA, lambda part, error: errors.append((part, str(error))))
    whole = set(sampler())
    monkeypatch.setattr(torch.cuda, "memory_stats", broken)
    for _ in range(4):
        assert whole - set(sampler()) == GPU.keys() - {"gpu_memory_capacity_bytes"}
    assert errors == [("resources", "driver shutting down")]


def test_a_failing_source_is_counted_in_the_journal(directory: Path, monkeypatch):
    """Also one that fails at the first sample, which is taken while the journal is being made."""

    def broken():
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    monkeypatch.setattr("gradmon.journal.SAMPLE_SECONDS", 0.05)
    model = toy.build()
    with gradmon.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)) as monitor:
        path = monitor.journal_path
        deadline = time.monotonic() + 10
        key = ("gradmon_errors_total", ("resources",))
        while key not in (view := read_journal(path)).counters and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
    view = read_journal(path)
    assert view.counters[key] == 1
    assert "cpu_seconds" in view.samples
    assert not [name for name in view.samples if name.startswith("host_memory")]


# --- which GPU -------------------------------------------------------------------------------------------------------

UUID = "1b2c3d4e-0000-1111-2222-333333333333"


@pytest.mark.parametrize(
    ("properties", "expected"),
    [({"uuid": UUID}, f"GPU-{UUID}"), ({"uuid": f"GPU-{UUID}"}, f"GPU-{UUID}"), ({}, ""), ({"uuid": None}, "")],
)
def test_the_uuid_is_written_as_nvml_does(monkeypatch, properties, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    assert plan._gpu_uuid(CUDA) == expected
    assert plan._gpu_uuid(CPU) == ""


def test_a_journal_from_before_the_uuid_is_read(tmp_path: Path):
    who = RankIdentity("run", "one", 0, 0, 0, 1, "host", 1, "H100", "guard", "single", "t.py", "0", 1.0, f"GPU-{UUID}")
    path = tmp_path / "rank-00000.db"
    JournalWriter(path, who, parameters=["w"], config={}, sample=dict).close("finished")
    assert read_journal(path).identity == who
    forget(path, "gpu_uuid")
    assert read_journal(path).identity == dataclasses.replace(who, gpu_uuid="")
    forget(path, "host")  # always written: not a journal of ours
    with pytest.raises(KeyError, match="host"):
        read_journal(path)


def forget(path: Path, key: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute("DELETE FROM meta WHERE key = ?", (key,)).rowcount == 1
