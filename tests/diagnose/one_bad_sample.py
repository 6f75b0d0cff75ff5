"""A user's training script for torchrun: one sample of the dataset is empty, and the model divides by its length."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import gradmon

SAMPLES = 128
EMPTY = 77


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, 4)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        length = inputs.norm(dim=1, keepdim=True)
        unit = inputs / length
        return nn.functional.cross_entropy(self.head(self.body(unit)), labels)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier()


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 8, generator=generator)
    inputs[EMPTY] = 0
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = make_data()
    sampler: DistributedSampler[object] = DistributedSampler(data, shuffle=True, seed=3)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with gradmon.attach(model, optimizer, config={"incident": {"weights": True}}) as monitor:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for inputs, labels in loader:
                optimizer.zero_grad()
                loss = model(inputs, labels=labels)
                loss.backward()
                optimizer.step()
                monitor.observe(loss=loss)
            if dist.get_rank() == 0:
                monitor.observe(validation_loss=1.0 + epoch)
    who = [int(EMPTY in list(sampler))]
    print(f"rank {os.environ['RANK']} of epoch {args.epochs - 1} has it: {who[0]}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
