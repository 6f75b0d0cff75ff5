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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
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
from gradmon.agent.archive import Archive
from gradmon.agent.auth import Certificate, Credentials, Guard, open_certificate
from gradmon.agent.discovery import DiscoveryFile
from gradmon.agent.exporter import Exporter
from gradmon.agent.gpus import GpuSampler
from gradmon.agent.launch import AgentLock, AgentOptions, wait_for_agent
from gradmon.agent.prune import living_ranks, prune
from gradmon.agent.store import Store

logger = logging.getLogger("gradmon.agent")

#: How often the journals are read and rendered: what a rank commits can be scraped that much later, and a little more.
POLL_SECONDS = 0.5
PRUNE_SECONDS = 3600.0
#: Ports tried after the one wanted.
PORTS = 100
#: What a browser may do with the page: load from this very agent, and nothing else.
CONTENT_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

_STATIC = Path(__file__).parent / "static"


def serve(directory: Path, options: AgentOptions) -> int:
    """See `gradmon.agent.run_agent`. Call it from the main thread: it answers SIGTERM and SIGINT."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    sys.setswitchinterval(0.001)  # a scrape must not wait long for the thread that reads
    store = Store(directory)
    parts = _Parts.of(store, options)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = AgentLock(directory)
        if not lock.take():
            return _other_agent(directory, options.spawned)
        sock = bind(options.listen, options.port)
    except OSError as error:
        logger.error("can't start: %s", error)
        return 1
    with contextlib.closing(sock):
        try:
            return _Agent(store, lock, sock, options, parts).run()
        finally:
            lock.release()


@dataclass(frozen=True)
class _Parts:
    """What the options ask for beyond serving. None: not asked for."""

    credentials: Credentials
    certificate: Certificate | None
    discovery: DiscoveryFile | None
    archive: Archive | None

    @classmethod
    def of(cls, store: Store, options: AgentOptions) -> _Parts:
        """Made before anything is served, so that a file that is no good is said at once; raises ValueError."""
        return cls(
            Credentials(options.token_file, options.basic_auth_file, store.errors),
            open_certificate(options, store.errors),
            None if options.sd_dir is None else DiscoveryFile(options.sd_dir, store.directory),
            None if options.archive is None else Archive(options.archive, store),
        )


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


class _Server(uvicorn.Server):
    """Asks before a signal ends it."""

    def __init__(self, config: uvicorn.Config, stays: Callable[[int], bool]) -> None:
        super().__init__(config)
        self._stays = stays

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, unless it is to serve on for a while."""
        if not self._stays(sig):
            super().handle_exit(sig, frame)


