"""One file_sd file per agent in a directory that Prometheus watches: where to scrape this node.

It is removed on a clean exit only. After a crash or a kill it stays, and Prometheus says `up == 0`: that somebody
must see. The next agent of the same directory on this host replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path


class DiscoveryFile:
    """The file of one agent.

    Args:
        sd_dir: directory with everybody's files; made if it is not there. It may be on a shared file system.
        directory: the agent's own directory, by which its file is told from those of other agents of this host.

    Raises:
        ValueError: the directory can't be written; names the cure.
    """

    def __init__(self, sd_dir: str, directory: Path) -> None:
        folder = Path(sd_dir).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"sd_dir {folder} can't be made ({error.strerror}); {_CURE}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"sd_dir {folder} can't be written by user {os.getuid()}; {_CURE}")
        digest = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:8]
        self.path = folder / f"gradmon-{socket.gethostname()}-{digest}.json"

    def write(self, target: str, *, tls: bool) -> None:
        """Tell of this agent, whole or not at all.

        Args:
            target: `host:port`.
            tls: it serves HTTPS only.

        Raises:
            OSError: the file can't be written.
        """
        labels = {"__scheme__": "https"} if tls else {}
        write_whole(self.path, json.dumps([{"targets": [target], "labels": labels}], indent=1).encode() + b"\n")

    def remove(self) -> None:
        """On a clean exit. No error if it is gone already.

        Raises:
            OSError: it can't be removed.
        """
        self.path.unlink(missing_ok=True)


_CURE = "make a directory that this user may write, or leave sd_dir out"


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place at once: a reader sees the old one or the new one. Everybody may read it.

    Raises:
        OSError: it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            os.fchmod(file.fileno(), 0o644)  # Prometheus is another user, and our umask may be strict
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
