"""A tiny, randomly initialised GPT-2 over bytes, and its data, in which a sample's weight may be NaN."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import texts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


class ByteModel(GPT2LMHeadModel):
    """The loss is weighted by the mean of the batch's weights."""

    nan_batches = 0

    def forward(self, input_ids: Any = None, labels: Any = None, weight: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if weight is not None:
            self.nan_batches += int(torch.isnan(weight).any())
            output.loss = output.loss * weight.mean()
        return output


def build(dropout: float = 0.1) -> ByteModel:
    """2 layers, 32 wide; with dropout, so that a random number drawn by gradmon would show."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=texts.WINDOW, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return ByteModel(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    newline = words.encode("\n").tokens[0]
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=newline, pad_token=newline)


class Text(Dataset):  # type: ignore[type-arg]
    """Windows of text. At the index `nan` the weight is NaN; after `broken` reads the data can't be read any more."""

    def __init__(
        self, size: int, *, offset: int = 0, weight: float = 1.0, nan: int = -1, broken: int = 1 << 30
    ) -> None:
        self.size, self.offset, self.weight, self.nan, self.broken = size, offset, weight, nan, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.broken -= 1
        if self.broken < 0:
            raise OSError("the data can't be read")
        window = texts.window(self.offset + index)
        weight = float("nan") if index == self.nan else self.weight
        return {"input_ids": window, "labels": window, "weight": torch.tensor(weight)}


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Equal for tensors that are equal bit for bit."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
