"""The training that faults are injected into: a byte-level GPT on the Python standard library's sources.

Everything in a run follows from its seed: with one thread, two runs of a seed end with the same bits. All runs of a
seed see the same initial weights and the same batches in the same order, whatever goes wrong in them.

How the numbers were chosen (seed 0, 500 steps, torch 2.13 on CPU):

- LEARNING_RATE: validation loss 2.00, against 2.13 with 3e-3.
- LOSS_SCALE: unscaled, a healthy norm is 0.7 to 0.95 after the warm-up, and 4.7 at most before. 3/16 makes that 0.13 to
  0.18, as in a model of a billion parameters, and the most 0.9: a clip to 1.0 never touches a healthy step. AdamW does
  not care as long as its epsilon is scaled alike.
- No norm before the head, unless asked for: with one, such a small model can't explode. A learning rate too high leaves
  it with byte frequencies, a loss of 2.9 and *small* gradients; without, losses reach 300 and gradients x700, as large
  models do it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

WIDTH, LAYERS, HEADS, CONTEXT = 64, 2, 4, 64
BATCH = 16
"""Sequences in a step, of all ranks together."""
STEPS = 500
LEARNING_RATE = 5e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
LOSS_SCALE = 3 / 16
EPS = 1e-8 * LOSS_SCALE
_EMBEDDING_STD = 0.1

TRAINING_BYTES, VALIDATION_BYTES = 3_000_000, 300_000
VALIDATION_SEQUENCES = 1024


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
        b, t, _ = x.shape
        q, k, v = self.attention_in(self.norm1(x)).view(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, WIDTH)
        x = x + self.attention_out(mixed)
        wider: Tensor = self.mlp(self.norm2(x))
        return x + wider


class ByteGPT(nn.Module):
    """Bytes in, logits over the next byte out; 136,832 parameters."""

    def __init__(self, *, final_norm: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH) if final_norm else nn.Identity()
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=_EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, time] -> [batch, time, 256]."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes, of different files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    training = b"".join(f.read_bytes() for i, f in enumerate(files) if i % 10)[:TRAINING_BYTES]
    held_out = b"".join(f.read_bytes() for f in files[::10])[:VALIDATION_BYTES]
    if len(training) < TRAINING_BYTES or len(held_out) < VALIDATION_BYTES:
        raise RuntimeError(f"this Python brings too few sources: {len(training):,} and {len(held_out):,} bytes")
    return _tensor(training), _tensor(held_out)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each [starts, CONTEXT]."""
    both = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return both[:, :-1], both[:, 1:]


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next batch, of all ranks together."""
    text = corpus()[0]
    return windows(text, torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy per byte, unscaled."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over a tenth of the run, then cosine to a tenth of the peak."""
    warm = min(1.0, step / max(1, steps // 10))
    return LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


@torch.no_grad()
def validate(model: nn.Module) -> float:
    """Unscaled loss over windows spread evenly over the validation bytes."""
    text = corpus()[1]
    parts = torch.linspace(0, len(text) - CONTEXT - 1, VALIDATION_SEQUENCES).long().split(BATCH)
    return sum(float(loss_of(model, *windows(text, starts))) for starts in parts) / len(parts)


def digest(tensors: Iterable[Tensor]) -> str:
    """Equal for equal bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
