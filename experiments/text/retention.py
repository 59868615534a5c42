"""How much a fine-tuned model keeps of its use on other texts, and joint training on both.

`--retention spam` names a second, labelled data set that the fine-tuning does not see. Before it, a
linear probe is fitted to the checkpoint's embeddings of the second training texts: a logistic
regression on the mean of the last hidden states, normalised. After the fine-tuning, on the second
test texts:

    probe        balanced accuracy of that probe, unchanged
    refit        balanced accuracy of a probe fitted again, to the new embeddings
    retrieval    share of first halves of texts whose nearest second half is of the same text
    agreement    Spearman's rank correlation of the cosines of halves with the checkpoint's cosines

The probe falls if the embeddings move, even if they only rotate. The refit falls only if they lose
what tells the labels apart. Retrieval and agreement do not use labels and do not change under a
rotation (forgetting.py).

The joint methods train on both data sets at once: each step adds the loss of the unchanged probe on
a batch of the second training texts. They show what can be learned and kept together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.rundir import Row
from ..harness.settings import StudyError, replace
from .context import EVALUATION_FACTOR, TextContext
from .data import load_corpus
from .forgetting import Similarity, similarity
from .models import backbone_of, mean_pooled
from .tokens import Tokens, tokenized

C = 1.0  # inverse strength of the probe's L2 penalty


@dataclass(frozen=True)
class Probe:
    """A logistic regression on embeddings of norm 1: weight (labels, width), bias (labels,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits, (n, labels), of embeddings (n, width)."""
        return F.linear(embeddings, self.weight, self.bias)

    def balanced_accuracy(self, embeddings: Tensor, labels: Tensor) -> float:
        """Return the mean over the labels of the accuracy on the texts of a label."""
        right = self.logits(embeddings).argmax(1) == labels
        return float(
            torch.stack([right[labels == k].float().mean() for k in labels.unique()]).mean()
        )


def fit_probe(embeddings: Tensor, labels: Tensor) -> Probe:
    """Fit a probe in which each label has the same weight."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=C, class_weight="balanced", max_iter=1000)
    fitted.fit(embeddings.double().cpu().numpy(), labels.cpu().numpy())
    weight, bias = (
        torch.tensor(part, dtype=torch.float32) for part in (fitted.coef_, fitted.intercept_)
    )
    if len(weight) == 1:  # two labels: one row of logits of the second against the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Probe(weight.to(embeddings.device), bias.to(embeddings.device))


@dataclass(frozen=True)
class Retention:
    """The second data set with the checkpoint's probe and similarities."""

    train: Tokens
    test: Tokens
    texts: list[str]
    probe: Probe
    base: Similarity
    base_probe: float
    size: int

    def embeddings(self, model: nn.Module, tokens: Tokens) -> Tensor:
        """Return the embeddings of texts, float32 (n, width) of norm 1, without autocast."""
        return embeddings(model, tokens, self.size)

    def loss(self, batch: int, seed: int) -> Callable[[nn.Module], Tensor]:
        """Return a function that gives the probe's loss on the next batch of training texts."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.train)

        def next_loss(model: nn.Module) -> Tensor:
            rows = torch.randint(count, (batch,), generator=generator)
            ids, mask, labels = self.train.batch(rows)
            found = mean_pooled(backbone_of(model), ids, mask).float()
            return F.cross_entropy(self.probe.logits(F.normalize(found, dim=-1)), labels)

        return next_loss


def embeddings(model: nn.Module, tokens: Tokens, size: int) -> Tensor:
    """Return the embeddings of all texts, float32 (n, width) of norm 1, `size` texts at a time."""
    backbone, training = backbone_of(model), model.training
    order = tokens.lengths.argsort(stable=True)
    model.eval()
    with torch.no_grad():
        parts = [mean_pooled(backbone, *tokens.batch(rows)[:2]) for rows in order.split(size)]
    model.train(training)
    found = torch.empty_like(torch.cat(parts))
    found[order.to(found.device)] = torch.cat(parts)
    return F.normalize(found.float(), dim=-1)


def kept(context: TextContext, model: nn.Module) -> Row:
    """Return the keys of a row about the second data set; none without `--retention`."""
    if not context.settings.retention:
        return {}
    second = retention_of(context)
    train, test = (second.embeddings(model, part) for part in (second.train, second.test))
    now = similarity(context, model, second.texts)
    return {
        "kept_probe": second.probe.balanced_accuracy(test, second.test.labels),
        "kept_refit": fit_probe(train, second.train.labels).balanced_accuracy(
            test, second.test.labels
        ),
        "kept_retrieval": now.retrieval,
        "kept_agreement": now.agreement(second.base),
        "base_probe": second.base_probe,
        "base_retrieval": second.base.retrieval,
    }


def retention_of(context: TextContext) -> Retention:
    """Return the second data set of a run, with the probe on its checkpoint.

    Raises:
        StudyError: several processes train together.
    """
    if context.group.size > 1:
        raise StudyError("--retention needs one process: start the study without torchrun")
    return _retention(_Key(context))


class _Key:
    """A context that equals each other one with the same checkpoint and second data set.

    The probe of a checkpoint is the same in all runs of a sweep, and takes seconds.
    """

    def __init__(self, context: TextContext) -> None:
        settings, data = context.settings, context.settings.dataset
        self.context = context
        self.parts: tuple[Any, ...] = (
            settings.model, settings.retention, data, context.device, settings.finetuning.batch
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


@lru_cache(maxsize=1)
def _retention(key: _Key) -> Retention:
    context = key.context
    corpus = load_corpus(replace(context.settings, data=context.settings.retention).dataset)

    def cache_path(digest: str) -> Path:
        return Path(context.settings.place.tokens) / f"{digest}.safetensors"

    length = context.settings.dataset.max_length
    train, test = (
        tokenized(corpus, split, context.tokenizer, length, cache_path).to(context.device)
        for split in ("train", "test")
    )
    size, model = EVALUATION_FACTOR * context.settings.finetuning.batch, context.model(0)
    probe = fit_probe(embeddings(model, train, size), train.labels)
    texts = [text for text, _ in corpus.splits["test"]]
    there = probe.balanced_accuracy(embeddings(model, test, size), test.labels)
    return Retention(train, test, texts, probe, similarity(context, model, texts), there, size)
