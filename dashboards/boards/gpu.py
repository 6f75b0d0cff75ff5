"""GPU and memory: what the hardware and the nodes have to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from boards import ask
from boards.ask import BAND, BY_RANK, ROWS
from boards.frame import GROUPS, HOST, HOSTS, ONE_RUN, RANK, RANKS, Board, ranked
from boards.parts import BAD, CALM, GOOD, NOTE, REST, WARN, Column, Line, Query, bars, grid, heat, lines, number
from gradmon.rules import THRESHOLDS

_POINTS = 100
_FULL = ((None, GOOD), (THRESHOLDS.gpu_memory_ratio, BAD))
_FULL_LINE = ((None, "transparent"), (THRESHOLDS.gpu_memory_ratio, BAD))


def _share(used: str, capacity: str) -> str:
    return f"{used}{{{RANK}}} / {capacity}{{{RANK}}}"


_PEAK = _share("gradmon_gpu_memory_peak_allocated_bytes", "gradmon_gpu_memory_capacity_bytes")
_DEVICE = _share("gradmon_gpu_device_memory_used_bytes", "gradmon_gpu_device_memory_capacity_bytes")
_FREE = f"gradmon_host_memory_available_bytes{{{HOST}}} / gradmon_host_memory_capacity_bytes{{{HOST}}}"
_HARDWARE = f'gradmon_gpu_throttled{{{RANK},reason=~"hw_.*"}}'


def _now() -> Sequence[Any]:
    ecc = f'gradmon_gpu_ecc_errors_total{{{RANK},kind="uncorrected"}}'
    ooms, retries = f"gradmon_gpu_allocator_ooms_total{{{RANK}}}", f"gradmon_gpu_allocator_retries_total{{{RANK}}}"
    return (
        number("Fullest GPU", "Highest share of a GPU's memory that tensors have held so far.", "percentunit",
            Query(f"max({_PEAK})"), decimals=0, steps=_FULL, runbook="GradmonGpuMemoryNearlyFull"),
        number("GPU use", "Share of time in which any kernel runs, the median GPU. High says busy, not fast.",
            "percentunit", Query(f"quantile(0.5, {ranked('gradmon_gpu_utilisation_ratio')})"), decimals=0,
            steps=((None, NOTE),)),
        number("Power", "What all chosen GPUs draw together.", "watt",
            Query(f"sum({ranked('gradmon_gpu_power_watts')})"), steps=((None, NOTE),)),
        number("Hottest GPU", "Temperature of the hottest GPU.", "celsius",
            Query(f"max({ranked('gradmon_gpu_temperature_celsius')})"), decimals=0, steps=((None, NOTE),)),
        number("GPUs slowed down", "GPUs that clock lower than they could because of cooling or power supply.", "none",
            Query(f"count(max {BY_RANK} ({_HARDWARE} == 1)) or vector(0)"), steps=((None, GOOD), (1, WARN)),
            runbook="GradmonGpuThrottled"),
        number("Memory errors", "Uncorrected memory errors (ECC) in the time shown; one ends the process.", "none",
            Query(f"{ask.grew(ecc, 'by ()')}"), instant=True, decimals=0, steps=((None, GOOD), (1, BAD)),
            runbook="GradmonGpuEccErrors"),
        number("Allocator retries", "Allocations that failed at first because GPU memory was full or in pieces; each "
            "costs time. In the time shown.", "none", Query(f"{ask.grew(retries, 'by ()')}"), instant=True,
            decimals=0, steps=((None, GOOD), (THRESHOLDS.allocator_retries, WARN)), runbook="GradmonAllocatorRetries"),
        number("Out of memory", "Out-of-memory errors of the allocator in the time shown, also those the script "
            "caught.", "none", Query(f"{ask.grew(ooms, 'by ()')}"), instant=True, decimals=0,
            steps=((None, GOOD), (1, BAD)), runbook="GradmonGpuOutOfMemory"),
    )  # fmt: skip


def _memory() -> Sequence[Any]:
    fragments = _share("gradmon_gpu_memory_inactive_split_bytes", "gradmon_gpu_memory_capacity_bytes")
    growth = f"topk(10, max {BY_RANK} (deriv(gradmon_gpu_memory_allocated_bytes{{{RANK}}}[$__range])) * 3600 > 0)"
    return (
        lines("GPU memory held by tensors", "Bytes in tensors now, over the ranks. A line that climbs over hours is a "
            "leak: something keeps tensors alive.", "bytes", *ask.band(ranked("gradmon_gpu_memory_allocated_bytes")),
            look=BAND, lowest=0, points=_POINTS, fill=0, runbook="GradmonGpuMemoryLeak"),
        lines("GPU memory at its fullest rank", (
            "Shares of the GPU's memory: the peak of tensors so far, what the allocator reserved, and what the "
            "driver says is in use by all processes."), "percentunit",
            Query(f"max({_PEAK})", "tensors, peak"),
            Query(f"max({_share('gradmon_gpu_memory_reserved_bytes', 'gradmon_gpu_memory_capacity_bytes')})",
                "reserved"),
            Query(f"max({_DEVICE})", "in use (driver)"),
            look={"tensors, peak": Line(NOTE), "reserved": Line(CALM), "in use (driver)": Line(WARN)}, lowest=0,
            highest=1, steps=_FULL_LINE, points=_POINTS, fill=0, runbook="GradmonGpuMemoryNearlyFull"),
        lines("Retries, out of memory, fragments", (
            "Failed allocations per interval, and the largest share of a GPU's memory that lies in pieces nobody can "
            "use (right axis)."), "none",
            Query(f"sum(increase(gradmon_gpu_allocator_retries_total{{{RANK}}}[$__rate_interval]))", "retries"),
            Query(f"sum(increase(gradmon_gpu_allocator_ooms_total{{{RANK}}}[$__rate_interval]))", "out of memory"),
            Query(f"max({fragments})", "fragments"),
            look={"retries": Line(WARN), "out of memory": Line(BAD),
                "fragments": Line(CALM, right=True, unit="percentunit")},
            lowest=0, points=_POINTS, fill=0, runbook="GradmonAllocatorRetries"),
        _table(),
        bars("Tensors grow fastest", "By how much the memory in tensors grows, in bytes per hour, the ten ranks with "
            "most. Warming up grows too.", "bytes", Query(f"sort_desc({growth})", "rank {{rank}}"), width=7,
            height=9, steps=((None, WARN),), runbook="GradmonGpuMemoryLeak"),
    )  # fmt: skip


def _table() -> Any:
    chosen = f"topk(50, max {BY_RANK} ({_PEAK}))"

    def of(metric: str, by: str = BY_RANK) -> str:
        return f"max {by} ({metric}{{{RANK}}}) and on (cluster, run, rank) {chosen}"

    return grid(
        "GPUs, the fullest first",
        "Up to 50 GPUs by the memory tensors held at their peak. The UUID joins with dcgm-exporter's series.",
        Column("Rank", label="rank", width=60),
        Column("Host", of("gradmon_rank_info", "by (cluster, run, rank, host, gpu_uuid)"), label="host", hidden=True),
        Column("GPU", label="gpu_uuid"),
        Column("Peak", f"max {BY_RANK} ({_PEAK}) and on (cluster, run, rank) {chosen}", unit="percentunit",
            decimals=0, gauge=True, top=1, steps=_FULL, width=160),
        Column("Tensors", of("gradmon_gpu_memory_allocated_bytes"), unit="bytes", width=90),
        Column("Reserved", of("gradmon_gpu_memory_reserved_bytes"), unit="bytes", width=90),
        Column("In use", of("gradmon_gpu_device_memory_used_bytes"), unit="bytes", width=90),
        Column("Use", of("gradmon_gpu_utilisation_ratio"), unit="percentunit", decimals=0, width=70),
        Column("Power", of("gradmon_gpu_power_watts"), unit="watt", decimals=0, width=80),
        Column("Heat", of("gradmon_gpu_temperature_celsius"), unit="celsius", decimals=0, width=80),
        sort="Peak",
        width=17,
    )  # fmt: skip


def _work() -> Sequence[Any]:
    window = "[$__rate_interval]"
    errors = (
        Query(f"sum by (kind) (increase(gradmon_gpu_ecc_errors_total{{{RANK}}}{window}))", "memory, {{kind}}"),
        Query(f"sum by (kind) (increase(gradmon_gpu_nvlink_errors_total{{{RANK}}}{window}))", "NVLink, {{kind}}"),
    )
    return (
        heat("GPU use, rank by time", (
            "Share of time in which any kernel runs on the GPU; dark rows wait for the others or for data. Where "
            f"ranks share a row it shows the least used of them. {ROWS.replace(' which shows the worst of them', '')}"),
            "percentunit", Query(ask.per_row(ranked("gradmon_gpu_utilisation_ratio"), "min"), "{{group}}"), width=24,
            scheme="Viridis", lowest=0, highest=1, axis="rank", decimals=0),
        lines("Temperature", "Of the GPUs: the hottest, the coolest, the median, and the band that holds 8 of 10.",
            "celsius", *ask.band(ranked("gradmon_gpu_temperature_celsius")), look=BAND, points=_POINTS, fill=0),
        lines("Power per GPU", "What a GPU draws. One far below the others is throttled or idle.", "watt",
            *ask.band(ranked("gradmon_gpu_power_watts")), look=BAND, points=_POINTS, fill=0),
        lines("GPUs that clock lower than they could", (
            "By reason. sw_power_cap is usual under full load; the hw_ reasons mean cooling or power supply."),
            "none", Query(f"sum by (reason) (gradmon_gpu_throttled{{{RANK}}})", "{{reason}}"), lowest=0, points=_POINTS,
            fill=0, runbook="GradmonGpuThrottled"),
        lines("Errors of memory and links", (
            "Per interval, all GPUs together. Corrected memory errors and repaired link errors cost little, but many "
            "announce a GPU or a link that will fail."), "none", *errors, lowest=0, points=_POINTS, bars=True,
            runbook="GradmonGpuEccErrors"),
        bars("GPUs with most link errors", "Errors on the NVLinks of a GPU in the time shown, the worst ten: repaired, "
            "but slow.", "none", Query(f"sort_desc(topk(10, {ask.grew(_NVLINK, BY_RANK)} > 0))", "rank {{rank}}"),
            decimals=0, steps=((None, GOOD), (THRESHOLDS.nvlink_errors, WARN)), runbook="GradmonNvlinkErrors"),
        bars("GPUs with most memory errors", "ECC errors of a GPU in the time shown, corrected ones too, the worst "
            "ten.", "none", Query(f"sort_desc(topk(10, {ask.grew(_ECC, BY_RANK)} > 0))", "rank {{rank}}"), decimals=0,
            steps=((None, GOOD), (1, WARN)), runbook="GradmonGpuEccErrors"),
    )  # fmt: skip


_NVLINK = f"gradmon_gpu_nvlink_errors_total{{{RANK}}}"
_ECC = f"gradmon_gpu_ecc_errors_total{{{RANK}}}"


def _hosts() -> Sequence[Any]:
    free = THRESHOLDS.host_memory_available_ratio
    load = f"gradmon_host_load_average{{{HOST}}} / gradmon_host_cpus{{{HOST}}}"
    window = "[$__rate_interval]"
    return (
        bars("Hosts with least free memory", "Share of a host's memory that is free, the ten hosts with least. Near 0 "
            "the system kills a process.", "percentunit", Query(
            f"sort(bottomk(10, max by (cluster, host) ({_FREE})))", "{{host}}"), highest=1, decimals=0,
            steps=((None, BAD), (free, GOOD)), runbook="GradmonHostMemoryNearlyFull"),
        lines("Free memory of the hosts", "Share of memory that is free: the host with least, and the median.",
            "percentunit", Query(f"min({_FREE})", "least"), Query(f"quantile(0.5, {_FREE})", "median"), lowest=0,
            highest=1, look={"least": Line(WARN), "median": Line(NOTE)}, fill=0, points=_POINTS,
            steps=((None, "transparent"), (free, BAD)), runbook="GradmonHostMemoryNearlyFull"),
        lines("Memory of the processes", "Resident memory of the ranks' processes; one that only climbs leaks.",
            "bytes", *ask.band(ranked("gradmon_process_resident_memory_bytes")), look=BAND, lowest=0,
            points=_POINTS, fill=0),
        lines("Swap", "Memory the hosts moved to disk: the one with most, and all together. In use and growing makes "
            "everything slow.", "bytes", Query(f"max(gradmon_host_swap_used_bytes{{{HOST}}})", "most"),
            Query(f"sum(gradmon_host_swap_used_bytes{{{HOST}}})", "together"), lowest=0, points=_POINTS, fill=0,
            look={"most": Line(WARN), "together": Line(REST)}),
        lines("Load per CPU", "Threads that want to run for each CPU of a host; above 1 they queue.", "none",
            Query(f"max({load})", "busiest host"), Query(f"quantile(0.5, {load})", "median"), lowest=0,
            look={"busiest host": Line(WARN), "median": Line(NOTE)}, points=_POINTS, fill=0,
            steps=((None, "transparent"), (1, WARN))),
        lines("CPU and snapshots", "CPUs that all chosen processes use together, and host memory that rollback's "
            "snapshots take (right axis; only where rollback is on).", "none",
            Query(f"sum(rate(gradmon_process_cpu_seconds_total{{{RANK}}}{window}))", "CPUs"),
            Query(f"sum({ranked('gradmon_snapshot_memory_bytes')})", "snapshots"), lowest=0, points=_POINTS, fill=0,
            look={"CPUs": Line(NOTE), "snapshots": Line(CALM, right=True, unit="bytes")}),
        lines("Disk traffic of the processes", "Bytes that all chosen processes read and write per second; "
            "checkpoints are peaks of writing.", "Bps",
            Query(f"sum(rate(gradmon_process_read_bytes_total{{{RANK}}}{window}))", "read"),
            Query(f"sum(rate(gradmon_process_written_bytes_total{{{RANK}}}{window}))", "written"), lowest=0,
            look={"read": Line(NOTE), "written": Line(WARN)}, points=_POINTS, width=12),
        lines("Agents", "Journals that the agents read, and failures of agents themselves per interval (right axis).",
            "none", Query('sum(gradmon_agent_journals{cluster=~"$cluster"})', "journals"),
            Query(f'sum(increase(gradmon_agent_errors_total{{cluster=~"$cluster"}}{window}))', "failures"), lowest=0,
            look={"journals": Line(NOTE), "failures": Line(BAD, right=True)}, width=12, fill=0,
            runbook="GradmonAgentUnwell"),
    )  # fmt: skip


def _rows() -> Sequence[tuple[str, Sequence[Any]]]:
    return (("Now", _now()), ("GPU memory", _memory()), ("GPU at work", _work()), ("Hosts and processes", _hosts()))


BOARD = Board(
    "gpu",
    "gradmon / GPU and memory",
    "GPUs and nodes of one run: memory, leaks, heat, errors, and what the processes use.",
    (ONE_RUN, HOSTS, RANKS, GROUPS),
    _rows,
)
