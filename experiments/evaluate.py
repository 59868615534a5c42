"""Evaluation: one batched pass for the logits, and everything that is counted from them."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forgetting import accuracy, old_and_new, wrong_counts


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
    classes = logits.shape[1]
    pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    confusion = pairs.view(classes, classes).tolist()
    row = {
        "n": len(labels),
        "accuracy": accuracy(confusion),
        "loss": float(F.cross_entropy(logits, labels)),
        "wrong_counts": wrong_counts(confusion),
        "confusion": confusion,
    }
    sizes = [sum(counts) for counts in confusion]
    if 0 < sum(sizes[label] for label in tuned) < len(labels):
        row["other_accuracy"], row["tuned_accuracy"] = old_and_new(confusion, tuned)
    return row
