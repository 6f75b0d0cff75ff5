"""PromQL that several rules need, each trap solved once.

Two agents may export one run at a time: after a requeue the old node still shows the dead ranks for an hour. So nothing
is joined on a side that could be there twice, and gauges of ended ranks are left aside.
"""

from __future__ import annotations

from gradmon.rules.thresholds import RuleSettings

#: One alert per run.
RUN = "cluster, run"
#: How far back a counter counts as seen before. Longer than an agent, a target or Prometheus itself is usually away.
_MEMORY = "30m"


def grown(counter: str, selector: str, window: str, by: str = RUN) -> str:
    """How much a counter labelled by run has grown in `window`; nothing where it has not.

    increase() never sees a counter that is above zero when it is first scraped, hence the rest. It compares with what
    the run's counter was before the window, from whatever instance: an agent that restarts, even on another port,
    brings no old events back, and a run that comes back on another node is heard.
    """
    series = f"{counter}{{{selector}}}" if selector else counter
    now, before = f"max by ({by}) ({series})", f"max by ({by}) (last_over_time({series}[{_MEMORY}] offset {window}))"
    return (
        f"(sum by ({by}) (increase({series}[{window}])) > 0)"
        f"\nor ({now} > on ({by}) {before})"
        f"\nor ({now} > 0 unless on ({by}) {before})"
    )


def grown_of_ranks(what: str, counter: str, window: str, *, own: bool = True) -> tuple[dict[str, str], str]:
    """The same for a counter per rank, by (cluster, run, rank): a recording rule, and an expression that needs it.

    There may be 10,000 ranks, and nearly all of these counters are 0: the rule records the others once, and all
    looking back is done on what it recorded, agent by agent: after a requeue two of them show a rank for an hour. What
    it had not recorded at three moments is new; they lie so that an agent's restart covers at most one of them.

    Args:
        what: names the recorded series.
        counter: with its selector.
        window: how far back.
        own: True if the counter begins at 0 with the rank; one of the driver's may be older than the run.
    """
    rank, record = f"{RUN}, rank", f"rank:gradmon_{what}:nonzero"
    before = (window, f"{seconds(window) + 120}s", _MEMORY)
    # At an agent that had the run already; its rank's counter was 0.
    began = record + "".join(f" unless {record} offset {moment}" for moment in before)
    began = f"({began}) and on (cluster, instance, run) gradmon_world_size offset {window}"
    grew = f"max by ({rank}) ((({record} - {record} offset {window}) > 0) or ({began}))"
    if own:  # at a new agent; it may bring what another one has shown
        born = f"max by ({rank}) ({record})" + "".join(f" unless on ({rank}) {record} offset {m}" for m in before)
        grew = f"{grew}\nor ({born})"
    return {"record": record, "expr": f"sum by ({rank}, instance) ({counter} > 0)"}, grew


def either(first: str, second: str) -> str:
    """One alert per run for either of two reasons, both by (cluster, run)."""
    return f"({first})\nor on ({RUN})\n({second})"


def living_run(metric: str) -> str:
    """A gauge of the run, by (cluster, run), from the agent where its rank 0 lives; nothing once it has ended."""
    return f'max by ({RUN}) ({metric} and on (cluster, instance, run) (gradmon_rank_up{{rank="0"}} == 1))'


def living_ranks(expression: str) -> str:
    """Series per rank, from the nodes where ranks of the run live: world_size is shown by those only.

    A comparison with each rank's own gradmon_rank_up would be more exact, and five times dearer.
    """
    return f"({expression}) and on (cluster, instance, run) gradmon_world_size"


def named(expression: str, kinds: str, otherwise: str = "") -> str:
    """Put rank, parameter and kind of the newest incident of these kinds on an expression by (cluster, run).

    "unknown" where there is none, so that the alert fires whatever is known. `otherwise` is what comes before that: a
    spike that turns into NaN within one scrape is only known by the NaN.
    """
    incident, *rest = (
        f'topk by ({RUN}) (1, run:gradmon_incident:timestamp_seconds{{kind=~"{kind}"}})'
        for kind in (kinds, otherwise)
        if kind
    )
    for other in rest:
        incident = f"{incident} or on ({RUN}) {other}"
    unknown = expression
    for label in ("rank", "parameter", "kind"):
        unknown = f'label_replace({unknown}, "{label}", "unknown", "", "")'
    return (
        f"({expression})\n* on ({RUN}) group_left (rank, parameter, kind)"
        f"\ngroup by ({RUN}, rank, parameter, kind) ({incident})"
        f"\nor on ({RUN})\n{unknown}"
    )


def held(what: str, ranks: str) -> tuple[dict[str, str], dict[str, str]]:
    """Recording rules `rank:gradmon_WHAT:bad` and `run:gradmon_WHAT:held` for an expression that finds bad ranks.

    The second names one bad rank per run, and stays with it while it is bad. Without that, the worst of several changes
    from one evaluation to the next, and with it the alert: its `for` would begin anew each time. Both stand before the
    alert in the same group; where all is well they have no series.
    """
    keys, bad, one = f"{RUN}, rank", f"rank:gradmon_{what}:bad", f"run:gradmon_{what}:held"
    return (
        {"record": bad, "expr": f"max by ({keys}) ({ranks})"},
        {"record": one, "expr": f"({bad} and on ({keys}) {one})\nor on ({RUN})\ntopk by ({RUN}) (1, {bad})"},
    )


def warm(expression: str, steps: int) -> str:
    """Only once the run has made this many steps."""
    return f'({expression})\nand on ({RUN}) (max by ({RUN}) (gradmon_steps_total{{rank="0"}}) > {steps})'


def incident_rules(settings: RuleSettings) -> list[dict[str, str]]:
    """Recording rules for who broke first. They stand before the alerts in one group, to be as new as the counters.

    The newest incident changes with every broken step; an alert's labels must not, or each change is a new alert and
    one more message. So the culprit is held through an episode: incidents whose times are less than `episode` apart.
    """
    keys = f"{RUN}, rank, parameter, kind"
    newest, held = "run:gradmon_last_incident:timestamp_seconds", "run:gradmon_incident:timestamp_seconds"
    kind = f"{RUN}, kind"
    later = f"(max by ({kind}) ({newest}) - on ({kind}) max by ({kind}) ({held}))"
    return [
        {
            "record": newest,
            "expr": (
                f"topk by ({RUN}) (1, max by ({keys}) (gradmon_last_incident_info"
                f"\n* ignoring (rank, parameter, kind) group_left () gradmon_last_incident_timestamp_seconds))"
            ),
        },
        {
            "record": held,
            "expr": (
                f"(\n  {held} + on ({kind}) group_left () ({later} < {settings.episode})"
                f"\n  or on ({kind}) {newest}"
                f"\n  or on ({kind}) {held}\n)"
                f"\n> time() - {max(2 * seconds(settings.event_window), seconds(settings.lasting_window))}"
            ),
        },
    ]


def seconds(duration: str) -> int:
    """Seconds of a PromQL duration with one unit."""
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]
