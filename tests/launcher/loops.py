"""Training loops as people write them, one after the other; none knows of gradmon. Saves the weights of each."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

TEXT = torch.tensor(list(pathlib.Path(argparse.__file__).read_bytes()), dtype=torch.long)
STEPS = 12


class ByteModel(nn.Module):
    """Predicts the next byte from the last 8."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, 8)
        self.hidden = nn.Linear(64, 32)
        self.head = nn.Linear(32, 256)

    def forward(self, context: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.token(context).flatten(1))))


def batches(count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        at = torch.randint(0, len(TEXT) - 9, (16,), generator=generator)
        yield torch.stack([TEXT[i : i + 8] for i in at]), TEXT[at + 8]


def loss_of(model: nn.Module, context: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(context), target)


def plain(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for context, target in batches():
        loss = loss_of(model, context, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def clip_by_attribute(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for context, target in batches():
        optimizer.zero_grad()
        loss_of(model, context, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def clip_by_name(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for context, target in batches():
        optimizer.zero_grad()
        loss_of(model, context, target).backward()
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def scaler(model: nn.Module) -> None:
    """With two micro-steps per step, whose losses are divided as people do it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = list(batches(2 * STEPS))
    for first, second in zip(found[::2], found[1::2], strict=True):
        optimizer.zero_grad()
        for context, target in (first, second):
            grad_scaler.scale(loss_of(model, context, target) / 2).backward()
        grad_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grad_scaler.step(optimizer)
        grad_scaler.update()


def two_optimizers(model: nn.Module) -> None:
    """One for what multiplies, one for the rest, as with Muon."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizers = torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(others, lr=1e-2)
    for context, target in batches():
        loss_of(model, context, target).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def late_optimizer(model: nn.Module) -> None:
    """The head is trained alone at first."""
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)  # type: ignore[union-attr]
    body = None
    for step, (context, target) in enumerate(batches()):
        if step == STEPS // 2:
            body = torch.optim.AdamW([*model.token.parameters(), *model.hidden.parameters()])  # type: ignore[union-attr]
        model.zero_grad()
        loss_of(model, context, target).backward()
        head.step()
        if body is not None:
            body.step()


def closure(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for context, target in batches(4):

        def evaluate(context: Tensor = context, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, context, target)
            loss.backward()
            return loss

        optimizer.step(evaluate)


def loader(model: nn.Module) -> None:
    contexts, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    data = DataLoader(TensorDataset(contexts, targets), batch_size=16, num_workers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for context, target in data:
        optimizer.zero_grad()
        loss_of(model, context, target).backward()
        optimizer.step()


def no_backward(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for context, target in batches():
        parameters = list(model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss_of(model, context, target), parameters), strict=True):
            p.grad = g
        optimizer.step()


def compiled(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fast = torch.compile(model, backend="eager")
    for context, target in batches():
        optimizer.zero_grad()
        loss_of(fast, context, target).backward()
        optimizer.step()


def adversaries(model: nn.Module) -> None:
    """Two models against each other, each with its own optimizer."""
    critic = nn.Sequential(nn.Linear(256, 16), nn.Tanh(), nn.Linear(16, 1))
    mine = torch.optim.AdamW(model.parameters(), lr=1e-3)
    its = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    for context, _ in batches():
        its.zero_grad()
        critic(model(context).detach()).square().mean().backward()
        its.step()
        mine.zero_grad()
        critic(model(context)).mean().backward()
        mine.step()


LOOPS: dict[str, Callable[[nn.Module], None]] = {
    loop.__name__: loop
    for loop in (
        plain, clip_by_attribute, clip_by_name, scaler, two_optimizers, late_optimizer, closure, loader, no_backward,
        compiled, adversaries,
    )
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("weights", type=pathlib.Path)
    parser.add_argument("--loops", nargs="*", default=list(LOOPS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = {}
    for name in args.loops:
        torch.manual_seed(0)
        model = ByteModel()
        LOOPS[name](model)
        weights[name] = model.state_dict()
    torch.save(weights, args.weights)
    sys.exit(3)
