"""Alerts about ranks that are gone, hang or are slow, about GPUs and hosts, and about gradmon itself."""

from __future__ import annotations

from gradmon.rules.alert import Alert
from gradmon.rules.expressions import RUN, grown, grown_of_ranks, held, living_ranks, warm
from gradmon.rules.recording import THROTTLED
from gradmon.rules.thresholds import JOB, RuleSettings
from gradmon.rules.thresholds import THRESHOLDS as T
from gradmon.rules.training import same_attempt

_RANK = f"{RUN}, rank"
_RANKS_BOARD, _GPU_BOARD, _FLEET_BOARD = "gradmon-ranks", "gradmon-gpu", "gradmon-fleet"


def rank_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """Ranks that failed, are gone, frozen or slow, and runs that make no steps."""
    return (*_lost_alerts(settings), *_pace_alerts())


def _lost_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    failed, silent = held("failed_rank", _failed()), held("silent_rank", _gone())
    frozen = held("frozen_rank", f"gradmon_last_heartbeat_age_seconds > {T.heartbeat_age_seconds:g}")
    return (
        Alert(
            "GradmonRankFailed",
            "ticket",
            "ranks",
            failed[1]["record"],
            "{{ $labels.run }}: rank {{ $labels.rank }} failed",
            "Rank {{ $labels.rank }} of run {{ $labels.run }} was the first to end by an exception or an exit code.",
            needs=(_DEAD, *failed),
            board=_RANKS_BOARD,
        ),
        Alert(
            "GradmonRankSilent",
            "ticket",
            "ranks",
            _silent(silent[1]["record"]),
            "{{ $labels.run }}: {{ $value }} ranks are gone (rank {{ $labels.rank }})",
            "{{ $value }} ranks of run {{ $labels.run }} are gone without a word while others live: killed, or their "
            'node or its agent is down. One of them: rank {{ $labels.rank }} ("unknown": its agent is gone too).',
            wait=settings.wait,
            needs=(_PRESENT, *silent),
            board=_RANKS_BOARD,
        ),
        Alert(
            "GradmonRankFrozen",
            "ticket",
            "ranks",
            frozen[1]["record"],
            "{{ $labels.run }}: rank {{ $labels.rank }} lives but is frozen",
            "The process of rank {{ $labels.rank }} of run {{ $labels.run }} lives, but its heartbeat is "
            "{{ $value | humanizeDuration }} old. It beats whatever the training does, so the process is stopped, "
            "swapped out, or waits for a disk or a driver.",
            needs=frozen,
            board=_RANKS_BOARD,
        ),
    )


def _pace_alerts() -> tuple[Alert, ...]:
    slow = held("slow_rank", _straggling())
    return (
        Alert(
            "GradmonRunStuck",
            "page",
            "ranks",
            _stuck(),
            "{{ $labels.run }}: no step for {{ $value | humanizeDuration }}",
            "All ranks of run {{ $labels.run }} that are seen live, but none has finished a step for "
            "{{ $value | humanizeDuration }}, and the script did not say that it pauses, or has paused for hours.",
            wait="1m",
            board=_RANKS_BOARD,
        ),
        Alert(
            "GradmonStraggler",
            "ticket",
            "slow",
            slow[1]["record"],
            "{{ $labels.run }}: rank {{ $labels.rank }} holds the others up",
            "Rank {{ $labels.rank }} of run {{ $labels.run }} needs {{ $value | humanize }} times as long for its own "
            "part of a step as the median rank, and all others wait for it.",
            wait="10m",
            needs=slow,
            board=_RANKS_BOARD,
        ),
        Alert(
            "GradmonDataWait",
            "info",
            "slow",
            warm(f"(run:gradmon_data_wait_ratio:median > {T.data_wait_ratio})", T.warmup_steps),
            "{{ $labels.run }}: {{ $value | humanizePercentage }} of the time goes into waiting for data",
            "The median rank of run {{ $labels.run }} waits {{ $value | humanizePercentage }} of its time for its "
            "DataLoader; the GPUs idle meanwhile.",
            wait="10m",
        ),
    )


def resource_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """GPUs, links and hosts."""
    return (*_memory_alerts(settings), *_hardware_alerts(settings))


def gradmon_alerts(_: RuleSettings) -> tuple[Alert, ...]:
    """gradmon itself, and the alert that always fires."""
    errors, more_errors = grown_of_ranks("errors", "gradmon_errors_total", "10m")
    unwell = held("unwell_rank", more_errors)
    return (
        Alert(
            "GradmonUnwell",
            "ticket",
            "slow",
            unwell[1]["record"],
            "{{ $labels.run }}: gradmon itself fails on rank {{ $labels.rank }}",
            "A part of gradmon failed in rank {{ $labels.rank }} of run {{ $labels.run }}. Training goes on, but from "
            "now on gradmon may only watch it.",
            needs=(errors, *unwell),
        ),
        Alert(
            "GradmonAgentUnwell",
            "ticket",
            "slow",
            grown("gradmon_agent_errors_total", "", "10m", "cluster, part"),
            "gradmon agents fail: {{ $labels.part }}",
            "{{ $value | humanize }} failures of the part {{ $labels.part }} in the agents of cluster "
            "{{ $labels.cluster }} within ten minutes. What it shows may be missing.",
            board=_FLEET_BOARD,
        ),
        Alert(
            "GradmonWatchdog",
            "none",
            "slow",
            "vector(1)",
            "Alerting works",
            "Always fires. Where it stops arriving, Prometheus, Alertmanager or the way between them is broken.",
            board=_FLEET_BOARD,
        ),
    )


