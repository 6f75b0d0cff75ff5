"""Real gloo ranks that stay up for a whole test session: a test costs milliseconds instead of a process start each.

`Ranks(2).run(function, argument)` calls `function(argument)` on both ranks at once and returns what each returned.
The function must be importable, since it travels by name.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

SECONDS = 60
#: What an old torch raises by itself, without gradmon.
TORCH_CANT = {
    "no attribute 'record_event'": "this torch can't run FSDP2 on CPU (2.6 can't)",
    "FSDP+TP sharding does not support uneven sharding": "this torch can't shard unevenly with TP (2.6 can't)",
}


class RankError(Exception):
    """A rank raised; the text holds its traceback."""


def context() -> ForkServerContext:
    """Processes are forked from one that has imported torch and done nothing else: to import it is what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "gradmon"])
    return context


class Ranks:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank. After a failure the processes are started anew: they may be out of step."""
        outcomes = self.outcomes(function, *args)
        failed = [o for o in outcomes if isinstance(o, BaseException)]
        if failed:
            self.stop()
            for error, reason in TORCH_CANT.items():
                if error in str(failed[0]):
                    pytest.skip(reason)
            raise failed[0]
        return outcomes

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Like `run`, but a rank that raised gives its exception."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.stop()
                raise RankError(f"rank {rank} did not answer within {SECONDS} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                self._processes[rank].join(10)
                code = self._processes[rank].exitcode
                self.stop()  # the next test gets new ones
                raise RankError(f"rank {rank} ended with code {code} instead of answering") from None
            outcomes.append(value if ok else RankError(value))
        return outcomes

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = context()
        for rank in range(self.world_size):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GRADMON_AGENT="off")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=SECONDS / 2)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
