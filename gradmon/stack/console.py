"""Alertmanager's webhook on loopback: prints what it is sent, a line or two per alert."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, TextIO

#: Labels that the first line shows, in this order.
_SHOWN = ("run", "rank", "parameter", "kind", "host", "reason")


class AlertConsole:
    """Serves from `with` to its end."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        console = self
        self._stream = stream
        self._told: dict[str, str] = {}
        """Alert -> status that was printed; Alertmanager sends all alerts of a group whenever one changes."""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                try:
                    console.show(json.loads(body))
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.send_response(400)
                else:
                    self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Alerts are printed, requests are not."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def show(self, message: dict[str, Any]) -> None:
        """Print one of Alertmanager's messages."""
        for alert in message["alerts"]:
            who = json.dumps(alert["labels"], sort_keys=True)
            if self._told.get(who) != alert["status"]:
                self._told[who] = alert["status"]
                print(describe_alert(alert), file=self._stream, flush=True)

    def __enter__(self) -> AlertConsole:
        threading.Thread(target=self._server.serve_forever, name="gradmon-alerts", daemon=True).start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def describe_alert(alert: dict[str, Any]) -> str:
    """An alert for a terminal: state, severity, name, where; and what to know of it while it fires."""
    labels = alert["labels"]
    where = ", ".join(f"{name} {labels[name]}" for name in _SHOWN if labels.get(name))
    head = f"{time.strftime('%H:%M:%S')} {alert['status'].upper():<8} {labels.get('severity', ''):<6}"
    line = f"{head} {labels['alertname']}" + (f" ({where})" if where else "")
    summary = alert.get("annotations", {}).get("summary", "")
    return f"{line}\n         {summary}" if alert["status"] == "firing" and summary else line
