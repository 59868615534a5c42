"""How much fine-tuning changes the checkpoint's ability to recognise similar texts.

The measure needs no other data set. Each of COUNT test texts is cut into two halves. The embedding
of a half is the mean of the backbone's last hidden states over its tokens, normalised. For three
texts the cosines of the halves are a 3 × 3 matrix:

                      second half of 1   of 2   of 3
    first half of 1         0.9           0.2    0.4
    first half of 2         0.3           0.5    0.6    text 3 is nearer: a miss
    first half of 3         0.1           0.2    0.8

    retrieval    share of rows whose largest cosine is on the diagonal; 2/3 in the example
    agreement    Spearman's rank correlation of all cosines with the checkpoint's cosines

Both are proxies. Neither is a benchmark of sentence similarity.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import EVALUATION_FACTOR, TextContext
from .models import backbone_of, mean_pooled

COUNT = 1000
WORDS = 8  # texts with fewer words are left out


@dataclass(frozen=True)
class Similarity:
    """The embeddings of the first and the second halves, float32 (2, n, width), of norm 1."""

    embeddings: Tensor

    @property
    def cosines(self) -> Tensor:
        """The cosines between first and second halves, (n, n)."""
        return self.embeddings[0] @ self.embeddings[1].T  # (n, width) · (width, n)

    @property
    def retrieval(self) -> float:
        """The share of first halves whose nearest second half is from the same text."""
        nearest = self.cosines.argmax(1)
        own = torch.arange(len(nearest), device=nearest.device)
        return float((nearest == own).float().mean())

    def agreement(self, other: "Similarity") -> float:
        """Return Spearman's rank correlation between these cosines and those of `other`."""
        return float(torch.corrcoef(torch.stack([_ranks(self), _ranks(other)]))[0, 1])


def similarity(
    context: TextContext, model: nn.Module, texts: list[str] | None = None
) -> Similarity:
    """Return the similarities of the halves of texts (default: the test texts), without autocast.

    With several processes, each process computes all of them.
    """
    ids, mask = _halves(context, texts or [text for text, _ in context.corpus.splits["test"]])
    backbone, training = backbone_of(model), model.training
    model.eval()
    size, found = EVALUATION_FACTOR * context.settings.finetuning.batch, []
    with torch.no_grad():
        for i, m in zip(ids.split(size), mask.split(size), strict=True):
            found.append(mean_pooled(backbone, i, m))  # (batch, width)
    model.train(training)
    # (2n, width) → (2, n, width): the first halves come before the second halves.
    return Similarity(F.normalize(torch.cat(found).float(), dim=-1).unflatten(0, (2, -1)))


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the first and the second halves of the first COUNT texts of at least WORDS words.

    >>> halves(["a b c d e f g h", "too short"])
    (['a b c d'], ['e f g h'])
    """
    words = [split for text in texts if len(split := text.split()) >= WORDS][:COUNT]
    first = [" ".join(w[: len(w) // 2]) for w in words]
    return first, [" ".join(w[len(w) // 2 :]) for w in words]


def _halves(context: TextContext, texts: list[str]) -> tuple[Tensor, Tensor]:
    first, second = halves(texts)
    encoded: Any = context.tokenizer(
        first + second,
        truncation=True,
        max_length=context.settings.dataset.max_length,
        padding=True,
        return_tensors="pt",
    )
    return encoded["input_ids"].to(context.device), encoded["attention_mask"].to(context.device)


def _ranks(similarity: Similarity) -> Tensor:
    """Return the rank of each cosine, (n · n,).

    `argsort` returns the places in order of rank, and the second `argsort` inverts this. For
    cosines 0.9, 0.2, 0.4 the first gives 1, 2, 0 and the second gives the ranks 2, 0, 1.
    """
    return similarity.cosines.flatten().argsort().argsort().double()
