"""The README's examples of trainers, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradmon.journal import read_journal

pytestmark = pytest.mark.timeout(400)
HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
HUGGING_FACE = """
import transformers
from hf_model import Text, build
model, data = build(), Text(32)
args = transformers.TrainingArguments("out", max_steps=3, use_cpu=True, report_to=[], save_strategy="no")
{example}
trainer.train()
"""
LIGHTNING = """
import lightning, torch
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, _):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
{example}
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=8))
"""
ACCELERATE = """
import accelerate, gradmon, torch
accelerator = accelerate.Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters())
loader = torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=8)
{example}
for batch in loader:
    optimizer.zero_grad()
    accelerator.backward(model(batch).square().mean())
    optimizer.step()
"""


EXAMPLES = {"transformers.Trainer": HUGGING_FACE, "lightning.Trainer": LIGHTNING, "prepare(": ACCELERATE}


def test_the_examples_train(tmp_path: Path) -> None:
    """In one process, one after the other: what takes long is to import them all."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    script = ""
    for containing, program in EXAMPLES.items():
        (example,) = [block for block in blocks if containing in block]
        script += program.format(example=example)
    (tmp_path / "train.py").write_text(script + "monitor.detach()\n")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_"))}
    own = {"GRADMON_DIR": str(tmp_path), "GRADMON_AGENT": "off", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "train.py"],
        env={**inherited, **own},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("guarding run train (1 rank)") == 3
    steps = [[r.step for _, r in read_journal(path).steps] for path in sorted(tmp_path.rglob("rank-*.db"))]
    assert steps == [[1, 2, 3], list(range(1, 9)), [1, 2, 3]]
