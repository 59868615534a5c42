"""Tokenized texts: stored in files, kept on the device, and returned in padded batches."""

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
        starts: int64 (n,), the position in `ids` of the first token of each text.
        lengths: int64 (n,), the tokens of each text. They stay on the CPU, so that computing the
            width of a batch does not wait for the device.
        labels: int64 (n,).
        pad: the id of the padding token.
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
        """Return the ids and mask, int64 (n, width), and the labels, int64 (n,), of some texts.

        Each text is padded on the right to the longest one. For texts of 3 and 1 tokens that start
        at 7 and 2 in `self.ids`:

            mask      1 1 1     places    7 8 9     ids    a b c
                      1 0 0               2 0 0            d . .    (. is the padding token)

        A place outside a text would be in another text or beyond the end of `self.ids`, so it is
        replaced by 0 before the look-up, and its token by the padding token after it.

        Args:
            rows: the numbers of the texts, int64 (n,), on the CPU.
        """
        lengths, device = self.lengths[rows], self.ids.device
        columns = torch.arange(int(lengths.max()), device=device)  # (width,)
        rows, lengths = rows.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
        mask = columns < lengths[:, None]  # (n, width)
        places = torch.where(mask, self.starts[rows][:, None] + columns, 0)
        ids = torch.where(mask, self.ids[places].long(), self.pad)
        return ids, mask.long(), self.labels[rows]


def tokenized(
    corpus: Corpus, split: str, tokenizer: Any, max_length: int, cache_path: Callable[[str], Path]
) -> Tokens:
    """Return the tokens of a split, from the file of an earlier run if it exists.

    Args:
        corpus: the texts.
        split: "train", "validation" or "test".
        tokenizer: a tokenizer of transformers.
        max_length: maximum tokens of a text, special tokens included.
        cache_path: maps a digest of the texts and the tokenizer to the path of the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    from ..harness.rundir import replace_file

    rows = corpus.splits[split]
    texts = [text for text, _ in rows]
    numbers = {label: i for i, label in enumerate(corpus.labels)}
    labels = torch.tensor([numbers[label] for _, label in rows])
    inputs = [_identity(tokenizer), max_length, texts]
    path = cache_path(hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16])
    try:
        flat = load(path.read_bytes())
        ids, lengths = flat["ids"], flat["lengths"].long()
    except (FileNotFoundError, SafetensorError, KeyError):  # missing or damaged: made again
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        ids = torch.tensor([token for text in encoded for token in text], dtype=torch.int32)
        lengths = torch.tensor([len(text) for text in encoded])
        replace_file(path, save({"ids": ids, "lengths": lengths.int()}))
    starts = lengths.cumsum(0) - lengths
    return Tokens(ids, starts, lengths, labels, tokenizer.pad_token_id)


def _identity(tokenizer: Any) -> str:
    """Return a digest of a tokenizer's file, or of its vocabulary if it has no such file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(content.encode()).hexdigest()


def by_length(
    lengths: Tensor, order: Tensor, size: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the batches of an epoch, the row numbers of texts of similar length, int64 (size,).

    The rows in their random order are cut into chunks of fifty batches. Each chunk is sorted by
    length and cut into batches. Then the batches of all chunks are shuffled. With chunks of two
    batches of two texts, and lengths instead of row numbers:

        order      9 2 8 3 | 5 1 6 7
        sorted     2 3 8 9 | 1 5 6 7
        batches    2 3, 8 9, 1 5, 6 7

    Sorting all texts at once would need the least padding, but every epoch would have the same
    batches. Chunks of a random order need little more padding, and the batches change.
    """
    batches: list[Tensor] = []
    for chunk in order.split(50 * size):
        batches += chunk[lengths[chunk].argsort(stable=True)].split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
