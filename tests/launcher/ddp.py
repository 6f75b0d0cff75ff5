"""A hand-written DDP script, as people have them. It knows nothing of gradmon, and is run with it and without."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from loops import ByteModel, batches, loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(model: nn.Module, steps: int, nan_at: int = 0) -> dict[str, torch.Tensor]:
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    for step, (context, target) in enumerate(batches(2 * steps), start=1):
        if step % 2 != dist.get_rank():  # each rank has its own half
            continue
        loss = loss_of(ddp, context, target)
        if nan_at and step > nan_at and dist.get_rank() == 1:
            loss, nan_at = loss * float("nan"), 0
        optimizer.zero_grad()
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
for name, nan_at in (("clean", 0), ("nan", args.steps)):
    torch.manual_seed(0)
    found[name] = train(ByteModel(), args.steps, nan_at)
torch.save(found, args.weights / f"{os.environ['RANK']}.pt")
dist.destroy_process_group()
