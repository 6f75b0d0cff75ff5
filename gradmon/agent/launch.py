"""Find the agent of a directory, or start one; and the options an agent has. Used inside the training process, so it
imports no server.

*Running* means that a living process holds the flock on `DIR/agent.lock`; the file then says where it listens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradmon
from gradmon.identity import AGENT_LOCK
from gradmon.locks import is_held

LOCK_NAME = AGENT_LOCK
LOG_NAME = "agent.log"
#: An agent's log beyond this is begun anew when the next agent starts.
LOG_BYTES = 1 << 20

#: What torchrun tells its workers, and what concerns the job; the agent is told what it needs on its command line.
_WORKER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WORKER_PREFIXES = ("GRADMON_", "TORCHELASTIC_", "GROUP_", "ROLE_", "TORCH_NCCL_", "NCCL_", "OMP_")


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How an agent serves. Paths are as the user wrote them."""

    listen: str = "127.0.0.1"
    """Address to bind."""
    port: int = 10855
    """Port wanted; where it is taken the next free one, up to 100 further. 0: any."""
    linger_seconds: float | None = None
    """How long it serves on after the last rank it saw has gone, and after SIGTERM; None serves until a signal."""
    token_file: str | None = None
    """File with the bearer tokens that may read, one per line; None asks for none."""
    basic_auth_file: str | None = None
    """File with a user:password per line that may read."""
    tls_cert: str | None = None
    """PEM file with the certificate and its chain; None serves plain HTTP."""
    tls_key: str | None = None
    """PEM file with its key; None where the certificate's file holds it."""
    sd_dir: str | None = None
    """Directory of file_sd files for Prometheus, to which this agent adds its own."""
    archive: str | None = None
    """Directory to which journals are copied on an incident and at their end."""
    spawned: bool = False
    """Started by `ensure_agent`: another agent in its place is what was wanted, it waits for no rank to come, and a
    signal ends it at once."""

    def arguments(self) -> Iterator[str]:
        """The command line that gives these options again from any working directory."""
        yield from ("--listen", self.listen, "--port", str(self.port))
        if self.linger_seconds is not None:
            yield from ("--linger", str(self.linger_seconds))
        for name in ("token_file", "basic_auth_file", "tls_cert", "tls_key", "sd_dir", "archive"):
            path = getattr(self, name)
            if path is not None:
                yield from (f"--{name.replace('_', '-')}", str(Path(path).expanduser().absolute()))
        if self.spawned:
            yield "--spawned"


class AgentLock:
    """The right to be the agent of a directory: at most one living process has it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_NAME
        self._descriptor = -1

    def take(self) -> bool:
        """Try for half a second, because whoever looks whether it is held holds it for a moment."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for _ in range(10):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                os.ftruncate(descriptor, 0)  # a killed agent's address must not be taken for ours
                self._descriptor = descriptor
                return True
        os.close(descriptor)
        return False

    def write(self, facts: dict[str, Any]) -> None:
        """Say in the file who holds it, in place: the lock belongs to this very file."""
        text = json.dumps(facts).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def release(self) -> None:
        """Give it back. A second call does nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1


def agent_address(directory: Path) -> str | None:
    """The URL of the agent of `directory`, None if none is running or it has not said where yet."""
    path = directory / LOCK_NAME
    if not is_held(path):
        return None
    try:
        return str(json.loads(path.read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def wait_for_agent(directory: Path, timeout: float) -> str | None:
    """The URL of the agent of `directory`, waiting up to `timeout` seconds for one that is starting."""
    deadline = time.monotonic() + timeout
    while True:
        address = agent_address(directory)
        if address is not None or time.monotonic() >= deadline:
            return address
        time.sleep(0.05)


def ensure_agent(directory: Path, options: AgentOptions) -> None:
    """Start an agent for `directory` unless one is running; does not wait for it.

    Call it while this rank holds its journal's lock, so that an agent about to end sees that somebody lives. Two
    callers at once start two, and the flock lets one of them live.

    Raises:
        OSError: the directory can't be written, or no process be started.
    """
    if is_held(directory / LOCK_NAME):
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gradmon", "agent", "--dir", str(directory.resolve())]
    command += dataclasses.replace(options, spawned=True).arguments()
    with _open_log(directory) as log:
        # The shell starts the agent and ends: the training process keeps no child that somebody would have to wait
        # for. A session of its own, because torchrun ends its workers by killpg; no inherited output, because
        # `torchrun ... | tee log` would wait for the agent; no inherited descriptors, because sockets of NCCL are.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "gradmon-agent", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment(),
            close_fds=True,
            start_new_session=True,
            check=True,
        )


def _open_log(directory: Path) -> Any:
    path = directory / LOG_NAME
    too_long = path.exists() and path.stat().st_size > LOG_BYTES
    return path.open("wb" if too_long else "ab")


def _environment() -> dict[str, str]:
    """This process's environment without what concerns a worker only, and with a way to this gradmon from `/`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _WORKER_VARIABLES and not name.startswith(_WORKER_PREFIXES)
    }
    paths = [str(Path(entry).resolve()) for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry]
    home = Path(gradmon.__file__).resolve().parent.parent
    if home.name not in ("site-packages", "dist-packages") and str(home) not in paths:
        paths.append(str(home))
    if paths:
        kept["PYTHONPATH"] = os.pathsep.join(paths)
    return kept
