"""Evaluation of a classifier: the logits in one pass, and the figures that a row records."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .confusion import accuracy, old_and_new, wrong_counts


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the model's logits for all inputs, (n, classes), from one pass in evaluation mode.

    Afterwards the model is in the mode (training or evaluation) that it was in before.
    """
    training = model.training
    model.eval()
    try:
        return model(inputs)
    finally:
        model.train(training)


def score(logits: Tensor, labels: Tensor, tuned: Collection[int] = ()) -> dict[str, Any]:
    """Return the figures of one evaluation, as plain numbers and lists for a row.

    Args:
        logits: (n, classes).
        labels: int64 (n,), 0 to classes - 1.
        tuned: the classes that count as tuned; all others count as "other".

    Returns:
        `n`, `accuracy`, `tuned_accuracy` and `other_accuracy` (fractions; the last two are absent
        if one of them has no examples), `loss` (mean cross-entropy, nats), `wrong_counts` (by
        class) and `confusion` (one row per class, counts by answer).
    """
    return scores(logits.unsqueeze(0), labels, tuned)[0]


def scores(logits: Tensor, labels: Tensor, tuned: Collection[int] = ()) -> list[dict[str, Any]]:
    """Return what `score` returns, for k evaluations at once. `logits`: (k, n, classes)."""
    k, n, classes = logits.shape
    confusions = confusion_counts(logits.argmax(2), labels, classes)  # (k, classes, classes)
    # Cross-entropy of one image is logsumexp(z) - z[label]. This form takes a third of
    # the time of F.cross_entropy.
    label_logits = logits.gather(2, labels.expand(k, n).unsqueeze(2)).squeeze(2)  # (k, n)
    losses = (logits.logsumexp(2) - label_logits).mean(1)  # (k,)
    return [
        _row(confusion, loss, tuned)
        for confusion, loss in zip(confusions.tolist(), losses.tolist(), strict=True)
    ]


def confusion_counts(answers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the confusion matrices of k evaluations, int64 (k, classes, classes).

    Args:
        answers: predicted classes, int64 (k, n).
        labels: true classes, int64 (n,), the same for all evaluations.
        classes: number of classes.

    >>> confusion_counts(torch.tensor([[0, 1, 1]]), torch.tensor([0, 0, 1]), 2)
    tensor([[[1, 1],
             [0, 1]]])
    """
    k = len(answers)
    # One bincount serves all k evaluations, because each has its own classes² bins. Example with
    # ten classes: label 3 answered as 5 in evaluation 2 falls into bin 2·100 + 3·10 + 5 = 235.
    first_bin = torch.arange(k, device=labels.device).unsqueeze(1) * classes**2  # (k, 1)
    bins = first_bin + labels * classes + answers  # (k, n)
    counts = torch.bincount(bins.flatten(), minlength=k * classes**2)
    return counts.view(k, classes, classes)


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
