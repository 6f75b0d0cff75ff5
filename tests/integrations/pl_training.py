"""What the Lightning scripts train: a tiny byte-level model on the standard library's sources, with faults on request.

`fit` runs one job as a user would and returns what the tests compare, as plain values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from texts import window
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad
from torch.utils.data import DataLoader, TensorDataset, dataloader

import gradmon
from gradmon.integrations.lightning import GradmonCallback
from gradmon.journal import read_journal

WIDTH, BATCH = 16, 8
#: What every step of a journal is compared by.
STEP_FIELDS = (
    "step", "grad_norm", "grad_norm_applied", "local_grad_norm", "action", "reason", "applied", "culprit_rank", "loss",
    "loss_scale", "learning_rate",
)  # fmt: skip


class PlannedError(Exception):
    """What a job is told to fail with."""


class OnCPU(FSDPStrategy):
    """Lightning takes FSDP1 for GPUs only, and says so by the strategy's type."""


@dataclass(frozen=True)
class Job:
    """What to train, and what goes wrong."""

    directory: str
    watched: bool = True
    """False trains without the callback."""
    manual: bool = False
    """Manual optimization, with two optimizers and a clip of its own."""
    sharded: str = ""
    """`fsdp1` or `fsdp2`; DDP, or one process, otherwise."""
    optimizer: dict[str, Any] = field(default_factory=lambda: {"fused": True})
    nan: tuple[int, int] | None = None
    """(rank, batch from 1): its loss is NaN."""
    nan_from: int = 99
    """From this batch on every loss is NaN."""
    fails_at: int = 0
    """Batch in which `training_step` raises."""
    error: type[BaseException] = PlannedError
    dropout: float = 0.1
    batches: int = 12
    """Of an epoch, on each rank."""
    validates: bool = False
    resume: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