class _Agent:
    """A running agent: its reading thread and its web server."""

    def __init__(
        self, store: Store, lock: AgentLock, sock: socket.socket, options: AgentOptions, parts: _Parts
    ) -> None:
        self._store = store
        self._directory = store.directory
        self._lock = lock
        self._socket = sock
        self._options = options
        self._parts = parts
        self._gpus = GpuSampler(store.errors)
        self._ending = threading.Event()
        self._terminated = False
        self._leave_at: float | None = None
        self._facts = _facts(sock, options)
        loopback = ipaddress.ip_address(sock.getsockname()[0]).is_loopback
        if not loopback and not parts.credentials:
            logger.warning("everybody who reaches %s can read it; cure: --token-file FILE", self._facts["url"])
        self._exporter = Exporter(store, self._gpus.newest)
        app = make_app(store, self._exporter, loopback=loopback, credentials=parts.credentials)
        self._server = _Server(_configuration(app, parts.certificate), self._serves_on)

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn takes these over while it serves, and raises them again at its end: that must not kill us.
            signal.signal(number, self._on_signal)
        self._lock.write(self._facts)
        logger.info("serving %s at %s", self._directory, self._facts["url"])
        reader = threading.Thread(target=self._read, name="gradmon-reader", daemon=True)
        reader.start()
        self._gpus.start()
        if self._parts.archive is not None:
            self._parts.archive.start()
        with self._guard("sd"):
            self._announce()
        self._server.run(sockets=[self._socket])
        self._ending.set()
        if self._parts.discovery is not None:
            with self._guard("sd"):
                self._parts.discovery.remove()
        self._gpus.stop()
        reader.join(1.0)
        if self._parts.archive is not None:
            self._parts.archive.finish()
        logger.info("ended")
        return 0

    def _announce(self) -> None:
        if self._parts.discovery is not None:
            target = str(self._facts["url"]).partition("://")[2]
            self._parts.discovery.write(target, tls=self._parts.certificate is not None)
            logger.info("told Prometheus of %s in %s", target, self._parts.discovery.path)
            if ipaddress.ip_address(self._facts["host"]).is_loopback:
                logger.warning("a Prometheus on another host can't reach %s; cure: --listen 0.0.0.0", target)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._serves_on(number):
            self._server.should_exit = True

    def _serves_on(self, number: int) -> bool:
        """Whether this signal is answered by serving on for the linger time, so that the last values are scraped.

        A sidecar is sent SIGTERM when the trainer has ended. A second signal is meant, and so is Ctrl-C.
        """
        if number != signal.SIGTERM or self._options.spawned or not self._options.linger_seconds or self._terminated:
            return False
        self._terminated = True
        return True

    def _read(self) -> None:
        """Read the journals over and over, prune now and then, and end the agent when nobody needs it any more."""
        next_prune = 0.0
        # By hand it may be started long before the first rank; a spawned one was started by a rank.
        last_alive = time.monotonic() if self._options.spawned else None
        while not self._ending.is_set():
            began = time.monotonic()
            with self._guard("store"):
                self._store.refresh()
            with self._guard("exporter"):
                self._exporter.prepare()
            if began >= next_prune:
                next_prune = began + PRUNE_SECONDS
                with self._guard("prune"):
                    for instance in prune(self._directory):
                        logger.info("deleted %s, which was old", instance)
            if self._parts.certificate is not None:
                with self._guard("auth"):
                    self._parts.certificate.keep_fresh(self._server.config.ssl)
            if self._options.linger_seconds is not None and living_ranks(self._directory):
                last_alive = time.monotonic()
            if self._due_to_end(last_alive):
                return
            # Many journals take longer to read; then rest longer too, to stay below a fifth of a core.
            self._ending.wait(max(POLL_SECONDS, 4 * (time.monotonic() - began)))

    def _due_to_end(self, last_alive: float | None) -> bool:
        """End if it is time to; True if so."""
        now, linger = time.monotonic(), self._options.linger_seconds
        if linger is None:
            return False
        if self._terminated and self._leave_at is None:
            self._leave_at = now + linger
            logger.info("told to end: serving on for %g s; a second signal ends it now", linger)
            if self._parts.archive is not None:
                self._parts.archive.urge()
        if self._leave_at is not None and now >= self._leave_at:
            self._server.should_exit = True
            return True
        return last_alive is not None and now - last_alive >= linger and self._leave()

    def _leave(self) -> bool:
        """Give the lock back and end, unless a rank attached just now: it saw the lock held and starts no agent."""
        self._lock.release()
        if living_ranks(self._directory) and self._lock.take():
            self._lock.write(self._facts)
            return False
        logger.info("no rank has lived for %g s", self._options.linger_seconds)
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


def _configuration(app: Starlette, certificate: Certificate | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=None if certificate is None else certificate.cert,
        ssl_keyfile=None if certificate is None else certificate.key,
    )
    config.load()  # now: the thread that reads looks after its certificate
    return config


def _facts(sock: socket.socket, options: AgentOptions) -> dict[str, Any]:
    host, port = sock.getsockname()[:2]
    # Bound to every address: the host's name is one that others can use too.
    name = socket.gethostname() if host in ("0.0.0.0", "::") else options.listen  # noqa: S104
    place = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    return {
        "url": f"{'http' if options.tls_cert is None else 'https'}://{place}",
        "host": host,
        "port": port,
        "pid": os.getpid(),
        "version": __version__,
        "started_seconds": time.time(),
    }


def make_app(store: Store, exporter: Exporter, *, loopback: bool, credentials: Credentials | None = None) -> Starlette:
    """The web application over a store that somebody else refreshes, and over what its exporter renders."""

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        answer = exporter.ready(accept)  # almost always there; a thread for it would cost more than the answer
        if answer is None:
            answer = await run_in_threadpool(exporter.render, accept)
        body, content_type = answer
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
    if credentials:
        middleware.append(Middleware(Guard, credentials=credentials))
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
