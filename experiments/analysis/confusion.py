"""What was learned and what was forgotten, from confusion matrices alone.

A confusion matrix is a list of rows: `confusion[digit][answer]` counts the test images of `digit`
that got `answer`. The tuned digits are the new task; the other digits stand for the old one.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

Confusion = Sequence[Sequence[int]]


class Change(NamedTuple):
    """By how much accuracy changed, in fractions: gained on the new task, lost on the old."""

    learned: float
    forgotten: float


def wrong_counts(confusion: Confusion) -> list[int]:
    """Return how many images of each digit got a wrong answer.

    >>> wrong_counts([[8, 2], [1, 9]])
    [2, 1]
    """
    return [sum(row) - row[digit] for digit, row in enumerate(confusion)]


def accuracy(confusion: Confusion, digits: Collection[int] | None = None) -> float:
    """Return the fraction of right answers to the images of `digits`, of all where none is given.

    >>> accuracy([[8, 2], [1, 9]]), accuracy([[8, 2], [1, 9]], [1])
    (0.85, 0.9)
    """
    chosen = range(len(confusion)) if digits is None else digits
    images = sum(sum(confusion[digit]) for digit in chosen)
    return sum(confusion[digit][digit] for digit in chosen) / images


def old_and_new(confusion: Confusion, tuned: Collection[int]) -> tuple[float, float]:
    """Return the accuracy on the other digits (the old task) and on the tuned ones (the new)."""
    others = [digit for digit in range(len(confusion)) if digit not in tuned]
    return accuracy(confusion, others), accuracy(confusion, tuned)


def change(before: Confusion, after: Confusion, tuned: Collection[int]) -> Change:
    """Return what fine-tuning on `tuned` gained there, and lost on all other digits.

    >>> change([[8, 2], [1, 9]], [[6, 4], [0, 10]], [1])
    Change(learned=0.1, forgotten=0.2)
    """
    (old_before, new_before), (old, new) = old_and_new(before, tuned), old_and_new(after, tuned)
    return Change(round(new - new_before, 12), round(old_before - old, 12))
