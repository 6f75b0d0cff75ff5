"""All alerts, as the contents of Prometheus rule files."""

from __future__ import annotations

from typing import Any

from gradmon.rules.alert import Alert, Group
from gradmon.rules.expressions import incident_rules
from gradmon.rules.machines import gradmon_alerts, rank_alerts, resource_alerts, target_alerts
from gradmon.rules.thresholds import SETTINGS, RuleSettings
from gradmon.rules.training import gradient_alerts, loss_alerts, remedy_alerts, watch_alerts


def all_alerts(settings: RuleSettings = SETTINGS) -> tuple[Alert, ...]:
    """Every alert, those about targets last."""
    makers = (
        gradient_alerts,
        remedy_alerts,
        loss_alerts,
        watch_alerts,
        rank_alerts,
        resource_alerts,
        gradmon_alerts,
        target_alerts,
    )
    return tuple(alert for make in makers for alert in make(settings))


#: Every alert, with production times. A name stands twice where its severity depends on what was done about it.
ALERTS: tuple[Alert, ...] = all_alerts()


def alert_rules(settings: RuleSettings = SETTINGS) -> dict[str, Any]:
    """A rule file's content: alerts about runs, ranks, GPUs, hosts and gradmon itself, and the Watchdog.

    They need `recording_rules(settings)` beside them.
    """
    first = {"events": incident_rules(settings)}
    groups: tuple[Group, ...] = ("events", "ranks", "slow")
    return {"groups": [_group(name, settings, first.get(name, [])) for name in groups]}


def target_rules(settings: RuleSettings = SETTINGS) -> dict[str, Any]:
    """A rule file's content: agents that can't be scraped. Leave it out where agents come and go with their jobs."""
    return {"groups": [_group("targets", settings, [])]}


def _group(name: Group, settings: RuleSettings, first: list[dict[str, str]]) -> dict[str, Any]:
    intervals = {
        "events": settings.event_interval,
        "ranks": settings.rank_interval,
        "slow": settings.slow_interval,
        "targets": settings.rank_interval,
    }
    rules: list[dict[str, Any]] = list(first)
    for alert in all_alerts(settings):
        if alert.group == name:
            rules += [*alert.needs, alert.rule()]
    return {"name": f"gradmon-{name}-alerts", "interval": intervals[name], "rules": rules}
