"""What this rank wants to attach, and what all ranks agree on: that they fit together, and the name of the run."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from gradmon import __version__, config, identity, kernels, stats
from gradmon.agent.start import start_agent
from gradmon.config import Config, Loaded
from gradmon.handshake import Agreement, AttachError, Hello, agree
from gradmon.health import HealthFile
from gradmon.importing import refuse_to_train
from gradmon.journal import JournalWriter, journal_path
from gradmon.log import Announcer
from gradmon.record import Event, RankIdentity, StepRecord
from gradmon.resources import Sampler
from gradmon.snapshot import Snapshots
from gradmon.topology import Topology, Watched, one_module, recognise, watch

#: Settings that may differ between ranks: they say where things lie on a node, not what is decided.
_PER_NODE = frozenset({"dir", "agent", "attach_timeout_seconds", "journal_mib", "preset", "health_file", "sinks"})
#: How often each process group was attached, so that ranks never read what they said at another time.
_attachments: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank wants to attach; made before it speaks to the others."""

    watched: Watched
    topology: Topology
    loaded: Loaded
    directory: Path
    ranks: identity.RankEnvironment

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self.loaded.config


def make_plan(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Iterable[Optimizer],
    given: Config | Mapping[str, Any] | Any,
) -> Plan:
    """Check everything that this rank can check alone; raises what `attach` says."""
    refuse_to_train()
    loaded = config.load(given)
    ranks = identity.rank_environment(os.environ)
    module = one_module(model)
    watched = watch(module, optimizer)
    if dist.is_available() and dist.is_initialized():
        local = ranks.local_rank if os.environ.get("LOCAL_RANK") else _local_rank(watched.device)
        ranks = identity.RankEnvironment(dist.get_rank(), local, dist.get_world_size(), ranks.attempt)
    directory = identity.choose_directory(loaded.config.dir, os.environ)
    return Plan(watched, recognise(module, watched, ranks.world_size), loaded, directory, ranks)


def _local_rank(device: torch.device) -> int:
    """Of a rank that torchrun has not started: as its launcher says, by its GPU, or as if all were on this host."""
    for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return device.index if device.index is not None and torch.cuda.device_count() > 1 else dist.get_rank()


def agree_on(plan: Plan | None, problem: Exception | None) -> Agreement:
    """Meet the other ranks. A rank with a problem comes too, so that nobody waits for it."""

    def decide() -> Mapping[str, Any]:
        if plan is None:
            return {}
        name = identity.run_name(plan.config.run, os.environ, identity.script_name())
        instance = identity.instance_name(os.environ)
        attempt = plan.ranks.attempt
        try:
            run = identity.claim_run(plan.directory, name, instance)
        except OSError:  # a full disk costs the journal, which says so itself, and never the training
            return {"run": name, "instance": instance, "attempt": attempt}
        if group is not None or plan.ranks.world_size == 1:  # else there is nobody to tell the others
            attempt = identity.next_attempt(plan.directory / run / instance, attempt)
        return {"run": run, "instance": instance, "attempt": attempt}

    group = plan.topology.group if plan is not None else _world()
    if group is None or dist.get_world_size(group) == 1:
        return Agreement(decide() if problem is None else {}, equal_arithmetic=True)
    _attachments[group.group_name] += 1
    hello = Hello(
        settings=_settings(plan.config) if plan is not None else {},
        model=_described(plan) if plan is not None else "",
        version=__version__,
        arithmetic=_arithmetic(plan.watched.device) if plan is not None else "",
        problem=None if problem is None else str(problem),
    )
    timeout = plan.config.attach_timeout_seconds if plan is not None else Config().attach_timeout_seconds
    try:
        return agree(hello, decide, group=group, number=_attachments[group.group_name], timeout=timeout)
    except AttachError:
        if problem is not None:
            raise problem from None  # this rank knows better than what it told the others
        raise


