"""Runs a script of this folder on two ranks, which leave what they found as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 390


def torchrun(script: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank has found; `folder` is the script's one argument, and holds its journals."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRADMON_", "TORCHELASTIC_"))}
    environment |= {
        "GRADMON_AGENT": "off", "GRADMON_DIR": str(folder / "journals"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(folder)],
        env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def leave(folder: Path, rank: int, found: dict[str, Any]) -> None:
    """What `torchrun` reads."""
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
