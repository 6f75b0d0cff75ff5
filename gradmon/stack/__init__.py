"""Prometheus, Alertmanager and, where it is installed, Grafana on this machine's loopback, without Docker."""

from __future__ import annotations

from gradmon.stack.servers import ServerError
from gradmon.stack.stack import Stack, StackOptions, run_stack

__all__ = ["ServerError", "Stack", "StackOptions", "run_stack"]