def target_alerts(_: RuleSettings) -> tuple[Alert, ...]:
    """Agents that can't be scraped; for fleets whose agents stay where they are."""
    down = f'up{{job="{JOB}"}} == 0'
    return (
        Alert(
            "GradmonTargetDown",
            "ticket",
            "targets",
            f"count by (cluster) ({down})",
            "{{ $value }} gradmon agents are down in cluster {{ $labels.cluster }}",
            "Prometheus can't scrape {{ $value }} gradmon agents of cluster {{ $labels.cluster }}: nothing is known "
            "of the ranks on those nodes.",
            wait="5m",
            board=_FLEET_BOARD,
        ),
        Alert(
            "GradmonNoTarget",
            "ticket",
            "targets",
            f'absent(up{{job="{JOB}"}})',
            "Prometheus knows no gradmon agent at all",
            f'There is no target with job="{JOB}": no run is watched, and no other alert of gradmon can fire.',
            wait="10m",
            board=_FLEET_BOARD,
        ),
    )


def _failed() -> str:
    """Failed and not alive anywhere: a rank that was started again has not failed any more."""
    return f"gradmon_rank_failed == 1\nand on ({_RANK}) {_DEAD['record']}"


def _gone() -> str:
    """Dead ranks on nodes where others of the run live: those of an older attempt on another node are not meant."""
    dead = "(gradmon_rank_up == 0 and on (cluster, instance, run) gradmon_world_size) + 1"
    return f"{dead}\nand on ({_RANK}) {_DEAD['record']}\nunless on ({_RANK}) (gradmon_rank_finished == 1)"


#: Ranks that live nowhere; few, so that what is asked of the dead is not joined with all ranks.
_DEAD = {"record": "rank:gradmon_rank_up:dead", "expr": f"max by ({_RANK}) (gradmon_rank_up) == 0"}
_PRESENT = {
    "record": "run:gradmon_ranks_present:count",
    "expr": f"sum by ({RUN}) (max by ({_RANK}) (gradmon_rank_up + gradmon_rank_finished))",
}


def _silent(record: str) -> str:
    missing = f"(max by ({RUN}) (gradmon_world_size) - on ({RUN}) {_PRESENT['record']} > 0)"
    return (
        f"{missing}\n* on ({RUN}) group_left (rank) {record}"
        f'\nor on ({RUN})\nlabel_replace({missing}, "rank", "unknown", "", "")'
    )


def _stuck() -> str:
    """The threshold needs a step's duration; a run that has none yet has more time, for loading and compiling."""
    age, duration = f"min by ({RUN}) (gradmon_last_step_age_seconds)", "run:gradmon_step_duration_seconds:median"
    steps = f"{T.stuck_steps:g} * quantile_over_time(0.5, {duration}[1h])"
    return (
        f"(\n  (({age} > {T.stuck_seconds:g}) > on ({RUN}) {steps}) and on ({RUN}) {duration}"
        f"\n  or\n  ({age} > {T.first_step_seconds:g}) unless on ({RUN}) {duration}\n)"
        # After a pause the age counts from before it, until the next step.
        f"\nunless on ({RUN}) (max_over_time(run:gradmon_ranks_paused:count[10m]) > 0)"
        f"\nor on ({RUN}) ({age} > {T.paused_seconds:g})"
    )


def _straggling() -> str:
    busy, median = "rank:gradmon_step_busy_seconds:mean", "run:gradmon_step_busy_seconds:median"
    ratio = f"{busy} / on ({RUN}) group_left () ({median} > 0) > {T.straggler_ratio}"
    cost = f"{busy} - on ({RUN}) group_left () {median}"
    step = f"run:gradmon_step_duration_seconds:median * {T.straggler_step_ratio}"
    return warm(f"({ratio}) and on ({_RANK}) ({cost} > on ({RUN}) group_left () ({step}))", T.warmup_steps)


