"""Who this process is: run, instance, attempt, rank; and where its journal goes.

A run's *name* is what people say ("llama-7b"); its *instance* is one start of it, which survives restarts of its
workers; an *attempt* is one set of workers within an instance.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import pwd
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from gradmon.locks import is_held

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
#: File systems on which SQLite's write-ahead log and flock do not work between hosts.
_NETWORK_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "panfs", "afs", "pvfs2")
    + ("orangefs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs")
)


#: How long a claim stands without a rank having taken its lock.
_CLAIM_SECONDS = 120.0


#: Held by the agent of a directory.
AGENT_LOCK = "agent.lock"


class EnvironmentVariableError(ValueError):
    """The launcher's environment is incomplete or makes no sense."""


class DirectoryError(ValueError):
    """The journal's directory can't be used."""


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """What torchrun tells a worker."""

    rank: int
    local_rank: int
    world_size: int
    attempt: int


def rank_environment(environ: Mapping[str, str]) -> RankEnvironment:
    """Read torchrun's variables; none of them at all means rank 0 of 1.

    Raises:
        EnvironmentVariableError: some are set and some are not, or a value is no number in range.
    """
    present = [name for name in _RANK_VARIABLES if environ.get(name)]
    if not present:
        return RankEnvironment(0, 0, 1, 0)
    missing = [name for name in _RANK_VARIABLES if name not in present]
    if missing:
        raise EnvironmentVariableError(
            f"{' and '.join(missing)} not set although {' and '.join(present)} is: start the script with torchrun, "
            f"or unset {' and '.join(present)} to train in one process"
        )
    values = {}
    for name in (*_RANK_VARIABLES, "TORCHELASTIC_RESTART_COUNT"):
        text = environ.get(name, "0")
        if not text.isdecimal():
            raise EnvironmentVariableError(f"{name} must be a number from 0 up (got {text!r})")
        values[name] = int(text)
    rank, local_rank, world_size, attempt = values.values()
    if rank >= world_size:
        raise EnvironmentVariableError(f"RANK must be below WORLD_SIZE (got RANK={rank}, WORLD_SIZE={world_size})")
    return RankEnvironment(rank, local_rank, world_size, attempt)


def run_name(configured: str | None, environ: Mapping[str, str], script: str) -> str:
    """The run's name: config (GRADMON_RUN is part of it), else SLURM_JOB_NAME, else the script's stem; cleaned."""
    name = configured or environ.get("SLURM_JOB_NAME") or Path(script).stem
    return _clean(name) or "run"


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:64]


def instance_name(environ: Mapping[str, str]) -> str:
    """One start of a run. Asked on rank 0 only, and broadcast.

    torchrun's own id is "none" unless somebody set it. Its agent process, the parent of the workers, outlives their
    restarts, so its start time tells one torchrun from the next; without torchrun this process stands for itself.
    """
    if environ.get("SLURM_JOB_ID"):
        return f"slurm-{_clean(environ['SLURM_JOB_ID'])}"
    elastic = _clean(environ.get("TORCHELASTIC_RUN_ID", ""))
    if elastic and elastic != "none":
        return elastic
    process = psutil.Process(os.getppid() if "TORCHELASTIC_RUN_ID" in environ else os.getpid())
    started = datetime.datetime.fromtimestamp(process.create_time(), datetime.timezone.utc)
    return f"{_clean(socket.gethostname())}-{started:%Y%m%dT%H%M%S}-{process.pid}"


