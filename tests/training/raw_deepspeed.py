"""A training script with DeepSpeed's engine on CPU, for torchrun: `raw_deepspeed.py STAGE attach|plain FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import gradmon
from gradmon.journal import read_journal

stage, attach, file = int(sys.argv[1]), sys.argv[2] == "attach", Path(sys.argv[3])
for name in list(deepspeed.ops.__compatible_ops__):  # else the first rank compiles for minutes, and gloo does as well
    deepspeed.ops.__compatible_ops__[name] = False
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 1))
engine, optimizer, _, _ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.5,
    },
)
rank = dist.get_rank()
monitor = gradmon.attach(engine, optimizer) if attach else None
generator = torch.Generator().manual_seed(rank)
for step in range(1, 11):
    inputs = torch.randn(8, 24, generator=generator)
    targets = inputs.sum(1, keepdim=True) * 0.1
    if (rank, step) == (1, 5):
        inputs[0, 0] = float("nan")
    loss = (engine(inputs) - targets).square().mean()
    engine.backward(loss)
    engine.step()
told = {"weights": torch.cat([p.detach().flatten() for p in engine.module.parameters()]).tolist()}
if monitor is not None:
    monitor.detach()
    assert monitor.journal_path is not None
    view = read_journal(monitor.journal_path)
    told["topology"] = view.identity.topology
    told["names"] = monitor._watched.names
    told["steps"] = [[record.step, record.action, record.applied] for _, record in view.steps]
    told["errors"] = [str(key) for key, count in view.counters.items() if "errors" in key[0] and count]
file.with_name(f"{file.name}.{rank}").write_text(json.dumps(told))
