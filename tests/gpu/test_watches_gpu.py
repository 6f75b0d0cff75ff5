"""The watches on a GPU: nothing waits for it, and a batch that lies there is looked at where it lies."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from gradmon.config import DataConfig
from gradmon.data_watch import BatchWatch
from gradmon.weight_watch import MomentSample


def test_a_look_at_a_batch_waits_for_nothing() -> None:
    watch = BatchWatch(DataConfig(every=1))
    batch = {"pixels": torch.randn(8, 3, 32, 32, device="cuda"), "labels": torch.arange(8, device="cuda")}
    batch["pixels"][3, 0, 0, 0] = math.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.observe(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    deadline = time.monotonic() + 10
    found = []
    while not found and time.monotonic() < deadline:
        found = watch.take()
    assert [(f.rule, f.where) for f in found] == [("data_nonfinite", "pixels")]


def test_moments_are_measured_without_waiting() -> None:
    model = nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 64, device="cuda")).square().mean().backward()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms_PM = MomentSample([optimizer], list(model.parameters())).norms()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state = optimizer.state[model.weight]
    whole = [float(state[name].norm()) for name in ("exp_avg", "exp_avg_sq")]
    assert [abs(a / b - 1) < 0.2 for a, b in zip(norms_PM[0].tolist(), whole, strict=True)] == [True, True]
