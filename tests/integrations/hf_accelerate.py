"""A hand-written loop with Accelerate under torchrun, run several times; what it finds, as JSON per rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hf_launch
import hf_model
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import gradmon

STEPS = 12
ACCUMULATE = 2
BATCH = 2
SAMPLES = 2 * BATCH * ACCUMULATE * STEPS


def train(
    data: hf_model.Text, *, watch: bool, save: tuple[int, Path] | None = None, resume: tuple[int, Path] | None = None
) -> dict[str, Any]:
    """One epoch, saved after a step or resumed behind it; the loop is as in Accelerate's guide."""
    set_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    # Neither dropout nor a shuffle: Accelerate does not resume these in the middle of an epoch.
    model = hf_model.build(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    loader = DataLoader(data, batch_size=BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    monitor = gradmon.attach(model, optimizer) if watch else None
    if monitor is not None:
        accelerator.register_for_checkpointing(monitor)

    first, batches = 0, loader
    if resume is not None:
        first = resume[0]
        accelerator.load_state(str(resume[1]))
        batches = accelerator.skip_first_batches(loader, first * ACCUMULATE)
    norms: list[float] = []
    losses: list[float] = []
    reported: list[float] = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            losses.append(float(loss))
            if monitor is not None:
                monitor.observe(loss=loss)
            if accelerator.sync_gradients:
                flat = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
                norms.append(float(flat.norm()))
                reported.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and save is not None and first + len(norms) == save[0]:
            accelerator.save_state(str(save[1]))
            break
    found = {
        "weights": hf_model.digest(model.parameters()),
        "moments": hf_model.digest(
            v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        ),
        "finite": all(bool(torch.isfinite(p).all()) for p in model.parameters()),
        "norms": norms, "reported": reported, "losses": losses,
        "nan_batches": accelerator.unwrap_model(model).nan_batches,
    }  # fmt: skip
    if monitor is not None:
        found |= {
            "state": json.loads(json.dumps(monitor.state_dict())), "journal": str(monitor.journal_path),
            "topology": str(monitor._topology),
        }  # fmt: skip
        monitor.detach()
    accelerator.free_memory()
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    text, poisoned = hf_model.Text(SAMPLES, weight=4.0), hf_model.Text(SAMPLES, weight=4.0, nan=45)
    found = {"plain": train(text, watch=False), "watched": train(text, watch=True)}
    found["parted"] = train(text, watch=True, save=(5, folder / "state"))
    found["resumed"] = train(text, watch=True, resume=(5, folder / "state"))
    found["nan plain"] = train(poisoned, watch=False)
    found["nan watched"] = train(poisoned, watch=True)
    hf_launch.leave(folder, dist.get_rank(), found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
