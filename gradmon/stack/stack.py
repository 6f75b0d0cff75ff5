"""`gradmon stack`: writes the servers' configuration, starts them, follows this machine's agents, prints the alerts."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from gradmon import rules
from gradmon.agent.launch import agent_address
from gradmon.rules import RuleSettings
from gradmon.stack.console import AlertConsole
from gradmon.stack.grafana import start_grafana
from gradmon.stack.servers import Server, ServerError, find_program, start_alertmanager, start_prometheus, write_yaml

#: Where each is looked for first; a taken port is replaced by a free one.
PORTS = {"prometheus": 9090, "alertmanager": 9093, "grafana": 3000}
#: How often the agents' addresses are looked up.
FOLLOW_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What is to be run."""

    directory: Path
    """For configuration, data and logs of the servers."""
    follow: tuple[Path, ...] = ()
    """Directories of journals: whichever agent serves one of them is scraped."""
    targets: tuple[str, ...] = ()
    """`host:port` of further agents."""
    webhook: str | None = None
    """Where Alertmanager is to send alerts too, beside the terminal."""
    settings: RuleSettings = field(default_factory=lambda: rules.SETTINGS)
    """How often is scraped and evaluated, and how long alerts wait."""


class Stack:
    """The servers, from `with` to its end.

    Raises:
        ServerError: Prometheus or Alertmanager is not installed, or does not start.
    """

    def __init__(self, options: StackOptions) -> None:
        self._options = options
        self._ending = threading.Event()
        self._followed: list[dict[str, Any]] | None = None
        self._exits = contextlib.ExitStack()
        self.prometheus: Server
        self.alertmanager: Server
        self.grafana: Server | None = None

    def __enter__(self) -> Stack:
        with self._exits:  # a server that does not start takes the others along
            self._start()
            self._exits = self._exits.pop_all()
        return self

    def _start(self) -> None:
        options, directory = self._options, self._options.directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        console = self._exits.enter_context(AlertConsole())
        config = rules.alertmanager_config(webhook_url=console.url)
        if options.webhook is not None:
            _add_webhook(config, console.url, options.webhook)
        self.alertmanager = self._exits.enter_context(
            start_alertmanager(directory, config, port=PORTS["alertmanager"])
        ).wait_ready()
        self._follow()
        self.prometheus = self._exits.enter_context(
            start_prometheus(
                directory,
                prometheus_config(directory, options.settings, self.alertmanager.url, options.targets),
                port=PORTS["prometheus"],
                flags=["--storage.tsdb.retention.time=15d"],
            )
        ).wait_ready()
        self.grafana = start_grafana(directory, self.prometheus.url, port=PORTS["grafana"])
        if self.grafana is not None:
            self._exits.enter_context(self.grafana).wait_ready()
        follower = threading.Thread(target=self._keep_following, name="gradmon-follow", daemon=True)
        follower.start()
        self._exits.callback(follower.join, 2 * FOLLOW_SECONDS)
        self._exits.callback(self._ending.set)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def check(self) -> None:
        """Look whether all still run.

        Raises:
            ServerError: one has ended.
        """
        for server in (self.prometheus, self.alertmanager, self.grafana):
            if server is not None and server.process.poll() is not None:
                raise ServerError(f"{server.name} has ended; its log is {server.log}")

    def describe(self) -> str:
        """Where each listens, for a person."""
        grafana = f"Grafana:      {self.grafana.url}/dashboards/f/gradmon" if self.grafana is not None else _NO_GRAFANA
        return (
            f"Prometheus:   {self.prometheus.url}/alerts\n"
            f"Alertmanager: {self.alertmanager.url}\n"
            f"{grafana}\n"
            f"Configuration, data and logs: {self._options.directory}"
        )

    def _keep_following(self) -> None:
        while not self._ending.wait(FOLLOW_SECONDS):
            with contextlib.suppress(OSError):  # a full disk; the next round tries again
                self._follow()

    def _follow(self) -> None:
        """An agent takes the next port where its own is taken, comes and goes with the jobs: its lock tells."""
        addresses = [address for directory in self._options.follow if (address := agent_address(directory))]
        groups = [_target(address) for address in addresses]
        if groups != self._followed:
            file = self._options.directory / "agents.json"
            draft = file.with_suffix(".draft")
            draft.write_text(json.dumps(groups), encoding="utf-8")
            draft.replace(file)
            self._followed = groups


_NO_GRAFANA = "Grafana:      not installed here; it would have come up with gradmon's dashboards"


def _target(address: str) -> dict[str, Any]:
    scheme, _, place = address.partition("://")
    return {"targets": [place.rstrip("/")], "labels": {"__scheme__": scheme}}


def _add_webhook(config: dict[str, Any], known: str, further: str) -> None:
    for receiver in config["receivers"]:
        hooks = receiver.get("webhook_configs", [])
        receiver["webhook_configs"] = hooks + [{**hook, "url": further} for hook in hooks if hook["url"] == known]


def prometheus_config(
    directory: Path, settings: RuleSettings, alertmanager: str, targets: Sequence[str]
) -> dict[str, Any]:
    """Prometheus' configuration; the rule files it names are written to `directory`."""
    files = {"recording": rules.recording_rules(settings), "alerts": rules.alert_rules(settings)}
    static = [{"targets": list(targets)}] if targets else []
    return {
        "global": {
            "scrape_interval": settings.event_interval,
            "evaluation_interval": settings.event_interval,
        },
        "rule_files": [str(write_yaml(directory / f"gradmon-{name}.yml", groups)) for name, groups in files.items()],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager.partition("://")[2]]}]}]},
        "scrape_configs": [
            {
                "job_name": "gradmon",
                "file_sd_configs": [{"files": [str(directory / "agents.json")]}],
                "static_configs": static,
                "relabel_configs": [{"target_label": "cluster", "replacement": "local"}],
            }
        ],
    }


def run_stack(options: StackOptions) -> int:
    """Run the servers until Ctrl-C or SIGTERM; the exit code."""
    ending = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    print("Starting " + ", ".join(name for name in PORTS if find_program(name)) + " ...", flush=True)
    try:
        with Stack(options) as stack:
            print(f"\n{stack.describe()}\n\nAlerts are printed below. Ctrl-C ends them all.\n", flush=True)
            while not ending.wait(1.0):
                stack.check()
    except ServerError as error:
        print(f"gradmon: {error}", file=sys.stderr)
        return 1
    return 0
