"""A hand-written DDP script, as people have them. It knows nothing of gradmon, and is run with it and without."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from loops import ByteModel, batches, loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(model: nn.Module, steps: int, nan_at: int = 0, micro_steps: int = 1) -> dict[str, torch.Tensor]:
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    rank = dist.get_rank()
    mine = itertools.islice(batches(2 * steps * micro_steps), rank, None, 2)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for micro_step in range(1, micro_steps + 1):
            with contextlib.nullcontext() if micro_step == micro_steps else ddp.no_sync():
                loss = loss_of(ddp, *next(mine)) / micro_steps
                if (rank, step) == (1, nan_at):
                    loss = loss * float("nan")
                loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


parser = argparse.ArgumentParser()
parser.add_argument("weights", type=Path)
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()
dist.init_process_group("gloo")
torch.set_num_threads(1)
found = {}
trainings = {"clean": {}, "accumulated": {"micro_steps": 2}, "nan": {"nan_at": args.steps // 2}}
for name, options in trainings.items():
    torch.manual_seed(0)
    found[name] = train(ByteModel(), args.steps, **options)
torch.save(found, args.weights / f"{os.environ['RANK']}.pt")
dist.destroy_process_group()