def _memory_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    peak = "gradmon_gpu_memory_peak_allocated_bytes / gradmon_gpu_memory_capacity_bytes"
    full = held("full_gpu", living_ranks(f"{peak} > {T.gpu_memory_ratio}"))
    window = settings.share_window
    flushes, more_flushes = grown_of_ranks("gpu_allocator_retries", "gradmon_gpu_allocator_retries_total", window)
    retries = held("retrying_gpu", f"({more_flushes}) >= {T.allocator_retries}")
    failures, more_failures = grown_of_ranks("gpu_allocator_ooms", "gradmon_gpu_allocator_ooms_total", window)
    ooms = held("gpu_without_memory", more_failures)
    return (
        Alert(
            "GradmonGpuMemoryNearlyFull",
            "ticket",
            "slow",
            full[1]["record"],
            "{{ $labels.run }}: GPU memory of rank {{ $labels.rank }} is {{ $value | humanizePercentage }} full",
            "At their peak, tensors took {{ $value | humanizePercentage }} of the GPU memory of rank "
            "{{ $labels.rank }} of run {{ $labels.run }}. One longer batch ends it with an out-of-memory error.",
            wait="5m",
            needs=full,
            board=_GPU_BOARD,
        ),
        Alert(
            "GradmonGpuMemoryLeak",
            "ticket",
            "slow",
            _leak(),
            "{{ $labels.run }}: GPU memory grows and grows",
            "The least GPU memory that run {{ $labels.run }} held in the last half hour is more than the most it held "
            "two hours before, by {{ $value | humanize1024 }}B: something keeps tensors alive.",
            wait="10m",
            board=_GPU_BOARD,
        ),
        Alert(
            "GradmonAllocatorRetries",
            "ticket",
            "slow",
            retries[1]["record"],
            "{{ $labels.run }}: the GPU allocator of rank {{ $labels.rank }} has to flush its cache",
            "{{ $value | humanize }} times within ten minutes rank {{ $labels.rank }} of run {{ $labels.run }} had to "
            "give memory back before it got some: slow, and the last stage before an out-of-memory error.",
            needs=(flushes, *retries),
            board=_GPU_BOARD,
        ),
        Alert(
            "GradmonGpuOutOfMemory",
            "ticket",
            "slow",
            ooms[1]["record"],
            "{{ $labels.run }}: rank {{ $labels.rank }} ran out of GPU memory",
            "The allocator of rank {{ $labels.rank }} of run {{ $labels.run }} could not get memory. Unless the script "
            "caught it, the rank has ended.",
            needs=(failures, *ooms),
            board=_GPU_BOARD,
        ),
    )


def _leak() -> str:
    """Least against most: the ups and downs within steps do not count. Of the fullest rank, which ends the run."""
    allocated, capacity = "run:gradmon_gpu_memory_allocated_bytes:max", "run:gradmon_gpu_memory_capacity_bytes:min"
    growth = f"(min_over_time({allocated}[30m]) - max_over_time({allocated}[30m] offset 2h))"
    return (
        f"({growth} > on ({RUN}) {T.gpu_leak_ratio} * {capacity})"
        f"\nand on ({RUN}) {allocated}\nand on ({RUN}) {same_attempt('150m')}"
    )


def _hardware_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    window = settings.share_window
    uncorrected = 'gradmon_gpu_ecc_errors_total{kind="uncorrected"}'
    errors, more_errors = grown_of_ranks("gpu_ecc_errors", uncorrected, window, own=False)
    ecc = held("gpu_with_ecc_errors", more_errors)
    throttled = held("throttled_gpu", living_ranks(f"{THROTTLED} == 1"))
    links, more_links = grown_of_ranks("gpu_nvlink_errors", "gradmon_gpu_nvlink_errors_total", window, own=False)
    nvlink = held("gpu_with_link_errors", f"({more_links}) > {T.nvlink_errors}")
    return (
        Alert(
            "GradmonGpuEccErrors",
            "ticket",
            "slow",
            ecc[1]["record"],
            "{{ $labels.run }}: memory errors of the GPU of rank {{ $labels.rank }}",
            "The GPU of rank {{ $labels.rank }} of run {{ $labels.run }} had {{ $value | humanize }} memory errors "
            "that can't be corrected. The rank has probably ended.",
            needs=(errors, *ecc),
            board=_GPU_BOARD,
        ),
        Alert(
            "GradmonGpuThrottled",
            "ticket",
            "slow",
            throttled[1]["record"],
            "{{ $labels.run }}: the GPU of rank {{ $labels.rank }} is slowed down",
            "The GPU of rank {{ $labels.rank }} of run {{ $labels.run }} clocks low because of its temperature or "
            "power supply, and all other ranks wait for it.",
            wait="5m",
            needs=throttled,
            board=_GPU_BOARD,
        ),
        Alert(
            "GradmonNvlinkErrors",
            "ticket",
            "slow",
            nvlink[1]["record"],
            "{{ $labels.run }}: NVLink errors at the GPU of rank {{ $labels.rank }}",
            "{{ $value | humanize }} NVLink errors within ten minutes at the GPU of rank {{ $labels.rank }} of run "
            "{{ $labels.run }}. They were repaired, but a link with many is slow and may fail.",
            needs=(links, *nvlink),
            board=_GPU_BOARD,
        ),
        Alert(
            "GradmonHostMemoryNearlyFull",
            "ticket",
            "slow",
            "min by (cluster, host) (gradmon_host_memory_available_bytes / gradmon_host_memory_capacity_bytes)"
            f" < {T.host_memory_available_ratio}",
            "{{ $labels.host }}: only {{ $value | humanizePercentage }} of the memory is left",
            "Host {{ $labels.host }} has {{ $value | humanizePercentage }} of its memory left. When it is used up, the "
            "kernel kills a process, often a rank.",
            wait="5m",
            board=_GPU_BOARD,
        ),
    )