def _settings(settings: Config) -> dict[str, Any]:
    """Dotted name -> value of what must be equal on all ranks."""
    flat: dict[str, Any] = {}
    for name, value in settings.to_dict().items():
        if name not in _PER_NODE:
            flat.update(
                {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
            )
    return flat


def _described(plan: Plan) -> str:
    """What must be equal on all ranks. Where gradmon only watches, each rank may hold a part of its own."""
    return f"{plan.topology.kind} {plan.watched.digest()}" if plan.topology.acts else str(plan.topology)


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def identity_of(plan: Plan, agreement: Agreement) -> RankIdentity:
    """Who this rank is in the journal."""
    shared = agreement.shared
    if not shared:
        raise AttachError("rank 0 named no run")
    return RankIdentity(
        run=shared["run"],
        instance=shared["instance"],
        attempt=shared["attempt"],
        rank=plan.ranks.rank,
        local_rank=plan.ranks.local_rank,
        world_size=plan.ranks.world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=_device_name(plan.watched.device),
        mode=plan.config.mode,
        topology=str(plan.topology),
        script=identity.script_name(),
        version=__version__,
        started_seconds=time.time(),
        gpu_uuid=_gpu_uuid(plan.watched.device),
        gpu_pci_bus_id=_gpu_pci_bus_id(plan.watched.device),
    )


def _gpu_uuid(device: torch.device) -> str:
    """As NVML writes it, so that the agent finds the rank's GPU; empty where there is none, or torch does not tell."""
    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid is not None else ""


def _gpu_pci_bus_id(device: torch.device) -> str:
    """As NVML writes it; empty where there is no GPU, or torch (before 2.7) does not tell."""
    if device.type != "cuda":
        return ""
    known: Any = torch.cuda.get_device_properties(device)
    if not hasattr(known, "pci_bus_id"):
        return ""
    return f"{known.pci_domain_id:08X}:{known.pci_bus_id:02X}:{known.pci_device_id:02X}.0"


def _arithmetic(device: torch.device) -> str:
    """What the last digits of a norm depend on."""
    cpu = torch.backends.cpu.get_cpu_capability()
    kernel = "kernel" if kernels.available(device) else "foreach"
    return f"{_device_name(device)}, {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernel}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def health_path(plan: Plan, identity: RankIdentity) -> Path | None:
    """Where this rank writes the marker file; None if it is not the one of its node that does."""
    if identity.local_rank != 0:
        return None
    given = plan.config.health_file
    return journal_path(plan.directory, identity).with_name("health.json") if given is None else Path(given).absolute()


def open_journal(
    plan: Plan,
    identity: RankIdentity,
    failed: Callable[[str, Exception], None],
    say: Callable[[str], None],
    health: HealthFile,
    more: Sequence[Callable[[], dict[str, float]]],
    also: Callable[[StepRecord | Event], None],
) -> JournalWriter | None:
    """This rank's journal; None, and a word about it, if there can be none.

    What `more` give is sampled too; `also` is given each step and event.
    """
    resources = Sampler(plan.watched.device, failed)

    def sample() -> dict[str, float]:
        try:
            health.write()
        except OSError as error:
            failed("health_file", error)
        found = {**resources(), **health.sample()}
        for part in more:
            found |= part()
        return found

    try:
        return JournalWriter(
            journal_path(plan.directory, identity),
            identity,
            parameters=plan.watched.names,
            elements=[stats.elements(p) for p in plan.watched.parameters],
            config=plan.config.to_dict(),
            sample=sample,
            max_bytes=plan.config.journal_mib << 20,
            on_error=failed,
            also=also,
        )
    except Exception as error:
        say(f"no journal for this rank, training goes on without it: {error}")
        return None


def begin_run(
    plan: Plan,
    agreement: Agreement,
    identity: RankIdentity,
    snapshots: Snapshots | None,
    say: Announcer,
    *,
    acts: bool,
) -> None:
    """Say what begins, on rank 0; have an agent run, on each node."""
    if identity.rank == 0:
        for level, line in _opening_lines(plan, agreement, identity, snapshots, acts=acts):
            say.once(line, level)
    if identity.local_rank == 0 and plan.config.agent.start == "auto":
        start_agent(plan.directory, plan.config, say)


def _opening_lines(
    plan: Plan, agreement: Agreement, identity: RankIdentity, snapshots: Snapshots | None, *, acts: bool
) -> Iterator[tuple[int, str]]:
    """(level, line): what rank 0 says of a run when it begins, and of settings that have no effect in it."""
    topology, settings = plan.topology, plan.config
    mode = "guarding" if acts else "watching"
    yield logging.INFO, f"{mode} run {identity.run} ({identity.world_size} rank{'s' * (identity.world_size > 1)})"
    if "~" in identity.run:
        yield logging.WARNING, f"another run of that name is alive: this one is {identity.run} in metrics and page"
    if not topology.acts:
        yield logging.WARNING, f"only watching, not acting: {topology.why}"
    elif not agreement.equal_arithmetic:
        yield (
            logging.WARNING,
            "devices, thread counts or torch differ between ranks: one more small all-reduce per step",
        )
    if snapshots is not None:
        gib = snapshots.bytes_needed() / 2**30
        yield logging.INFO, f"rollback keeps snapshots: up to {gib:.3g} GiB of host memory per rank"
    elif settings.rollback.every_steps:
        yield logging.WARNING, "rollback.every_steps has no effect where gradmon only watches"
    if settings.leave_out.bad_rank and (topology.hook is None or settings.mode == "observe"):
        yield (
            logging.WARNING,
            "leave_out.bad_rank has no effect here: it needs mode: guard and DistributedDataParallel without a "
            "communication hook of the script's",
        )
