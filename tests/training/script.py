"""A user's training script for torchrun: DDP, gradmon attached with one line, faults on request."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradmon

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--sleep", type=float, default=0.02)
parser.add_argument("--nan-at", type=int, default=0)
parser.add_argument("--nan-from", type=int, default=0, help="from there on every batch of rank 1 holds a NaN")
parser.add_argument("--crash-at", type=int, default=0, help="rank 1 raises there, in the first attempt")
parser.add_argument("--wait-for", default="", help="a file without which the last step is not taken")
parser.add_argument("--progress", default="", help="a folder for rank-N files holding the last completed step")
parser.add_argument("--modules", default="", help="a file for the names of all imported modules")
args = parser.parse_args()

# torchrun's store outlives an attempt, with the addresses of its killed ranks: gloo would connect to those.
restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
rank = int(os.environ["RANK"])
dist.init_process_group(
    "gloo", store=dist.PrefixStore(restarts, store), rank=rank, world_size=int(os.environ["WORLD_SIZE"])
)
torch.manual_seed(0)
torch.set_num_threads(1)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
monitor = gradmon.attach(model, optimizer)
first_attempt = restarts == "0"
for step in range(1, args.steps + 1):
    if step == args.crash_at and first_attempt and rank == 1:
        raise RuntimeError("as planned")
    inputs = torch.randn(4, 8)
    if rank == 1 and (step == args.nan_at or 0 < args.nan_from <= step):
        inputs[0, 0] = float("nan")
    optimizer.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    while step == args.steps and args.wait_for and not Path(args.wait_for).exists():
        time.sleep(0.02)
    optimizer.step()
    monitor.observe(loss=loss)
    if args.progress:
        new = Path(args.progress, f"rank-{rank}.{os.getpid()}.tmp")
        new.write_text(f"{step} {os.getpid()}")
        new.rename(Path(args.progress, f"rank-{rank}"))
    time.sleep(args.sleep)
if args.modules and rank == 0:
    import sys

    Path(args.modules).write_text("\n".join(sys.modules))
dist.destroy_process_group()
