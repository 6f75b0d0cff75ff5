"""Under torchrun: every Lightning job of two ranks, one after the other. Writes `rank-N.json` into the given folder."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pl_training import Job, fit


def both(job: Job) -> dict[str, Any]:
    """The same job without gradmon and with it."""
    return {"without": fit(dataclasses.replace(job, watched=False)), "with": fit(job)}


def resumed(job: Job) -> dict[str, Any]:
    """Two epochs at once, and with a checkpoint between them."""
    saved = f"{job.directory}/checkpoints"
    keeping = ModelCheckpoint(saved, filename="first", save_on_train_epoch_end=True)
    whole = fit(dataclasses.replace(job, trainer={"max_epochs": 2}))
    first = fit(dataclasses.replace(job, trainer={"callbacks": [keeping], "enable_checkpointing": True}))
    second = fit(dataclasses.replace(job, resume=f"{saved}/first.ckpt", nan=None, trainer={"max_epochs": 2}))
    return {"whole": whole, "first": first, "second": second}


def jobs(d: str) -> dict[str, Callable[[], Any]]:
    clip = {"gradient_clip_val": 0.05}
    logged = {"logger": CSVLogger(d, "logged"), "log_every_n_steps": 3, "val_check_interval": 6}
    return {
        "plain": lambda: both(Job(d)),
        "accumulated": lambda: both(Job(d, trainer={**clip, "accumulate_grad_batches": 2})),
        "bf16": lambda: both(Job(d, trainer={"precision": "bf16-mixed"}, optimizer={})),
        "manual": lambda: both(Job(d, manual=True, optimizer={})),
        "logged": lambda: fit(Job(d, validates=True, nan=(1, 5), trainer=logged)),
        "nan": lambda: both(Job(d, nan=(1, 9), trainer=clip)),
        "manual_nan": lambda: both(Job(d, nan=(1, 9), manual=True, optimizer={})),
        "resumed": lambda: resumed(Job(f"{d}/ddp", nan=(1, 3), dropout=0.0)),
        "fsdp2": lambda: both(Job(d, sharded="fsdp2", trainer=clip)),
        "fsdp2_nan": lambda: both(Job(d, sharded="fsdp2", nan=(1, 9))),
        "fsdp2_resumed": lambda: resumed(Job(f"{d}/fsdp2", sharded="fsdp2", nan=(1, 3), dropout=0.0)),
        "fsdp1": lambda: both(Job(d, sharded="fsdp1")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # Lightning uses the one that is there
    folder = Path(sys.argv[1])
    found = {name: job() for name, job in jobs(str(folder)).items()}
    Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