def script_name() -> str:
    """What the user started: the script's path, or the module after `python -m`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return str(spec.name).removesuffix(".__main__")
    return str(getattr(main, "__file__", None) or sys.argv[0] or "python")


def claim_run(directory: Path, name: str, instance: str) -> str:
    """The name under which `instance` may write: `name`, or `name~2` and so on while other instances live under it.

    Rank 0 asks, and broadcasts the answer, so that journal, page and metrics of all nodes agree. A restart of the
    same instance gets the name it had. Where several users share a directory, their runs count too.
    """
    root = shared_root(directory)
    users = [directory] if root is None else [root, *_folders(root)]
    with _exclusive(directory if root is None else root):
        for run in (directory / name, *sorted(directory.glob(f"{name}~*"))):
            if (run / instance).is_dir():
                return run.name
        number = 1
        while any(_lives(i) for user in users for i in _folders(user / _numbered(name, number))):
            number += 1
        # The folder itself is the claim: whoever asks next finds it, before any rank has its lock.
        (directory / _numbered(name, number) / instance).mkdir(parents=True)
        return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}~{number}"


def next_attempt(instance: Path, restart_count: int) -> int:
    """Number of the attempt that starts now: torchrun's restart count, or one more than the last that lies there.

    torchrun does not count a restart for a changed membership, and a process may attach twice; neither may replace a
    journal that is there.
    """
    numbers = [int(p.name) for p in instance.iterdir() if p.name.isdecimal()] if instance.is_dir() else []
    return max([restart_count, *(number + 1 for number in numbers)])


def _folders(directory: Path) -> list[Path]:
    """Folders in a directory; none if it is not there, or another user's that we may not read."""
    try:
        with os.scandir(directory) as entries:
            return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _lives(instance: Path) -> bool:
    locks = [lock for attempt in _folders(instance) for lock in attempt.glob("rank-*.lock")]
    if locks:
        return any(map(is_held, locks))
    with suppress(OSError):  # claimed, and its ranks are still on their way; or they never came
        return time.time() - instance.stat().st_mtime < _CLAIM_SECONDS
    return False


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One claim at a time, among all who use the directory."""
    path = directory / ".claims.lock"
    descriptor = -1
    while descriptor < 0:
        # Never O_CREAT alone: in a sticky directory the kernel refuses that on another user's file.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            break
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.fchmod(descriptor, 0o644)  # all must be able to open it, whatever our umask
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


#: Where a site's own agent looks, which runs under a user of its own (system mode).
SYSTEM_DIRECTORY = Path("/var/lib/gradmon")


def choose_directory(configured: str | None, environ: Mapping[str, str]) -> Path:
    """The directory of this user's journals on this node, made if need be: where a rank writes.

    A configured one (GRADMON_DIR is part of it) must work. Else the first that fits: /var/lib/gradmon if it can be
    written, SLURM_TMPDIR, the XDG state home if it is on a local disk, /tmp/gradmon-UID. In a directory of another
    user (a site's agent, a container's) it is a folder of our own in it, so that users do not meet.

    Raises:
        DirectoryError: names the directory and the cure.
    """
    directory = agent_directory(configured, environ)
    return directory if directory.stat().st_uid == os.getuid() else _own_part(directory)


def agent_directory(configured: str | None, environ: Mapping[str, str]) -> Path:
    """The directory an agent serves: the same, with the folders of all users in it.

    Raises:
        DirectoryError: names the directory and the cure.
    """
    if configured:
        return _prepare(Path(configured).expanduser().absolute())
    if os.access(SYSTEM_DIRECTORY, os.W_OK):
        return _prepare(SYSTEM_DIRECTORY)
    candidates = []
    if environ.get("SLURM_TMPDIR"):
        candidates.append(Path(environ["SLURM_TMPDIR"]) / "gradmon")
    home = Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or "/nonexistent") / ".local" / "state")
    if home.is_absolute():
        candidates.append(home / "gradmon")
    for candidate in candidates:
        try:
            return _prepare(candidate)
        except DirectoryError:
            continue
    return _prepare_shared(Path(f"/tmp/gradmon-{os.getuid()}"))  # noqa: S108  checked to be ours and private


def shared_root(directory: Path) -> Path | None:
    """The directory of several users in which `directory` is this user's own folder; None if it is no such folder.

    It is one only if an agent of its owner has served it: /scratch/alice is alice's own, whoever owns /scratch.
    """
    parent = directory.parent
    try:
        owner = parent.stat().st_uid
        served = (parent / AGENT_LOCK).lstat().st_uid in (0, owner)
    except OSError:
        return None
    return parent if served and owner != os.getuid() and directory.name == _user_name() else None


def _user_name() -> str:
    try:
        return _clean(pwd.getpwuid(os.getuid()).pw_name) or f"uid-{os.getuid()}"
    except KeyError:  # a container may run under a number that nobody has named
        return f"uid-{os.getuid()}"


def _own_part(shared: Path) -> Path:
    """Our folder in another user's directory. Who may read it is who may read that one: a site's group, mostly."""
    part = shared / _user_name()
    try:
        part.mkdir(exist_ok=True)
        status = part.lstat()
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            raise DirectoryError(f"dir {part} belongs to another user (uid {status.st_uid}); remove it, or {_CURE}")
        part.chmod(shared.stat().st_mode & 0o2755)  # as the umask would not have it
    except OSError as error:
        raise DirectoryError(f"dir {part} can't be made ({error.strerror}); {_CURE}") from None
    return part


def _prepare(path: Path) -> Path:
    kind = file_system(path)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise DirectoryError(
            f"dir {path} is on a network file system ({kind}), where SQLite's locks do not hold; "
            f"set GRADMON_DIR or `dir:` to a directory on this node's own disk, such as /tmp/gradmon"
        )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DirectoryError(f"dir {path} can't be made ({error.strerror}); {_CURE}") from None
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise DirectoryError(f"dir {path} can't be written by user {os.getuid()}; {_CURE}")
    return path


_CURE = "set GRADMON_DIR or `dir:` to a directory that can be written"


def _prepare_shared(path: Path) -> Path:
    """In a directory that everybody can write, a folder is only good if nobody else can have made it."""
    _prepare(path)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or path.is_symlink():
        raise DirectoryError(f"dir {path} is not private to user {os.getuid()}; remove it, or {_CURE}")
    return path


def file_system(path: Path) -> str:
    """Type of the file system that holds `path` (or will, once it is made), as /proc/mounts names it."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    target = str(existing.resolve())
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def linger_seconds(configured: float | None, environ: Mapping[str, str]) -> float:
    """How long an agent started by a job serves on after its last rank; Slurm and containers end it with the job."""
    if configured is not None:
        return configured
    contained = "SLURM_JOB_ID" in environ or "KUBERNETES_SERVICE_HOST" in environ or Path("/.dockerenv").exists()
    return 0.0 if contained else 600.0


def page_hint(address: str, environ: Mapping[str, str]) -> str:
    """The page's address as a person can use it from where they sit."""
    scheme, port = address.partition(":")[0], address.rstrip("/").rpartition(":")[2]
    host = socket.gethostname()
    if "KUBERNETES_SERVICE_HOST" in environ:
        return f"{address} (kubectl port-forward pod/{host} {port}, then open {scheme}://127.0.0.1:{port})"
    if "SSH_CONNECTION" in environ and "127.0.0.1" in address:
        return f"{address} (from your machine: ssh -L {port}:127.0.0.1:{port} {host}, then open it)"
    return address
