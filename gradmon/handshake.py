"""All ranks agree before the first collective: same settings, same model, nobody missing.

Through the process group's store, with a timeout: a rank that never attached is then an error that names it, where a
collective would hang. Rank 0 compares what all ranks say and publishes one answer, so every rank raises the same error
or none does, and no rank reads more than two keys.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store


class AttachError(RuntimeError):
    """The ranks of a run do not fit together, or one of them is missing."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a rank says of itself."""

    settings: Mapping[str, Any]
    """Every setting that shapes decisions; must be equal on all ranks."""
    model: str
    """Digest of the parameters' names, shapes and types; must be equal on all ranks."""
    version: str
    arithmetic: str
    """Device type and thread count; where they differ, norms differ in their last digits."""
    problem: str | None
    """Why this rank can't attach, if it can't."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What rank 0 answers to all."""

    shared: Mapping[str, Any]
    """What rank 0 alone decides: run and instance."""
    equal_arithmetic: bool


def agree(
    hello: Hello, decide: Callable[[], Mapping[str, Any]], *, group: dist.ProcessGroup, number: int, timeout: float
) -> Agreement:
    """Exchange hellos over `group`.

    Args:
        hello: this rank's.
        decide: called on rank 0 only, once all ranks fit; its result is `Agreement.shared` everywhere.
        group: the group of the ranks that attach together.
        number: how many times this process has attached, so that keys are never used twice.
        timeout: seconds to wait for the others.

    Raises:
        AttachError: with the same text on all ranks that came.
    """
    # The store outlives the workers of one attempt, and may serve several groups.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"gradmon/{attempt}/{group.group_name}/{number}"
    store = PrefixStore(prefix, _job_store())
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    mine = {name: getattr(hello, name) for name in Hello.__dataclass_fields__}
    store.set(f"hello/{rank}", json.dumps(mine, default=str))
    if rank == 0:
        answer = _answer(store, world_size, timeout, decide)
        store.set("answer", json.dumps(answer))
        if answer["error"]:
            _wait_for_readers(store, world_size)
    else:
        # Rank 0 itself waits up to `timeout`: give its answer time to arrive.
        if not _wait(store, ["answer"], timeout + 5):
            # should rank 0 still come, it must not start without us
            store.set(f"hello/{rank}", json.dumps({**mine, "problem": f"gave up after {timeout + 5:g} s"}, default=str))
            raise AttachError(
                f"rank 0 did not attach within {timeout:g} s; gradmon.attach() must be called on every rank"
            )
        answer = json.loads(store.get("answer"))
        store.add("read", 1)
    if answer["error"]:
        raise AttachError(answer["error"])
    return Agreement(answer["shared"], answer["equal_arithmetic"])


def _answer(store: Store, world_size: int, timeout: float, decide: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    keys = [f"hello/{rank}" for rank in range(world_size)]
    if not _wait(store, keys, timeout):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return {"error": f"{_ranks(missing)} did not attach within {timeout:g} s; {_MISSING_CURE}"}
    hellos = [Hello(**json.loads(store.get(key))) for key in keys]
    error = _difference(hellos)
    shared: Mapping[str, Any] = {}
    if error is None:
        try:
            shared = decide()
        except Exception as failure:  # the others are waiting for an answer
            error = f"rank 0: {failure}"
    return {"error": error, "shared": shared, "equal_arithmetic": len({h.arithmetic for h in hellos}) == 1}


_MISSING_CURE = "gradmon.attach() must be called on every rank"


def _difference(hellos: list[Hello]) -> str | None:
    """Why these ranks can't train together under gradmon, or None."""
    problems = [(rank, hello.problem) for rank, hello in enumerate(hellos) if hello.problem]
    if problems:
        _, problem = problems[0]
        return f"{_ranks([r for r, p in problems if p == problem])}: {problem}"
    for name in hellos[0].settings:
        values = [hello.settings.get(name) for hello in hellos]
        if any(value != values[0] for value in values):
            return f"setting {name} differs between ranks: {_by_value(values)}; give every rank the same configuration"
    versions = [hello.version for hello in hellos]
    if len(set(versions)) > 1:
        return f"gradmon's version differs between ranks: {_by_value(versions)}; install one version everywhere"
    models = [hello.model for hello in hellos]
    if len(set(models)) > 1:
        return f"the model differs between ranks: {_by_value(models)}; attach the same model on every rank"
    return None


def _by_value(values: list[Any]) -> str:
    first_seen = list(dict.fromkeys(map(repr, values)))
    return ", ".join(
        f"{shown} on {_ranks([r for r, v in enumerate(values) if repr(v) == shown])}" for shown in first_seen
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _wait(store: Store, keys: list[str], timeout: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:  # DistStoreError in newer versions, a plain RuntimeError in older ones
        return False
    return True


def _wait_for_readers(store: Store, world_size: int) -> None:
    """Rank 0 is about to raise, and its process may be the one that serves the store."""
    came = sum(store.check([f"hello/{rank}"]) for rank in range(1, world_size))
    deadline = time.monotonic() + 5
    while store.add("read", 0) < came and time.monotonic() < deadline:
        time.sleep(0.05)


def _job_store() -> Store:
    """The store all ranks of the job can reach."""
    store: Store = dist.distributed_c10d._get_default_store()
    return store
