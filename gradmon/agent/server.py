"""The agent's process: one lock, one socket, one thread that reads the journals, and uvicorn serving what it read.

Read-only towards everything but its own lock and what pruning deletes: only GET and HEAD are answered.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradmon import __version__
from gradmon.agent.api import list_runs, run_since
from gradmon.agent.exporter import Exporter, Readings
from gradmon.agent.gpus import GpuSampler
from gradmon.agent.launch import AgentLock, wait_for_agent
from gradmon.agent.prune import living_ranks, prune
from gradmon.agent.store import Store

logger = logging.getLogger("gradmon.agent")

#: How often the journals are read. With the exposition's cache, what a rank commits is scraped at most 1.5 s later.
POLL_SECONDS = 0.5
PRUNE_SECONDS = 3600.0
#: Ports tried after the one wanted.
PORTS = 100
#: What a browser may do with the page: load from this very agent, and nothing else.
CONTENT_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

_STATIC = Path(__file__).parent / "static"


def serve(directory: Path, *, listen: str, port: int, linger_seconds: float | None, spawned: bool) -> int:
    """See `gradmon.agent.run_agent`. Call it from the main thread: it answers SIGTERM and SIGINT."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = AgentLock(directory)
        if not lock.take():
            return _other_agent(directory, spawned)
        sock = bind(listen, port)
    except OSError as error:
        logger.error("can't start: %s", error)
        return 1
    with contextlib.closing(sock):
        try:
            return _Agent(directory, lock, sock, listen, linger_seconds).run()
        finally:
            lock.release()


def _other_agent(directory: Path, spawned: bool) -> int:
    address = wait_for_agent(directory, 2.0) or "an address it has not said yet"
    if spawned:
        logger.info("not needed: another agent serves %s at %s", directory, address)
        return 0
    logger.error(
        "another agent serves %s already, at %s; use that one, end it, or give another --dir", directory, address
    )
    return 1


def bind(listen: str, port: int) -> socket.socket:
    """A listening socket on `port`, or on the next free port where it is taken.

    Raises:
        OSError: the address is not ours, or no port is free.
    """
    family, _, _, _, address = socket.getaddrinfo(listen, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    last = port if port == 0 else min(port + PORTS, 65535)
    for candidate in range(port, last + 1):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address[0], candidate, *address[2:]))
            sock.listen(128)  # now, not later: only then is the port ours
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, f"can't listen on {listen}:{candidate}: {error.strerror}") from None
        else:
            return sock
    raise OSError(errno.EADDRINUSE, f"ports {port} to {last} on {listen} are all taken")


class _Agent:
    """A running agent: its reading thread and its web server."""

    def __init__(
        self, directory: Path, lock: AgentLock, sock: socket.socket, listen: str, linger_seconds: float | None
    ) -> None:
        self._directory = directory
        self._lock = lock
        self._socket = sock
        self._linger_seconds = linger_seconds
        self._store = Store(directory)
        self._gpus = GpuSampler(self._store.errors)
        self._ending = threading.Event()
        self._facts = _facts(sock, listen)
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(
                    self._store,
                    loopback=ipaddress.ip_address(sock.getsockname()[0]).is_loopback,
                    gpus=self._gpus.newest,
                ),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn takes these over while it serves, and raises them again at its end: that must not kill us.
            signal.signal(number, self._on_signal)
        self._lock.write(self._facts)
        logger.info("serving %s at %s", self._directory, self._facts["url"])
        reader = threading.Thread(target=self._read, name="gradmon-reader", daemon=True)
        reader.start()
        self._gpus.start()
        self._server.run(sockets=[self._socket])
        self._ending.set()
        self._gpus.stop()
        reader.join(1.0)
        logger.info("ended")
        return 0

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._server.should_exit = True

    def _read(self) -> None:
        """Read the journals over and over, prune now and then, and end the agent when nobody needs it any more."""
        last_alive = time.monotonic()
        next_prune = 0.0
        while not self._ending.is_set():
            began = time.monotonic()
            with self._guard("store"):
                self._store.refresh()
            if began >= next_prune:
                next_prune = began + PRUNE_SECONDS
                with self._guard("prune"):
                    for instance in prune(self._directory):
                        logger.info("deleted %s, which was old", instance)
            if self._linger_seconds is not None:
                if living_ranks(self._directory):
                    last_alive = time.monotonic()
                elif time.monotonic() - last_alive >= self._linger_seconds and self._leave():
                    return
            # Many journals take longer to read; then rest longer too, to stay below a fifth of a core.
            self._ending.wait(max(POLL_SECONDS, 4 * (time.monotonic() - began)))

    def _leave(self) -> bool:
        """Give the lock back and end, unless a rank attached just now: it saw the lock held and starts no agent."""
        self._lock.release()
        if living_ranks(self._directory) and self._lock.take():
            self._lock.write(self._facts)
            return False
        logger.info("no rank has lived for %g s", self._linger_seconds)
        self._server.should_exit = True
        return True

    @contextlib.contextmanager
    def _guard(self, part: str) -> Iterator[None]:
        """A failure here is counted and logged, and the agent goes on."""
        try:
            yield
        except Exception:
            self._store.errors[part] += 1
            if self._store.errors[part] <= 3:
                logger.exception("failed: %s", part)


def _facts(sock: socket.socket, listen: str) -> dict[str, Any]:
    host, port = sock.getsockname()[:2]
    # Bound to every address: the host's name is one that others can use too.
    name = socket.gethostname() if host in ("0.0.0.0", "::") else listen  # noqa: S104
    return {
        "url": f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}",
        "host": host,
        "port": port,
        "pid": os.getpid(),
        "version": __version__,
        "started_seconds": time.time(),
    }


def make_app(store: Store, *, loopback: bool, gpus: Callable[[], Readings] = dict) -> Starlette:
    """The web application over a store that somebody else refreshes; `gpus` says what the node's GPUs do now."""
    exporter = Exporter(store, gpus)

    def metrics(request: Request) -> Response:
        body, content_type = exporter.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    def healthz(_: Request) -> Response:
        return JSONResponse(
            {"status": "ok", "version": __version__, "journals": store.journals, "pid": os.getpid()},
        )

    def runs(_: Request) -> Response:
        agent = {"version": __version__, "host": socket.gethostname(), "directory": str(store.directory)}
        return JSONResponse({"agent": agent, "runs": list_runs(store)})

    def run(request: Request) -> Response:
        name = request.path_params["run"]
        answer = run_since(store, name, request.query_params.get("since", ""))
        if answer is None:
            return PlainTextResponse(f"no run {name!r} here\n", status_code=404)
        return JSONResponse(answer)

    def page(_: Request) -> Response:
        return FileResponse(_STATIC / "index.html")

    routes: Sequence[Route | Mount] = (
        Route("/", page, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/healthz", healthz, methods=["GET"]),
        Route("/api/runs", runs, methods=["GET"]),
        Route("/api/runs/{run}", run, methods=["GET"]),
        Mount("/static", StaticFiles(directory=_STATIC)),
    )
    middleware = [Middleware(_Headers)]
    if loopback:
        # A page on another site may point a name of its own at 127.0.0.1 and read us through the visitor's browser.
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]))
    return Starlette(routes=routes, middleware=middleware)


class _Headers:
    """Adds what keeps a browser from doing more than showing the page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = CONTENT_POLICY
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
                headers["cache-control"] = "no-cache"
            await send(message)

        await self._app(scope, receive, send_with_headers)
