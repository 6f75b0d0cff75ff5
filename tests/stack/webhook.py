"""A webhook that keeps what Alertmanager sends it, with the time of arrival."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    at: float
    """Unix time."""
    status: str
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def name(self) -> str:
        return self.labels["alertname"]


class Webhook:
    """Serves from `with` to its end."""

    def __init__(self) -> None:
        webhook = self
        self.received: list[Received] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["content-length"])))
                webhook.received += [_received(alert) for alert in message["alerts"]]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Webhook:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, name: str, status: str, timeout: float, **labels: str) -> Received:
        """The first message of that alert with these labels."""
        deadline = time.monotonic() + timeout
        while True:
            for one in list(self.received):
                if (one.name, one.status) == (name, status) and labels.items() <= one.labels.items():
                    return one
            assert time.monotonic() < deadline, f"no {status} {name} {labels} after {timeout:g} s: {self.summary()}"
            time.sleep(0.05)

    def summary(self) -> list[str]:
        return [f"{one.status} {one.name} {one.labels}" for one in self.received]


def _received(alert: dict[str, Any]) -> Received:
    return Received(time.time(), alert["status"], alert["labels"], alert["annotations"])
