"""A script that knows Lightning as `pytorch_lightning`: the callback is one of that library's."""

from __future__ import annotations

import sys

import pytorch_lightning as pl
import torch
from texts import window
from torch import Tensor, nn

from gradmon.integrations.lightning import GradmonCallback


class Bytes(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 256))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


torch.set_num_threads(1)
callback = GradmonCallback({"dir": sys.argv[1], "agent": {"start": "off"}})
trainer = pl.Trainer(
    callbacks=callback, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Bytes(), torch.utils.data.DataLoader([window(i) for i in range(40)], 8))
assert isinstance(callback, pl.Callback)
assert "lightning.pytorch" not in sys.modules
assert callback.monitor is not None
print(callback.monitor.journal_path)
