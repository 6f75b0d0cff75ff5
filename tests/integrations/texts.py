"""Real text for tiny models: the sources that come with every Python, as bytes."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

WINDOW = 32


@functools.cache
def text(size: int = 100_000) -> Tensor:
    """[size] uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "ast", "bdb", "calendar", "cmd"))
    assert len(joined) >= size
    return torch.frombuffer(bytearray(joined[:size]), dtype=torch.uint8)


def window(index: int, length: int = WINDOW) -> Tensor:
    """[length] int64: one of many, spread over the whole text."""
    start = (index * 7919) % (len(text()) - length)
    return text()[start : start + length].long()
