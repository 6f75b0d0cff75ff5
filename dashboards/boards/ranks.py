"""Ranks: which process is different from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from boards import ask
from boards.ask import BAND, BY_RANK, BY_RUN, ROWS
from boards.frame import GROUPS, HOSTS, ONE_RUN, RANK, RANKS, Board, peak, ranked
from boards.parts import BAD, GOOD, NOTE, REST, WARN, Column, Line, Query, bars, grid, heat, history, lines, number
from gradmon.rules import THRESHOLDS

_NONFINITE = f"gradmon_local_nonfinite_elements_total{{{RANK}}}"
_SLOW = ((None, GOOD), (THRESHOLDS.straggler_ratio, WARN))
#: Points of charts whose query looks at every rank.
_POINTS = 100
#: And at two rates of every rank.
_FEWER = 60


def _straggler() -> str:
    return f"max({ask.busy()}) / quantile(0.5, {ask.busy()})"


def _now() -> Sequence[Any]:
    broken = f"sum {BY_RANK} (increase(gradmon_incidents_total{{{RANK}}}[$__range])) > 0.5"
    return (
        number("Ranks alive", "Processes alive among the chosen ranks; usually one for each GPU.", "none", Query(
            f"sum({ask.alive()}) or vector(0)"), steps=((None, NOTE),)),
        number("Ranks missing", "Processes the run should have and that no agent sees alive.", "none", Query(
            f"sum({ask.missing()}) or vector(0)"), steps=((None, GOOD), (1, BAD)), runbook="GradmonRankSilent"),
        number("Slowest / median", "Computing time per step of the slowest rank over that of the median one. "
            "All ranks wait for the slowest. DDP only.", "none", Query(_straggler()), instant=True,
            decimals=2, steps=_SLOW,
            runbook="GradmonStraggler"),
        number("Step time", "Seconds per optimizer step, the median of the ranks.", "s", Query(
            f"quantile(0.5, {ranked('gradmon_step_duration_seconds')})"), steps=((None, NOTE),)),
        number("Waiting for data", "Share of its time that the median rank waits for its next batch.", "percentunit",
            Query(f"quantile(0.5, {ask.waiting()})"), decimals=1,
            steps=((None, GOOD), (THRESHOLDS.data_wait_ratio, WARN)), runbook="GradmonDataWait"),
        number("Ranks that broke steps", "Ranks whose own gradients spiked or held NaN in the time shown.", "none",
            Query(f"count({broken}) or vector(0)"), instant=True, steps=((None, GOOD), (1, WARN))),
        number("Ranks failed", "Ranks that ended by an exception or an exit code.", "none", Query(
            f"sum(max {BY_RANK} (gradmon_rank_failed{{{RANK}}})) or vector(0)"), steps=((None, GOOD), (1, BAD)),
            runbook="GradmonRankFailed"),
        number("Oldest heartbeat", "Time since the last sign of life of the quietest rank; each gives one every 5 s.",
            "s", Query(f"max({ranked('gradmon_last_heartbeat_age_seconds')})"), decimals=0,
            steps=((None, GOOD), (THRESHOLDS.heartbeat_age_seconds, BAD)), runbook="GradmonRankFrozen"),
    )  # fmt: skip


def _gradients() -> Sequence[Any]:
    norm = f"gradmon_local_grad_norm{{{RANK}}}"
    share = f"max {BY_RANK} ({norm}) / ignoring (rank) group_left () quantile {BY_RUN} (0.5, {norm})"
    each = f"sum {BY_RANK} (increase({_NONFINITE}[$__rate_interval]) > 0)"
    shown = f"topk(20, sum {BY_RANK} (increase({_NONFINITE}[$__range] @ end()) > 0))"
    return (
        heat("Local gradient norm, rank by time", (
            "The gradient norm of each rank before the ranks are averaged, as a power of ten (0 is 1, 1 is 10, 2 is "
            f"100). A bright row is a rank with bad data or a bad GPU; a bright column is the training itself. {ROWS}"),
            "none", Query(f"log10({ask.per_row(peak('gradmon_local_grad_norm', RANK))})", "{{group}}"), width=17,
            decimals=2, axis="rank"),
        bars("Local norm over the median", "The ranks whose gradients are largest now, against the median rank; 1 is "
            "like the others.", "none", Query(f"sort_desc(topk(10, {share}))", "rank {{rank}}"), width=7, height=10,
            decimals=2, steps=((None, NOTE),)),
        lines("Local gradient norm over the ranks", "Where the ranks lie: the highest, the lowest, the median, and the "
            "band that holds 8 of 10.", "none", *ask.band(ranked("gradmon_local_grad_norm")), look=BAND, log=True,
            width=12, points=_POINTS, fill=0),
        history("NaN and Inf elements by rank", (
            "Elements of a rank's own gradients that are not numbers, per interval: the ranks where the trouble "
            "starts. Up to 20 ranks with most of them; empty is good."), "none",
            Query(f"round({each}) and on (cluster, run, rank) {shown}", "rank {{rank}}"),
            ((None, "#22252b"), (1, BAD)), runbook="GradmonNonfiniteGradients"),
    )  # fmt: skip


def _pace() -> Sequence[Any]:
    busy = f"max {BY_RANK} ({ask.busy()})"
    over = f"{busy} / ignoring (rank) group_left () quantile {BY_RUN} (0.5, {ask.busy()})"
    return (
        heat("Computing time per step, rank by time", (
            "Seconds of each step that a rank computes before it has to wait for the others: data, forward, backward. "
            f"The bright row holds all others up. DDP only. {ROWS}"), "s",
            Query(ask.per_row(ask.busy()), "{{group}}"), width=17, axis="rank", scheme="Viridis", points=_FEWER),
        bars("Slowest ranks", "Computing time per step over the median rank's, the slowest ten.", "none",
            Query(f"sort_desc(topk(10, {over}))", "rank {{rank}}"), width=7, height=10, decimals=2, steps=_SLOW,
            runbook="GradmonStraggler"),
        lines("Computing time per step", "Seconds per step before the ranks meet. Far apart: some wait for the "
            "others.", "s", *ask.band(ask.busy()), look=BAND, lowest=0, points=_FEWER, fill=0,
            runbook="GradmonStraggler"),
        lines("Duration of a step", "Seconds per optimizer step, waiting for the others included.", "s",
            *ask.band(ranked("gradmon_step_duration_seconds")), look=BAND, lowest=0, points=_POINTS, fill=0),
        lines("Waiting for data over the ranks", "Share of its time that a rank waits for its DataLoader's next batch; "
            "near 0 is good.", "percentunit", *ask.band(ask.waiting()), look=BAND, lowest=0, points=_POINTS, fill=0,
            steps=((None, "transparent"), (THRESHOLDS.data_wait_ratio, WARN)), runbook="GradmonDataWait"),
    )  # fmt: skip


def _life() -> Sequence[Any]:
    states = (
        ("training", f"(gradmon_rank_up{{{RANK}}} == 1) unless on (job, instance, run, rank) "
            f"(gradmon_paused{{{RANK}}} == 1)"),
        ("paused", f"gradmon_paused{{{RANK}}} == 1"),
        ("finished", f"gradmon_rank_finished{{{RANK}}} == 1"),
        ("failed", f"gradmon_rank_failed{{{RANK}}} == 1"),
        ("killed", f"(gradmon_rank_up{{{RANK}}} == 0) unless on (job, instance, run, rank) "
            f"((gradmon_rank_finished{{{RANK}}} == 1) or (gradmon_rank_failed{{{RANK}}} == 1))"),
    )  # fmt: skip
    colors = (GOOD, NOTE, REST, BAD, WARN)
    return (
        lines("What the ranks do", (
            "Number of ranks that train, are paused (evaluation, checkpoint), have finished, failed by an exception, "
            "or were killed."), "none", *(Query(f"count({expr}) or vector(0)", name) for name, expr in states),
            look={name: Line(color) for (name, _), color in zip(states, colors, strict=True)}, lowest=0,
            points=_POINTS, fill=10, runbook="GradmonRankSilent"),
        lines("Loss over the ranks", "Loss each rank observed last: the highest, lowest and median.", "none",
            *ask.band(ranked("gradmon_loss")), look=BAND, points=_POINTS, fill=0),
        lines("Memory of the processes", "Resident memory of the ranks' processes. A line that only climbs is a leak; "
            "at the node's limit the system kills a rank.", "bytes",
            *ask.band(ranked("gradmon_process_resident_memory_bytes")), look=BAND, points=_POINTS, lowest=0, fill=0),
        _table(),
        lines("Trouble in the data", "What the watch over the batches found, by rank: NaN, values out of range, the "
            "same batch twice, labels of mostly one class. Empty is good.", "none", Query(
            f"topk(10, sum {BY_RANK} (increase(gradmon_data_findings_total{{{RANK}}}[$__rate_interval])) > 0)",
            "rank {{rank}}"), lowest=0, bars=True, points=_POINTS, width=6, runbook="GradmonBadData"),
        lines("Failures of gradmon itself", "Parts of gradmon that failed inside a training process; training went on "
            "without them.", "none", Query(
            f"sum by (part) (increase(gradmon_errors_total{{{RANK}}}[$__rate_interval]))", "{{part}}"), lowest=0,
            bars=True, points=_POINTS, width=6, runbook="GradmonUnwell"),
        bars("Longest without a step", "Time since a rank's last step, the longest ten. All alike: the run stands or "
            "is paused.", "s", Query(f"sort_desc(topk(10, max {BY_RANK} (gradmon_last_step_age_seconds{{{RANK}}})))",
            "rank {{rank}}"), steps=((None, GOOD), (THRESHOLDS.stuck_seconds, BAD)), width=6,
            runbook="GradmonRunStuck"),
        lines("Threads and open files", "Threads and open files of the process with most of them; open files that "
            "only grow are a leak.", "none",
            Query(f"max({ranked('gradmon_process_threads')})", "threads"),
            Query(f"max({ranked('gradmon_process_open_fds')})", "open files"),
            look={"threads": Line(NOTE), "open files": Line(WARN)}, lowest=0, points=_POINTS, fill=0, width=6),
    )  # fmt: skip


def _table() -> Any:
    def per_rank(metric: str, function: str = "max", by: str = BY_RANK) -> str:
        return f"{function} {by} ({metric}) and on (cluster, run, rank) {ask.worst_ranks()}"

    where = "by (cluster, run, rank, host, device)"
    alive = {"0": ("gone", BAD), "1": ("alive", GOOD)}
    return grid(
        "Ranks, the worst first",
        (
            "Up to 50 ranks: those that are gone, then those that broke most steps in the time shown. Broke: steps "
            "that this rank's own gradients spoilt. Left out: steps whose average went without this rank."
        ),
        Column("Rank", label="rank", width=70),
        Column("Process", per_rank(f"gradmon_rank_up{{{RANK}}}"), words=alive, width=90),
        Column("Host", per_rank(f"gradmon_rank_info{{{RANK}}}", by=where), label="host", hidden=True),
        Column("Device", label="device"),
        Column("Broke steps", per_rank(f"round(increase(gradmon_incidents_total{{{RANK}}}[$__range]))", "sum"),
            unit="none", decimals=0, steps=((None, GOOD), (1, WARN)), width=105),
        Column("NaN and Inf", per_rank(f"round(increase({_NONFINITE}[$__range]))", "sum"), unit="short",
            steps=((None, GOOD), (1, WARN)), width=105),
        Column("Left out", per_rank(f"round(increase(gradmon_left_out_steps_total{{{RANK}}}[$__range]))"),
            unit="none", decimals=0, steps=((None, GOOD), (1, WARN)), width=90),
        Column("NaN losses", per_rank(f"round(increase(gradmon_nonfinite_losses_total{{{RANK}}}[$__range]))"),
            unit="none", decimals=0, steps=((None, GOOD), (1, WARN)), width=100),
        Column("Local norm", per_rank(f"gradmon_local_grad_norm{{{RANK}}}"), unit="none", decimals=2, width=100),
        Column("Loss", per_rank(f"gradmon_loss{{{RANK}}}"), unit="none", decimals=3, width=80),
        Column("Busy per step", per_rank(
            f"rate(gradmon_busy_seconds_total{{{RANK}}}[5m]) / (rate(gradmon_steps_total{{{RANK}}}[5m]) > 0)"),
            unit="s", width=115),
        Column("Waits for data", per_rank(f"rate(gradmon_data_wait_seconds_total{{{RANK}}}[5m])"),
            unit="percentunit", decimals=1, width=120),
        Column("Memory", per_rank(f"gradmon_process_resident_memory_bytes{{{RANK}}}"), unit="bytes", width=95),
        Column("Step", per_rank(f"gradmon_steps_total{{{RANK}}}"), unit="none", decimals=0, width=85),
        sort="Broke steps",
        height=10,
    )  # fmt: skip


def _rows() -> Sequence[tuple[str, Sequence[Any]]]:
    return (
        ("Now", _now()),
        ("Whose gradients", _gradients()),
        ("Who is slow", _pace()),
        ("Who lives", _life()),
    )


BOARD = Board(
    "ranks",
    "gradmon / Ranks",
    "The ranks of one run against each other: whose gradients broke, who is slow, who is gone.",
    (ONE_RUN, HOSTS, RANKS, GROUPS),
    _rows,
)
