"""Lightning jobs of one process, one after the other. Writes `single.json` into the given folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from pl_training import Bytes, Job, fit, loader, trainer_for, written

from gradmon.integrations.lightning import GradmonCallback


class Untrained(Bytes):
    """Configures no optimizer, as a module under construction does."""

    def configure_optimizers(self) -> None:
        return None


def scaled(d: str, **options: Any) -> dict[str, Any]:
    """fp16 with a GradScaler, which Lightning uses on a CPU only if it is told to; too large a scale at first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = {"plugins": [plugin], "gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    return fit(Job(d, batches=24, optimizer={"foreach": True}, trainer=trainer, **options))


def again(d: str) -> list[dict[str, Any]]:
    """The same Trainer fits two more epochs; then another one with the same callback."""
    job = Job(d)
    callback = GradmonCallback({"dir": d, "agent": {"start": "off"}})
    model, found = Bytes(job), []
    trainer = trainer_for(job, callback)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, loader(job.batches, 1))
        found.append(written(callback))
    return [*found, fit(job, callback)]


def untrained(d: str) -> dict[str, Any]:
    """No optimizer: nothing to watch, and nothing breaks."""
    job = Job(d)
    callback = GradmonCallback({"dir": d, "agent": {"start": "off"}})
    model: LightningModule = Untrained(job)
    trainer_for(job, callback).fit(model, loader(job.batches, 1))
    return {"attached": callback.monitor is not None, "batches": model.batches, "state": callback.state_dict()}


def damaged(d: str) -> dict[str, Any]:
    """A state that is none comes with a checkpoint: gradmon begins anew."""
    job = Job(d)
    callback = GradmonCallback({"dir": d, "agent": {"start": "off"}})
    trainer = trainer_for(job, callback)
    trainer.fit(Bytes(job), loader(job.batches, 1))
    trainer.save_checkpoint(f"{d}/damaged.ckpt")
    checkpoint = torch.load(f"{d}/damaged.ckpt")
    state = checkpoint["callbacks"]["GradmonCallback"]
    saved, state["version"] = dict(state), 99
    torch.save(checkpoint, f"{d}/damaged.ckpt")
    resumed = dataclasses.replace(job, resume=f"{d}/damaged.ckpt", trainer={"max_epochs": 2})
    return {"saved": saved, "resumed": fit(resumed)}


def jobs(d: str) -> dict[str, Callable[[], Any]]:
    return {
        "scaled": lambda: {"without": scaled(d, watched=False), "with": scaled(d)},
        "again": lambda: again(d),
        "untrained": lambda: untrained(d),
        "damaged": lambda: damaged(d),
        "failed": lambda: fit(Job(d, fails_at=5)),
        "stopped": lambda: fit(Job(d, nan_from=2, batches=20)),
        "interrupted": lambda: fit(Job(d, fails_at=5, error=KeyboardInterrupt)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {name: job() for name, job in jobs(str(folder)).items()}
    (folder / "single.json").write_text(json.dumps(found))
