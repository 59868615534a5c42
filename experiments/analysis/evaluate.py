"""Evaluation: one batched pass for the logits, and everything that is counted from them."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .confusion import accuracy, old_and_new, wrong_counts


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the model's logits of all inputs, (n, classes), from one pass in evaluation mode.

    The model is left in the mode, training or evaluation, that it was in.
    """
    training = model.training
    model.eval()
    try:
        return model(inputs)
    finally:
        model.train(training)


def score(logits: Tensor, labels: Tensor, tuned: Collection[int] = ()) -> dict[str, Any]:
    """Return what a row says of an evaluation, as plain numbers and lists.

    Args:
        logits: (n, classes).
        labels: int64 (n,), 0 to classes - 1.
        tuned: the classes that count as tuned; all others are "other".

    Returns:
        `n`, `accuracy`, `tuned_accuracy` and `other_accuracy` (fractions; the two are left out
        where one has no examples), `loss` (mean cross-entropy, nats), `wrong_counts` (by class) and
        `confusion` (a row a class, of counts by answer).
    """
    return scores(logits.unsqueeze(0), labels, tuned)[0]


def scores(logits: Tensor, labels: Tensor, tuned: Collection[int] = ()) -> list[dict[str, Any]]:
    """Return what `score` says of each of several evaluations at once, logits: (k, n, classes)."""
    count, n, classes = logits.shape
    # One count for all: every evaluation has classes² bins of its own.
    bins = torch.arange(count, device=labels.device).unsqueeze(1) * classes**2
    pairs = bins + labels * classes + logits.argmax(2)
    confusions = torch.bincount(pairs.flatten(), minlength=count * classes**2)
    right = logits.gather(2, labels.expand(count, n).unsqueeze(2)).squeeze(2)
    losses = (logits.logsumexp(2) - right).mean(1)  # F.cross_entropy's mean, in a third of its time
    return [
        _row(confusion, loss, tuned)
        for confusion, loss in zip(
            confusions.view(count, classes, classes).tolist(), losses.tolist(), strict=True
        )
    ]


def _row(confusion: list[list[int]], loss: float, tuned: Collection[int]) -> dict[str, Any]:
    sizes = [sum(counts) for counts in confusion]
    row = {
        "n": sum(sizes),
        "accuracy": accuracy(confusion),
        "loss": loss,
        "wrong_counts": wrong_counts(confusion),
        "confusion": confusion,
    }
    if 0 < sum(sizes[label] for label in tuned) < sum(sizes):
        row["other_accuracy"], row["tuned_accuracy"] = old_and_new(confusion, tuned)
    return row
