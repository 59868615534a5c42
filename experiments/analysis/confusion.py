"""Accuracy, learning and forgetting, computed from confusion matrices alone.

A confusion matrix is a list of rows: `confusion[label][answer]` counts the test images of the digit
`label` that got `answer`. The tuned digits are the new task. All other digits are the old task.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

Confusion = Sequence[Sequence[int]]


class Change(NamedTuple):
    """Change of accuracy, in fractions: gained on the new task, lost on the old task."""

    learned: float
    forgotten: float


def wrong_counts(confusion: Confusion) -> list[int]:
    """Return the number of wrong answers for each digit.

    >>> wrong_counts([[8, 2], [1, 9]])
    [2, 1]
    """
    return [sum(row) - row[label] for label, row in enumerate(confusion)]


def accuracy(confusion: Confusion, digits: Collection[int] | None = None) -> float:
    """Return the fraction of correct answers on the images of `digits` (default: all digits).

    >>> accuracy([[8, 2], [1, 9]]), accuracy([[8, 2], [1, 9]], [1])
    (0.85, 0.9)
    """
    chosen = range(len(confusion)) if digits is None else digits
    images = sum(sum(confusion[digit]) for digit in chosen)
    return sum(confusion[digit][digit] for digit in chosen) / images


def old_and_new(confusion: Confusion, tuned: Collection[int]) -> tuple[float, float]:
    """Return the accuracy on the old task (all other digits) and on the new one (`tuned`)."""
    others = [digit for digit in range(len(confusion)) if digit not in tuned]
    return accuracy(confusion, others), accuracy(confusion, tuned)


def change(before: Confusion, after: Confusion, tuned: Collection[int]) -> Change:
    """Return the accuracy gained on the digits in `tuned` and lost on the others by fine-tuning.

    >>> change([[8, 2], [1, 9]], [[6, 4], [0, 10]], [1])
    Change(learned=0.1, forgotten=0.2)
    """
    (old_before, new_before), (old, new) = old_and_new(before, tuned), old_and_new(after, tuned)
    # Rounded so that 1.0 - 0.9 is 0.1 and not 0.09999999999999998.
    return Change(round(new - new_before, 12), round(old_before - old, 12))