class Bytes(LightningModule):
    """Predicts each next byte from the one before it."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.job = job
        self.automatic_optimization = not job.manual
        self.token = nn.Embedding(256, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(job.dropout), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, 256)
        self.batches = 0
        self.losses: list[Tensor] = []
        self.norms: list[float] = []
        """By plain torch, of the gradients before any clip."""
        self.watching: dict[str, list[bool]] = {"validation_step": [], "on_save_checkpoint": []}
        """Whether gradmon had paused inside of them; empty before it attached."""
        self.attached: list[str] = []
        """What `leftovers` finds in the middle of training."""

    def configure_model(self) -> None:
        if self.job.sharded == "fsdp2" and not isinstance(self.head.weight, DTensor):
            for part in (self.token, self.mlp, self.head):  # not itself: Lightning calls training_step, not forward
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        if self.job.sharded == "fsdp1":
            for name in ("token", "mlp", "head"):
                part = getattr(self, name)
                setattr(self, name, FullyShardedDataParallel(part, device_id=torch.device("cpu"), use_orig_params=True))

    def configure_optimizers(self) -> Any:
        parts = [[*self.token.parameters(), *self.mlp.parameters()], list(self.head.parameters())]
        parts = parts if self.job.manual else [[*parts[0], *parts[1]]]
        return [torch.optim.AdamW(part, lr=3e-3, **self.job.optimizer) for part in parts]

    def loss_of(self, window_BT: Tensor) -> Tensor:
        x = self.token(window_BT[:, :-1])
        return cross_entropy(self.head(x + self.mlp(x)).flatten(0, 1).float(), window_BT[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        self.batches += 1
        if self.batches == self.job.fails_at:
            raise self.job.error("as planned")
        if self.batches == 3:
            self.attached = leftovers(self, self.trainer)
        loss = self.loss_of(batch[0])
        if (self.global_rank, self.batches) == self.job.nan or self.batches >= self.job.nan_from:
            loss = loss * math.nan
        self.losses.append(loss.detach().clone())
        if self.job.manual:
            self.step_by_hand(loss)
        return loss

    def step_by_hand(self, loss: Tensor) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.norms.append(self.norm())
        for optimizer in optimizers:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        for optimizer in optimizers:
            optimizer.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.job.manual:
            self.norms.append(self.norm())

    def norm(self) -> float:
        gradients = [whole(p.grad) for p in self.parameters() if p.grad is not None]
        return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        self.note("validation_step")
        self.log("val_loss", self.loss_of(batch[0]), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note("on_save_checkpoint")

    def note(self, where: str) -> None:
        for callback in self.trainer.callbacks:
            if isinstance(callback, GradmonCallback) and callback.monitor is not None:
                self.watching[where].append(callback.monitor._clock.paused)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def loader(batches: int, ranks: int, *, held_out: bool = False) -> DataLoader[Any]:
    samples = batches * ranks * BATCH
    return DataLoader(TensorDataset(torch.stack([window(i + 1000 * held_out) for i in range(samples)])), BATCH)


def trainer_for(job: Job, *callbacks: Any) -> Trainer:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    strategies = {"fsdp1": OnCPU, "fsdp2": lambda: ModelParallelStrategy(ranks, 1), "": lambda: "ddp"}
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": ranks, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": job.directory,
    }  # fmt: skip
    if ranks > 1:
        options["strategy"] = strategies[job.sharded]()
    options.update(job.trainer)
    own = options.pop("callbacks", [])
    return Trainer(callbacks=[*callbacks, *own], **options)


def fit(job: Job, callback: GradmonCallback | None = None) -> dict[str, Any]:
    """Train on this rank."""
    if job.watched and callback is None:
        callback = GradmonCallback({"dir": job.directory, "agent": {"start": "off"}, **job.config})
    model = Bytes(job)
    trainer = trainer_for(job, *([] if callback is None else [callback]))
    raised = ""
    try:
        trainer.fit(
            model,
            loader(job.batches, trainer.world_size),
            loader(2, trainer.world_size, held_out=True) if job.validates else None,
            ckpt_path=job.resume or None,
        )
    except (job.error, SystemExit) as error:
        raised = f"{type(error).__name__}: {error}"
    weights = [whole(p) for p in model.parameters()]
    outcome = {
        "weights": hashlib.sha256(b"".join(w.contiguous().numpy().tobytes() for w in weights)).hexdigest(),
        "finite": all(bool(w.isfinite().all()) for w in weights),
        "losses": [float(loss) for loss in model.losses],
        "norms": model.norms,
        "raised": raised,
        "leftovers": leftovers(model, trainer),
        "attached": model.attached,
        "paused": model.watching,
        "callback_metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    return outcome if callback is None else outcome | written(callback)


def written(callback: GradmonCallback) -> dict[str, Any]:
    """What the journal says, and what a checkpoint would hold."""
    monitor = callback.monitor
    if monitor is None or monitor.journal_path is None:
        return {"topology": ""}
    view = read_journal(monitor.journal_path)
    steps = [{k: v for k, v in dataclasses.asdict(r).items() if k in STEP_FIELDS} for _, r in view.steps]
    return {
        "steps": steps,
        "said": sorted(monitor._say._once),
        "state": callback.state_dict(),
        "topology": view.identity.topology,
        "end": view.state,
        "end_detail": view.end_detail,
        "errors": {str(k): v for k, v in view.counters.items() if "errors" in k[0] and v},
        "validation_loss": view.samples.get("validation_loss"),
    }


def leftovers(model: Bytes, trainer: Trainer) -> list[str]:
    """Where hooks are, or wraps of gradmon's. DDP's hook can't be removed, FSDP has hooks of its own."""
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks")
    modules = () if model.job.sharded else model.modules()
    found = {
        "optimizer": any(getattr(o, name) for o in trainer.optimizers for name in hooks),
        "module": any(m._forward_pre_hooks or m._forward_hooks for m in modules),
        "trainer": "save_checkpoint" in vars(trainer),
        "clip": is_ours(clip_grad._group_tensors_by_device_and_dtype),
        "scaler": is_ours(GradScaler.step),
        "loader": is_ours(dataloader._BaseDataLoaderIter.__next__),
        "exit": is_ours(sys.exit),
    }
    return [name for name, there in found.items() if there]


def is_ours(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and Path(gradmon.__file__).parent in Path(code.co_filename).parents
