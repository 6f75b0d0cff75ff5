"""Prometheus rules and an Alertmanager configuration, built from METRICS: plain dicts, ready to be written as YAML."""

from gradmon.rules.alert import Alert
from gradmon.rules.alertmanager import COMMENT as ALERTMANAGER_COMMENT
from gradmon.rules.alertmanager import alertmanager_config
from gradmon.rules.alerts import ALERTS, alert_rules, all_alerts, target_rules
from gradmon.rules.recording import recorded_names, recording_rules
from gradmon.rules.thresholds import (
    DEMO,
    JOB,
    RUNBOOK_URL,
    SETTINGS,
    SETTINGS_15S,
    THRESHOLDS,
    RuleSettings,
    Thresholds,
)

__all__ = [
    "ALERTMANAGER_COMMENT",
    "ALERTS",
    "DEMO",
    "JOB",
    "RUNBOOK_URL",
    "SETTINGS",
    "SETTINGS_15S",
    "THRESHOLDS",
    "Alert",
    "RuleSettings",
    "Thresholds",
    "alert_rules",
    "alertmanager_config",
    "all_alerts",
    "recorded_names",
    "recording_rules",
    "target_rules",
]
