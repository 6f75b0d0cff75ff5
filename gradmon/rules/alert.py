"""What an alert is, before it becomes a line of a rule file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gradmon.rules.thresholds import RUNBOOK_URL

#: page: a person must act now. ticket: within a day. info: worth knowing, nothing to do. none: the Watchdog.
Severity = Literal["page", "ticket", "info", "none"]
#: Which group of rules it belongs to; a group is evaluated at its own interval.
Group = Literal["events", "ranks", "slow", "targets"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One alerting rule. Two of one name differ in severity or in what they are about.

    Attributes:
        name: begins with `Gradmon`; the heading of its chapter in the runbook.
        expr: PromQL; its labels become the alert's.
        summary: one line.
        description: sentences that say who and what; templates of Prometheus.
        wait: how long `expr` must hold, empty for not at all.
        needs: recording rules that stand before it in its group.
        board: uid of the dashboard to look at first.
    """

    name: str
    severity: Severity
    group: Group
    expr: str
    summary: str
    description: str
    wait: str = ""
    needs: tuple[dict[str, str], ...] = ()
    board: str = "gradmon-run"

    def rule(self) -> dict[str, Any]:
        """As a rule file has it."""
        rule: dict[str, Any] = {"alert": self.name, "expr": self.expr}
        if self.wait:
            rule["for"] = self.wait
        rule["labels"] = {"severity": self.severity}
        rule["annotations"] = {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": f"{RUNBOOK_URL}#{self.name.lower()}",
            # A path: the rules do not know Grafana's address.
            "dashboard": f"/d/{self.board}?var-cluster={{{{ $labels.cluster }}}}&var-run={{{{ $labels.run }}}}",
        }
        return rule
