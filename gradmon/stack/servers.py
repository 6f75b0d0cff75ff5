"""Server programs that are installed here, run on loopback in a directory of their own and ended with us."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

#: Names under which distributions install each program.
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "prometheus": ("prometheus",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "grafana": ("grafana-server", "grafana"),
}
STOP_SECONDS = 10.0


class ServerError(Exception):
    """A program is missing, or ended instead of serving; says where its log is."""


def find_program(name: str) -> str | None:
    """Path of an installed program of PROGRAMS, None if it is not installed."""
    return next((path for candidate in PROGRAMS[name] if (path := shutil.which(candidate))), None)


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else a free one on loopback."""
    for port in (wanted, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return int(sock.getsockname()[1])
    raise ServerError("no free port on 127.0.0.1")


class Server:
    """A running program.

    Args:
        name: for messages.
        command: what to run; it must listen on `port` of 127.0.0.1.
        directory: its files; its output goes to `NAME.log` in it.
        port: where it will listen.
        ready: path that answers 200 once it serves.
        environment: its environment, ours if None.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        *,
        port: int,
        ready: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / f"{name}.log"
        self._ready = ready
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches us, and we end the servers in our order.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_ready(self, timeout: float = 60.0) -> Server:
        """Return once it serves.

        Raises:
            ServerError: it ended, or does not serve after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError), _open(self.url + self._ready, timeout=5) as answer:
                if answer.status == 200:
                    return self
            code = self.process.poll()
            if code is not None or time.monotonic() >= deadline:
                why = f"ended with code {code}" if code is not None else f"does not serve after {timeout:g} s"
                self.stop()
                raise ServerError(f"{self.name} {why}; its log is {self.log}")
            time.sleep(0.05)

    def get(self, path: str, **parameters: str) -> Any:
        """The JSON answer to a GET.

        Raises:
            ServerError: it says no.
        """
        url = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(parameters)}" if parameters else "")
        try:
            with _open(url, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.name}: {error.read().decode(errors='replace')}") from None

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Prometheus: the result of an instant query, [{"metric": {...}, "value": [time, "1"]}, ...]."""
        when = {} if at is None else {"time": f"{at:.3f}"}
        answer: list[dict[str, Any]] = self.get("/api/v1/query", query=expression, **when)["data"]["result"]
        return answer

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Prometheus: the result of a range query, [{"metric": {...}, "values": [[time, "1"], ...]}, ...]."""
        span = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:g}"}
        answer: list[dict[str, Any]] = self.get("/api/v1/query_range", query=expression, **span)["data"]["result"]
        return answer

    def stop(self) -> None:
        """End it; a second call does nothing."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()


def _open(url: str, timeout: float) -> Any:
    # No proxy of the environment's: it would look for 127.0.0.1 on its own machine.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout)


def start_prometheus(directory: Path, config: Mapping[str, Any], *, port: int = 0, flags: Sequence[str] = ()) -> Server:
    """Prometheus with this configuration; its data lies in `directory/prometheus`. Returns before it serves.

    Raises:
        ServerError: it is not installed.
    """
    port = free_port(port)
    file = write_yaml(directory / "prometheus.yml", config)
    command = [_program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={directory / 'prometheus'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", *flags]
    return Server("prometheus", command, directory, port=port, ready="/-/ready")


def start_alertmanager(directory: Path, config: Mapping[str, Any], *, port: int = 0) -> Server:
    """Alertmanager with this configuration, as a cluster of one. Returns before it serves.

    Raises:
        ServerError: it is not installed.
    """
    port = free_port(port)
    file = write_yaml(directory / "alertmanager.yml", config)
    command = [_program("alertmanager"), f"--config.file={file}", f"--storage.path={directory / 'alertmanager'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    return Server("alertmanager", command, directory, port=port, ready="/-/ready")


def _program(name: str) -> str:
    path = find_program(name)
    if path is None:
        raise ServerError(f"{name} is not installed; cure: sudo apt install {PROGRAMS[name][0]}")
    return path


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, width=120), encoding="utf-8")
    return path
