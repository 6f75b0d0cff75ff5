"""PromQL that several dashboards share."""

from __future__ import annotations

from boards.frame import FIRST, RANK, RUN, living, of_run
from boards.parts import BAD, CALM, GOOD, NOTE, REST, WARN, Line, Query
from gradmon.rules import THRESHOLDS

BY_RUN, BY_RANK = "by (cluster, run)", "by (cluster, run, rank)"

#: What a run is doing, as a number that is larger the worse it is.
STATE = {
    "0": ("ended", REST),
    "1": ("training", GOOD),
    "2": ("paused", NOTE),
    "3": ("learning rate lowered", CALM),
    "4": ("weights suspect", WARN),
    "5": ("no step", BAD),
}


def idle() -> str:
    """Seconds since the last step of a run that is not paused: those of rank 0, with which all others go in step."""
    return (
        f"(min {BY_RUN} (gradmon_last_step_age_seconds{{{FIRST}}}) "
        f"unless (max {BY_RUN} (gradmon_paused{{{FIRST}}}) == 1))"
    )


def state() -> str:
    """One number of STATE per run: the first line that holds."""
    return (
        f"({idle()} > {THRESHOLDS.stuck_seconds:g}) * 0 + 5 "
        f"or (min {BY_RUN} {living('gradmon_healthy')} == 0) + 4 "
        f"or ({of_run('gradmon_learning_rate_scale_ratio')} < {THRESHOLDS.learning_rate_scale_ratio:g}) * 0 + 3 "
        f"or (max {BY_RUN} (gradmon_paused{{{FIRST}}}) == 1) + 1 "
        f"or max {BY_RUN} (gradmon_world_size{{{RUN}}}) * 0 + 1 "
        f"or max {BY_RUN} (gradmon_run_info{{{RUN}}}) * 0"
    )


def over_limit() -> str:
    """Gradient norm over the norm above which a step is a spike."""
    return f"{of_run('gradmon_grad_norm')} / {of_run('gradmon_grad_norm_limit')}"


def alive(selector: str = RANK) -> str:
    """Number of ranks whose process lives. After a requeue the old agent shows 0 for the same rank."""
    return f"count {BY_RUN} (gradmon_rank_up{{{selector}}} == 1)"


def missing() -> str:
    """Number of ranks the run should have and that do not live."""
    size = f"max {BY_RUN} (gradmon_world_size{{{RUN}}})"
    return f"clamp_min({size} - {alive(RUN)}, 0)"


def steps_per_second() -> str:
    """Of a run; its rank 0 speaks for all."""
    return f"max {BY_RUN} (rate(gradmon_steps_total{{{FIRST}}}[$__rate_interval]))"


def grew(counter: str, by: str = BY_RUN) -> str:
    """By how much a counter (with its selector) grew in the time shown; a whole number."""
    return f"round(sum {by} (increase({counter}[$__range])))"


def busy() -> str:
    """Seconds per step that each rank computes before it meets the others; those that make no step are left out."""
    window = "[$__rate_interval]"
    steps = f"(rate(gradmon_steps_total{{{RANK}}}{window}) > 0)"
    return f"rate(gradmon_busy_seconds_total{{{RANK}}}{window}) / {steps}"


def waiting() -> str:
    """Share of its time that each rank waits for data."""
    return f"rate(gradmon_data_wait_seconds_total{{{RANK}}}[$__rate_interval])"


def per_row(metric: str, function: str = "max") -> str:
    """A metric per heatmap row: a rank, or 10 or 100 or 1,000 neighbours where there are 100 ranks and more.

    `$drop` holds as many dots as digits are cut off a rank's number; the rest is written with two digits, so that the
    rows stand in their order.
    """
    cut = f'{function} by (group) (label_replace({metric}, "group", "$1", "rank", "(.*)$drop"))'
    once = f'label_replace({cut}, "group", "0$1", "group", "(.?)")'
    return f'label_replace({once}, "group", "0$1", "group", "(.?)")'


#: For the description of every heatmap of ranks.
ROWS = (
    "One row per rank. From 100 ranks on neighbours share a row, which shows the worst of them: of 512 ranks row 37 "
    "holds 370 to 379, of 4,096 ranks 3700 to 3799."
)


def band(each: str) -> tuple[Query, ...]:
    """Highest, median and lowest of the ranks, and the band that holds 8 of 10: five lines, however many ranks."""
    named = (("highest", 1), ("8 of 10", 0.9), ("median", 0.5), ("8 of 10, low", 0.1), ("lowest", 0))
    return tuple(Query(f"quantile({share}, {each})", name) for name, share in named)


#: How `band` looks.
BAND = {
    "highest": Line(WARN, width=1),
    "8 of 10": Line(NOTE, width=0, fill_to="8 of 10, low"),
    "median": Line(NOTE, width=2),
    "8 of 10, low": Line(NOTE, width=0, unnamed=True),
    "lowest": Line(REST, width=1),
}


def worst_ranks(count: int = 50) -> str:
    """Ranks that do not live, then those that broke most steps in the time shown."""
    broke = f"sum {BY_RANK} (increase(gradmon_incidents_total{{{RANK}}}[$__range]))"
    return f"topk({count}, 1e9 * (1 - max {BY_RANK} (gradmon_rank_up{{{RANK}}})) + {broke})"
