"""Texts as tokens: tokenized once, kept on the device, given out in padded batches."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Corpus


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts, concatenated, on one device.

    Attributes:
        ids: int32, all tokens of all texts.
        starts: int64 (n,), where in `ids` each text begins.
        lengths: int64 (n,), on the CPU: a batch's width is known without waiting for the device.
        labels: int64 (n,).
        pad: the token that fills a batch up.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    labels: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Tokens":
        moved = (tensor.to(device) for tensor in (self.ids, self.starts))
        ids, starts = moved
        return Tokens(ids, starts, self.lengths, self.labels.to(device), self.pad)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and mask, int64 (n, width), and labels, int64 (n,), of rows on the CPU.

        Padded on the right to the longest of them.
        """
        lengths, device = self.lengths[rows], self.ids.device
        columns = torch.arange(int(lengths.max()), device=device)
        rows, lengths = rows.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
        mask = columns < lengths[:, None]
        places = torch.where(mask, self.starts[rows][:, None] + columns, 0)
        ids = torch.where(mask, self.ids[places].long(), self.pad)
        return ids, mask.long(), self.labels[rows]


def tokenized(
    corpus: Corpus, split: str, tokenizer: Any, max_length: int, kept: Callable[[str], Path]
) -> Tokens:
    """Return a split as tokens, from the file of an earlier run if it exists.

    Args:
        corpus: the texts.
        split: "train", "validation" or "test".
        tokenizer: of transformers.
        max_length: tokens of a text at most, special ones included.
        kept: says in which file they are kept, from a digest of all that they depend on.
    """
    from safetensors.torch import load, save

    from ..harness.rundir import replace_file

    rows = corpus.splits[split]
    texts = [text for text, _ in rows]
    numbers = {label: i for i, label in enumerate(corpus.labels)}
    labels = torch.tensor([numbers[label] for _, label in rows])
    how = [_identity(tokenizer), max_length, texts]
    path = kept(hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16])
    if path.exists():
        flat = load(path.read_bytes())
        ids, lengths = flat["ids"], flat["lengths"].long()
    else:
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        ids = torch.tensor([token for text in encoded for token in text], dtype=torch.int32)
        lengths = torch.tensor([len(text) for text in encoded])
        replace_file(path, save({"ids": ids, "lengths": lengths.int()}))
    starts = lengths.cumsum(0) - lengths
    return Tokens(ids, starts, lengths, labels, tokenizer.pad_token_id)


def _identity(tokenizer: Any) -> str:
    """Return a digest of a tokenizer: of its file's content, or else of its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(content.encode()).hexdigest()


def by_length(
    lengths: Tensor, order: Tensor, size: int, generator: torch.Generator
) -> list[Tensor]:
    """Return an epoch's batches, int64 row numbers each, of texts of similar length.

    The rows are taken in the given random order, some fifty batches at a time. Each such chunk is
    sorted by length and cut into batches, and the batches are shuffled. So little is padded, and a
    text still meets other texts in every epoch.
    """
    batches: list[Tensor] = []
    for pool in order.split(50 * size):
        batches += pool[lengths[pool].argsort(stable=True)].split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
