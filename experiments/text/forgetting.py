"""How much a fine-tuning forgets of the checkpoint's ability to place texts by meaning.

No other data set is needed: each of COUNT test texts is cut into two halves, and each half is
embedded (the mean of the backbone's last hidden states over its tokens, normalised).

    retrieval    share of first halves whose nearest second half is their own text's
    agreement    Spearman's rank correlation of all cosines between first and second halves
                 with those that the checkpoint gives

Both are proxies: retrieving halves is not a benchmark of sentence similarity.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import EVALUATED, TextContext
from .models import backbone_of

COUNT = 1000
WORDS = 8  # shorter texts are not cut into halves


@dataclass(frozen=True)
class Similarity:
    """The embeddings of the halves, float32 (2, n, width), each of length 1."""

    embeddings: Tensor

    @property
    def cosines(self) -> Tensor:
        """The cosines between first and second halves, (n, n)."""
        return self.embeddings[0] @ self.embeddings[1].T

    @property
    def retrieval(self) -> float:
        nearest = self.cosines.argmax(1)
        own = torch.arange(len(nearest), device=nearest.device)
        return float((nearest == own).float().mean())

    def agreement(self, other: "Similarity") -> float:
        """Return Spearman's rank correlation of the cosines with another's."""
        return float(torch.corrcoef(torch.stack([_ranks(self), _ranks(other)]))[0, 1])


def similarity(context: TextContext, model: nn.Module) -> Similarity:
    """Return the similarities of the halves of the test texts, by the backbone, in float32.

    Every process computes all of them.
    """
    ids, mask = _halves(context)
    backbone, training = backbone_of(model), model.training
    model.eval()
    size, found = EVALUATED * context.settings.finetuning.batch, []
    with torch.no_grad():
        for i, m in zip(ids.split(size), mask.split(size), strict=True):
            hidden = backbone(input_ids=i, attention_mask=m).last_hidden_state
            found.append((hidden * m[..., None]).sum(1) / m.sum(1, keepdim=True))
    model.train(training)
    return Similarity(F.normalize(torch.cat(found).float(), dim=-1).unflatten(0, (2, -1)))


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the first and the second halves of the texts that are long enough, COUNT at most.

    >>> halves(["a b c d e f g h", "too short"])
    (['a b c d'], ['e f g h'])
    """
    words = [split for text in texts if len(split := text.split()) >= WORDS][:COUNT]
    first = [" ".join(w[: len(w) // 2]) for w in words]
    return first, [" ".join(w[len(w) // 2 :]) for w in words]


def _halves(context: TextContext) -> tuple[Tensor, Tensor]:
    first, second = halves([text for text, _ in context.corpus.splits["test"]])
    encoded: Any = context.tokenizer(
        first + second,
        truncation=True,
        max_length=context.settings.dataset.max_length,
        padding=True,
        return_tensors="pt",
    )
    return encoded["input_ids"].to(context.device), encoded["attention_mask"].to(context.device)


def _ranks(of: Similarity) -> Tensor:
    return of.cosines.flatten().argsort().argsort().double()
