"""The Alertmanager configuration: who is told what, grouped per run, without the consequences of what is told already.

It holds for Alertmanager 0.25 and later. Secrets come from files, read for each message: a missing one breaks its own
channel only. Two exceptions of old versions: a webhook's address comes from a file from 0.26 on (its bearer token
always does), and the secret of a WeCom application from 0.31 on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

SECRETS = "/etc/alertmanager/secrets"
_TITLE = (
    "[{{ .Status | toUpper }}] {{ with .CommonLabels.run }}{{ . }}: {{ end }}{{ (index .Alerts 0).Labels.alertname }}"
)
_TEXT = (
    "{{ range .Alerts }}{{ .Annotations.summary }}\n{{ .Annotations.description }}\n"
    "{{ .Annotations.runbook_url }}\n\n{{ end }}"
)

#: Ways to reach people. The addresses are examples.
CHANNELS: Mapping[str, Mapping[str, Any]] = {
    "webhook": {
        "webhook_configs": [
            {
                "url": "http://alert-receiver.example:8080/gradmon",
                "send_resolved": True,
                "http_config": {"authorization": {"credentials_file": f"{SECRETS}/webhook-token"}},
            }
        ]
    },
    "slack": {
        "slack_configs": [
            {
                "api_url_file": f"{SECRETS}/slack-url",
                "channel": "#training-alerts",
                "send_resolved": True,
                "title": _TITLE,
                "text": _TEXT,
            }
        ]
    },
    "email": {
        "email_configs": [
            {
                "to": "training@example.com",
                "from": "gradmon@example.com",
                "smarthost": "smtp.example.com:587",
                "auth_username": "gradmon@example.com",
                "auth_password_file": f"{SECRETS}/smtp-password",
                "send_resolved": True,
                "headers": {"Subject": _TITLE},
            }
        ]
    },
    "pagerduty": {
        "pagerduty_configs": [
            {
                "routing_key_file": f"{SECRETS}/pagerduty-routing-key",
                "severity": "critical",
                "description": _TITLE,
                "send_resolved": True,
            }
        ]
    },
    "wecom": {
        "wechat_configs": [
            {
                "corp_id": "ww0000000000000000",
                "agent_id": "1000002",
                "to_party": "1",
                "api_secret": "write the secret here, or its file with api_secret_file (Alertmanager 0.31)",
                "message": f"{_TITLE}\n{_TEXT}",
                "send_resolved": True,
            }
        ]
    },
}

#: Which channels each severity uses.
RECEIVERS: Mapping[str, Sequence[str]] = {
    "page": ("pagerduty", "slack"),
    "ticket": ("slack", "email"),
    "info": ("webhook",),
}

#: Said at the head of the written file.
COMMENT = f"""\
Replace the example addresses, put the secrets below {SECRETS}, and keep of the receivers `page`, `ticket` and `info`
only the blocks you have: a receiver may hold any of webhook_configs, slack_configs, email_configs, pagerduty_configs
and wechat_configs. `wecom` is used by no route: move its block where you want it. From Alertmanager 0.26 on write
url_file for a webhook whose address is secret, from 0.31 on api_secret_file for WeCom.
`watchdog` gets GradmonWatchdog every minute: give it to a dead man's switch that calls you when it stays away.
"""

#: Alert -> what it explains, in the same run. A page is silenced by a page only.
CONSEQUENCES: Mapping[str, Sequence[str]] = {
    "GradmonGradientExplosion": (
        "GradmonSpike",
        "GradmonLearningRateBackedOff",
        "GradmonSkipStreak",
        "GradmonWeightsUnfit",
        "GradmonLossNotDecreasing",
    ),
    "GradmonManyNonfiniteSteps": (
        "GradmonNonfiniteGradients",
        "GradmonSkipStreak",
        "GradmonWeightsUnfit",
        "GradmonLossNotFinite",
        "GradmonLossNotDecreasing",
    ),
    "GradmonTrainingStopped": (
        "GradmonNonfiniteGradients",
        "GradmonManyNonfiniteSteps",
        "GradmonSkipStreak",
        "GradmonScalerSkips",
        "GradmonWeightsUnfit",
        "GradmonLossNotFinite",
        "GradmonRankFailed",
        "GradmonRankSilent",
        "GradmonRankFrozen",
        "GradmonRunStuck",
    ),
    "GradmonRunStuck": ("GradmonRankFrozen", "GradmonStraggler", "GradmonDataWait", "GradmonLossNotDecreasing"),
    "GradmonRankFailed": ("GradmonRankSilent", "GradmonRankFrozen", "GradmonStraggler"),
    "GradmonGpuOutOfMemory": ("GradmonAllocatorRetries", "GradmonGpuMemoryNearlyFull"),
    "GradmonGpuThrottled": ("GradmonStraggler",),
}


def alertmanager_config(
    receivers: Mapping[str, Sequence[str]] = RECEIVERS, *, webhook_url: str | None = None
) -> dict[str, Any]:
    """Content of alertmanager.yml.

    Args:
        receivers: channels (keys of CHANNELS) for each of page, ticket and info. Channels that none of them uses are
            there as receivers of their own, for an operator to move.
        webhook_url: send everything but the Watchdog there and at once, instead: for one machine.
    """
    if webhook_url is not None:
        return _to_webhook(webhook_url)
    used = {channel for channels in receivers.values() for channel in channels}
    return {
        "route": {
            "receiver": "ticket",
            **_pace("5s", "1d"),
            "routes": [
                _watchdog(),
                _route("page", _pace("5s", "1h")),
                _route("info", _pace("1m", "1d")),
                _route("ticket", _pace("5s", "1d")),
            ],
        },
        "inhibit_rules": _inhibit_rules(),
        "receivers": [
            *({"name": name, **_merged(channels)} for name, channels in receivers.items()),
            {
                "name": "watchdog",
                "webhook_configs": [{"url": "http://dead-mans-switch.example:8080/gradmon", "send_resolved": False}],
            },
            *({"name": channel, **block} for channel, block in CHANNELS.items() if channel not in used),
        ],
    }


def _to_webhook(url: str) -> dict[str, Any]:
    pace = {"group_by": ["cluster", "run"], "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"}
    return {
        "route": {
            "receiver": "webhook",
            **pace,
            "routes": [{"matchers": ['alertname="GradmonWatchdog"'], "receiver": "nobody"}],
        },
        "inhibit_rules": _inhibit_rules(),
        "receivers": [
            {"name": "webhook", "webhook_configs": [{"url": url, "send_resolved": True}]},
            {"name": "nobody"},
        ],
    }


def _pace(interval: str, repeat: str) -> dict[str, Any]:
    """Groups per run. What joins a group later waits for `interval`, so it is as short as the first wait."""
    return {
        "group_by": ["cluster", "run"],
        "group_wait": "2s",
        "group_interval": interval,
        "repeat_interval": repeat,
    }


def _route(severity: str, pace: dict[str, Any]) -> dict[str, Any]:
    # Alerts of hosts and targets have no run: without a route of their own they would all be one group.
    without_run = {"matchers": ['run=""'], "group_by": ["cluster", "alertname"]}
    return {"matchers": [f'severity="{severity}"'], "receiver": severity, **pace, "routes": [without_run]}


def _watchdog() -> dict[str, Any]:
    return {
        "matchers": ['alertname="GradmonWatchdog"'],
        "receiver": "watchdog",
        "group_wait": "0s",
        "group_interval": "1m",
        "repeat_interval": "1m",
    }


def _merged(channels: Sequence[str]) -> dict[str, Any]:
    # Copies: YAML would write an anchor for what two receivers share.
    return {key: copy.deepcopy(value) for channel in channels for key, value in CHANNELS[channel].items()}


def _any_of(names: Sequence[str]) -> str:
    names_re = "|".join(names)
    return f'alertname=~"{names_re}"'


def _inhibit_rules() -> list[dict[str, Any]]:
    return [
        {
            "source_matchers": [f'alertname="{source}"'],
            "target_matchers": [_any_of(targets)],
            "equal": ["cluster", "run"],
        }
        for source, targets in CONSEQUENCES.items()
    ]
