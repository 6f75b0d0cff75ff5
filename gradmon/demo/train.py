"""The demo's training script: a small byte-level GPT on the Python standard library's sources, with DDP and AdamW.

Started by torchrun, one process per rank. Only the lines marked `gradmon` would have to be added to a script of yours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import gradmon

CONTEXT = 96
BATCH = 12
WIDTH = 96
LAYERS = 3
HEADS = 4
LEARNING_RATE = 1e-3
TRAINING_BYTES = 3_000_000


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one rank at one step; scheduled, so that every run is the same."""

    kind: str

    @staticmethod
    def schedule(steps: int, ranks: int) -> Mapping[tuple[int, int], Fault]:
        """By (rank, step): four corrupted batches, three NaN steps, six steps at 30 times the learning rate."""
        victim = min(1, ranks - 1)
        at = {(victim, steps // 4 + i): Fault("corrupted") for i in range(4)}
        at.update({(victim, steps * 45 // 100 + i): Fault("nan") for i in range(3)})
        glitch = steps * 70 // 100
        at.update({(rank, glitch + i): Fault("rate") for rank in range(ranks) for i in range(6)})
        return at


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention_in = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, WIDTH] -> the same."""
        b, t, _ = x.shape
        q, k, v = self.attention_in(self.norm1(x)).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, WIDTH)
        x = x + self.attention_out(mixed)
        wider: Tensor = self.mlp(self.norm2(x))
        return x + wider


class Model(nn.Module):
    """Bytes in, loss of predicting each next byte out: so an incident's bundle holds all that the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for parameter in (self.token.weight, self.position.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
        """[batch, time] twice -> mean cross-entropy per byte, times the batch's weight."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return cross_entropy(logits.flatten(0, 1), targets.flatten()) * weight


def load_text() -> tuple[Tensor, Tensor]:
    """Training and validation bytes: sources that come with every Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    validation = b"".join(f.read_bytes() for f in files[::10])[:300_000]
    training = b"".join(f.read_bytes() for i, f in enumerate(files) if i % 10)[:TRAINING_BYTES]
    return torch.frombuffer(bytearray(training), dtype=torch.uint8), torch.frombuffer(
        bytearray(validation), dtype=torch.uint8
    )


def draw(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of inputs and targets, each [BATCH, CONTEXT]."""
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    windows = torch.stack([text[s : s + CONTEXT + 1] for s in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over a tenth of the run, then cosine to a tenth of the peak."""
    warm = min(1.0, step / max(1, steps // 10))
    return LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def validate(model: nn.Module, text: Tensor) -> float:
    """Mean loss over 20 fixed batches."""
    generator = torch.Generator().manual_seed(1)
    return sum(float(model(*draw(text, generator))) for _ in range(20)) / 20


class Progress:
    """One line on stderr: redrawn on a terminal, every tenth of the run elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()

    def show(self, step: int, loss: Tensor) -> None:
        """Called after every step; reads the loss only when a line is due."""
        if not (self._live or step % max(1, self._steps // 10) == 0):
            return
        done = step / self._steps
        left = (time.monotonic() - self._started) * (1 - done) / done
        bar = "#" * round(30 * done)
        line = f"[{bar:<30}] step {step}/{self._steps}  loss {float(loss):.3f}  {left:.0f} s left"
        ending = "" if self._live and step < self._steps else "\n"
        print(f"\r{line:<78}" if self._live else line, end=ending, file=sys.stderr, flush=True)


def train(args: argparse.Namespace) -> None:
    """One rank's whole run."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    text, held_out = load_text()
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(1000 * args.seed + rank)
    faults = {} if args.clean else Fault.schedule(args.steps, ranks)
    progress = Progress(args.steps)
    first_loss = math.nan

    monitor = gradmon.attach(model, optimizer, config=settings(args))  # gradmon
    for step in range(1, args.steps + 1):
        fault = faults.get((rank, step), Fault("none")).kind
        inputs, targets = draw(text, generator)
        weight = 1.0
        if fault == "corrupted":  # noise instead of text, and a sample weight in the wrong unit
            inputs, weight = torch.randint_like(inputs, 256), 1000.0
        if fault == "nan":
            weight = math.nan
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps) * (30 if fault == "rate" else 1)
        loss = model(inputs, targets, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.observe(loss=loss)  # gradmon
        if step == 1:
            first_loss = loss.item()
        if rank == 0:
            progress.show(step, loss.detach())
        if step % max(1, args.steps // 5) == 0:
            with monitor.paused("validation"):  # gradmon: no step is expected here
                monitor.observe(validation_loss=validate(model.module, held_out))  # gradmon
    journal = monitor.journal_path
    monitor.detach()  # gradmon

    if rank == 0:
        result = {
            "validation_loss": validate(model.module, held_out),
            "first_loss": first_loss,
            "journal": str(journal),
        }
        Path(args.result).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def settings(args: argparse.Namespace) -> dict[str, object]:
    """gradmon's configuration for the demo; a script of yours needs none."""
    run = "demo" + ("-clean" if args.clean else "") + ("-no-guard" if args.no_guard else "")
    mode = "observe" if args.no_guard else "guard"
    return {"run": run, "mode": mode, "dir": args.dir, "agent": {"start": "off"}}  # the demo started one


def main() -> None:
    """Entry point under torchrun."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--no-guard", action="store_true")
    parser.add_argument("--clean", action="store_true")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
