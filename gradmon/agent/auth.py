"""Who may read: bearer tokens and passwords from files, and the certificate. Files are read again when they change.

Secrets are never logged, never in a URL, and compared in constant time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import logging
import ssl
import stat
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gradmon.agent.launch import AgentOptions

logger = logging.getLogger("gradmon.agent")

#: For probes, which bring no credentials; it tells nothing of a run.
OPEN_PATHS = frozenset({"/healthz"})

_Signature = tuple[int, int, int, int]


class _Watched:
    """A file whose content may be replaced while we run, as secrets are rotated.

    Args:
        field: the setting that names the file.
        path: the file.
        parse: makes of it what is needed, or raises ValueError with a reason and a cure.
        errors: counters of the agent's failing parts; a replaced file that is no good counts as `auth`.

    Raises:
        ValueError: names the field, the file, and the cure.
    """

    def __init__(self, field: str, path: Path, parse: Callable[[Path], None], errors: Counter[str]) -> None:
        self._field = field
        self._path = path
        self._parse = parse
        self._errors = errors
        self._lock = threading.Lock()
        self._signature: _Signature | None = None
        self._complaint = ""
        self._read()

    def refresh(self) -> None:
        """Read it again if it changed. What is no good leaves what was read before in force."""
        with self._lock:
            try:
                if _signature(self._path) != self._signature:
                    self._read()
                self._complaint = ""
            except FileNotFoundError:
                pass  # for a moment, while somebody puts a new one there
            except (ValueError, OSError) as error:
                if str(error) != self._complaint:  # once, not with every request
                    self._complaint = str(error)
                    self._errors["auth"] += 1
                    logger.warning("%s; what was read before stays in force", error)

    def _read(self) -> None:
        # Before reading: what is written meanwhile is then read next time. A bad file is complained about once.
        with contextlib.suppress(OSError):
            self._signature = _signature(self._path)
        try:
            self._parse(self._path)
        except OSError as error:
            reason = error.strerror or str(error)
            cure = "name a file that this user may read"
            raise ValueError(f"{self._field} {self._path} can't be read ({reason}); {cure}") from None
        except ValueError as error:
            raise ValueError(f"{self._field} {self._path} {error}") from None


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size  # ctime: also when modes change


class Credentials:
    """The tokens and passwords that open this agent; none of either kind: everybody may read.

    Raises:
        ValueError: a file is empty, unreadable or malformed; names it and the cure.
    """

    def __init__(self, token_file: str | None, basic_auth_file: str | None, errors: Counter[str]) -> None:
        self._tokens: list[bytes] = []
        self._logins: list[bytes] = []
        self._files: list[_Watched] = []
        if token_file is not None:
            self._files.append(_Watched("token_file", _path(token_file), self._read_tokens, errors))
        if basic_auth_file is not None:
            self._files.append(_Watched("basic_auth_file", _path(basic_auth_file), self._read_logins, errors))
        # A browser asks its user for a password only where Basic is among the schemes.
        self.challenges = [b'Basic realm="gradmon", charset="UTF-8"'] if self._logins else []
        self.challenges += [b'Bearer realm="gradmon"'] if self._tokens else []

    def __bool__(self) -> bool:
        """True if anything is asked for."""
        return bool(self._files)

    def allow(self, authorization: str) -> bool:
        """Whether an Authorization header opens this agent."""
        for file in self._files:
            file.refresh()
        scheme, _, given = authorization.strip().partition(" ")
        if scheme.lower() == "bearer":
            return _among(given.strip().encode("latin-1"), self._tokens)
        if scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                return _among(base64.b64decode(given.strip(), validate=True), self._logins)
        return False

    def _read_tokens(self, path: Path) -> None:
        tokens = _lines(path)
        if not tokens:
            raise ValueError("is empty; put a token into it, such as `openssl rand -hex 32` makes")
        for number, token in tokens.items():
            if any(byte <= 32 or byte >= 127 for byte in token):  # it could not be sent in a header
                raise ValueError(
                    f"has spaces or other than ASCII characters in line {number}; write one token per line"
                )
        self._tokens = list(tokens.values())

    def _read_logins(self, path: Path) -> None:
        logins = _lines(path)
        if not logins:
            raise ValueError("is empty; put a line user:password into it")
        for number, login in logins.items():
            user, colon, password = login.partition(b":")
            if not (user and colon and password):
                raise ValueError(f"has no user:password in line {number}; write one of them per line, not a hash")
        self._logins = list(logins.values())


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _lines(path: Path) -> dict[int, bytes]:
    """Number -> line, of those that are not blank. Warns of a file that everybody on the host may read."""
    content = path.read_bytes()
    if path.stat().st_mode & stat.S_IROTH:
        logger.warning("%s can be read by every user of this host; cure: chmod o-r %s", path, path)
    lines = {number: line.strip() for number, line in enumerate(content.splitlines(), 1)}
    return {number: line for number, line in lines.items() if line}


def _among(given: bytes, known: list[bytes]) -> bool:
    """All are compared, so that the time it takes tells nothing."""
    return sum(hmac.compare_digest(given, one) for one in known) > 0


class Guard:
    """Answers 401 to a request whose credentials do not fit; what lies behind it is not reached."""

    def __init__(self, app: ASGIApp, credentials: Credentials) -> None:
        self._app = app
        self._credentials = credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        authorization = Headers(scope=scope).get("authorization", "")
        if scope["path"] in OPEN_PATHS or self._credentials.allow(authorization):
            await self._app(scope, receive, send)
            return
        refusal = PlainTextResponse("credentials, please: see the agent's token_file or basic_auth_file\n", 401)
        refusal.raw_headers.extend((b"www-authenticate", challenge) for challenge in self._credentials.challenges)
        await refusal(scope, receive, send)


class Certificate:
    """The certificate the agent serves HTTPS with.

    Raises:
        ValueError: the files do not fit together or can't be read; names them and the cure.
    """

    def __init__(self, cert: str, key: str | None, errors: Counter[str]) -> None:
        self.cert = _path(cert)
        self.key = None if key is None else _path(key)
        self._context: ssl.SSLContext | None = None
        self._files = [_Watched("tls_cert", self.cert, self._load, errors)]
        if self.key is not None:
            self._files.append(_Watched("tls_key", self.key, self._load, errors))

    def keep_fresh(self, context: ssl.SSLContext | None) -> None:
        """Have new connections of a serving context use what lies in the files now."""
        self._context = context
        for file in self._files:
            file.refresh()

    def _load(self, path: Path) -> None:
        path.read_bytes()  # the context's own error does not say which of the two can't be read
        contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), *([] if self._context is None else [self._context])]
        for context in contexts:  # first one that nobody uses: it finds out whether the files are any good
            try:
                # An empty password: a key that needs one is an error, not a question on a terminal.
                context.load_cert_chain(self.cert, self.key, password="")
            except (ssl.SSLError, OSError) as error:
                key = self.key or self.cert
                raise ValueError(
                    f"is no certificate that fits the key in {key} ({error.strerror or error}); "
                    "give PEM files of one pair, the key without a password"
                ) from None


def open_certificate(options: AgentOptions, errors: Counter[str]) -> Certificate | None:
    """The certificate of these options, None for plain HTTP.

    Raises:
        ValueError: as `Certificate`; or there is a key without a certificate.
    """
    if options.tls_cert is not None:
        return Certificate(options.tls_cert, options.tls_key, errors)
    if options.tls_key is not None:
        raise ValueError(f"tls_key {options.tls_key} has no effect without tls_cert; give both, or neither")
    return None
