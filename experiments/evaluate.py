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


def score(logits: Tensor, labels: Tensor, tuned: Collection[int]) -> dict[str, Any]:
    """Return what a row says of an evaluation, as plain numbers and lists.

    Args:
        logits: (n, 10).
        labels: int64 (n,), 0 to 9.
        tuned: the digits that count as tuned; all others are "other".

    Returns:
        `n`, `accuracy`, `tuned_accuracy` and `other_accuracy` (fractions), `loss` (mean
        cross-entropy, nats), `wrong_counts` (of ten) and `confusion` (10 rows, by digit, of 10
        counts, by answer).
    """
    answers = logits.argmax(1)
    confusion = torch.bincount(labels * 10 + answers, minlength=100).view(10, 10).tolist()
    other, new = old_and_new(confusion, tuned)
    return {
        "n": len(labels),
        "accuracy": accuracy(confusion),
        "tuned_accuracy": new,
        "other_accuracy": other,
        "loss": float(F.cross_entropy(logits, labels)),
        "wrong_counts": wrong_counts(confusion),
        "confusion": confusion,
    }
