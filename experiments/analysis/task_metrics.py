"""What a learner of several tasks kept, from its accuracy matrix alone, by the field's definitions.

    a(i, j): accuracy on task j after stage i, fractions; i, j = 1 … T; b(j): before any stage

    ACC          mean_j a(T, j)
    BWT          mean_{j<T} a(T, j) - a(j, j)                          Lopez-Paz and Ranzato 2017
    forgetting   mean_{j<T} max_{l<T} a(l, j) - a(T, j)                Chaudhry et al. 2018
    LA           mean_j a(j, j)                                        Riemer et al. 2019
    FWT          mean_{j>1} a(j-1, j) - b(j)                           Lopez-Paz and Ranzato 2017
    min-ACC      mean_{j<T} min over evaluations after stage j of a(·, j)   De Lange et al. 2023
    WC-ACC       a(T, T)/T + (1 - 1/T) min-ACC, at the end             De Lange et al. 2023

arXiv 1706.08840 (GEM), 1801.10112 (Riemannian walk), 1810.11910 (MER), 2205.13452 (stability gap).
Each takes a matrix as rows, one a stage; tasks are columns, learned in their order.
"""

from collections.abc import Sequence
from statistics import mean

from ..harness.settings import StudyError
from .confusion import Confusion

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Return ACC: mean accuracy over all tasks after the last stage.

    >>> average_accuracy([[0.9, 0.1], [0.7, 0.8]])
    0.75
    """
    return mean(_square(matrix)[-1])


def backward_transfer(matrix: Matrix) -> float:
    """Return BWT: by how much earlier tasks are better at the end than when they were learned.

    >>> round(backward_transfer([[0.9, 0.1], [0.7, 0.8]]), 6)
    -0.2
    """
    rows = _square(matrix, 2)
    return mean(rows[-1][j] - rows[j][j] for j in range(len(rows) - 1))


def forgetting(matrix: Matrix) -> float:
    """Return forgetting: from the best that an earlier task ever was, before the last stage.

    >>> round(forgetting([[0.9, 0.1, 0.0], [0.95, 0.8, 0.2], [0.7, 0.6, 0.8]]), 6)
    0.225
    """
    rows = _square(matrix, 2)
    last = len(rows) - 1
    return mean(max(row[j] for row in rows[:last]) - rows[last][j] for j in range(last))


def learning_accuracy(matrix: Matrix) -> float:
    """Return LA: mean accuracy on each task right after it was learned.

    >>> round(learning_accuracy([[0.9, 0.1], [0.7, 0.8]]), 6)
    0.85
    """
    rows = _square(matrix)
    return mean(rows[j][j] for j in range(len(rows)))


def forward_transfer(matrix: Matrix, before: Sequence[float]) -> float:
    """Return FWT: by how much a task is better than at first, just before it is learned.

    Args:
        matrix: a(i, j).
        before: b(j), the accuracy on each task before any stage.

    >>> forward_transfer([[0.9, 0.3], [0.7, 0.8]], [0.1, 0.1])
    0.2
    """
    rows = _square(matrix, 2)
    if len(before) != len(rows):
        raise StudyError(f"{len(rows)} tasks, but accuracies before of {len(before)}")
    return round(mean(rows[j - 1][j] - before[j] for j in range(1, len(rows))), 12)


def min_accuracy(curves: Sequence[Sequence[float]]) -> float:
    """Return min-ACC: the mean over tasks of the lowest accuracy since each was learned.

    Args:
        curves: one an earlier task: its accuracy at every evaluation after its own stage ended,
            those on the way through later stages included, which is where the gap shows.

    >>> round(min_accuracy([[0.9, 0.2, 0.8], [0.7, 0.6]]), 6)
    0.4
    """
    return mean(min(curve) for curve in curves)


def worst_case_accuracy(current: float, curves: Sequence[Sequence[float]]) -> float:
    """Return WC-ACC: accuracy on the task just learned and min-ACC of the k - 1 before it, weighed.

    >>> round(worst_case_accuracy(0.9, [[0.9, 0.2, 0.8], [0.7, 0.6]]), 6)
    0.566667
    """
    tasks = len(curves) + 1
    return current / tasks + (1 - 1 / tasks) * (min_accuracy(curves) if curves else 0.0)


def stability_gap(curve: Sequence[float]) -> float:
    """Return how far an earlier task's accuracy falls on the way, below where it ends up.

    >>> round(stability_gap([0.9, 0.2, 0.8]), 6)
    0.6
    """
    return curve[-1] - min(curve)


def recalls(confusion: Confusion) -> list[float]:
    """Return the accuracy of each class: a row of a matrix whose tasks are the classes.

    >>> recalls([[8, 2], [1, 9]])
    [0.8, 0.9]
    """
    return [row[label] / sum(row) for label, row in enumerate(confusion)]


def all_metrics(matrix: Matrix, before: Sequence[float] | None = None) -> dict[str, float]:
    """Return the metrics that the matrix allows, by their names at the head of this file."""
    found = {"ACC": average_accuracy(matrix), "LA": learning_accuracy(matrix)}
    if len(matrix) > 1:
        found |= {"BWT": backward_transfer(matrix), "forgetting": forgetting(matrix)}
        if before is not None:
            found["FWT"] = forward_transfer(matrix, before)
    return found


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats on both sides, in order of the first.

    Args:
        points: such as (learned, kept) for each strength λ; more is better on both sides.

    >>> front([(0.0, 1.0), (0.5, 0.9), (0.4, 0.8), (1.0, 0.2)])
    [(0.0, 1.0), (0.5, 0.9), (1.0, 0.2)]
    """
    kept, best = [], -float("inf")
    for x, y in sorted(set(points), reverse=True):
        if y > best:
            kept.append((x, y))
            best = y
    return kept[::-1]


def area(points: Sequence[tuple[float, float]], origin: tuple[float, float] = (0.0, 0.0)) -> float:
    """Return the area that the points dominate above `origin`: the front's hypervolume.

    Source: Zitzler and Thiele 1998, "Multiobjective optimization using evolutionary algorithms".

    >>> round(area([(0.5, 0.9), (1.0, 0.2)]), 6)
    0.55
    """
    total, left = 0.0, origin[0]
    for x, y in front(points):
        if x > left and y > origin[1]:
            total += (x - left) * (y - origin[1])
            left = x
    return total


def _square(matrix: Matrix, least: int = 1) -> Matrix:
    """Check that there are as many stages as tasks, and return the matrix."""
    sizes = {len(row) for row in matrix}
    if sizes != {len(matrix)} or len(matrix) < least:
        raise StudyError(
            f"an accuracy matrix has a row a stage and as many tasks, {least} at least; got "
            f"{len(matrix)} rows of {' and '.join(map(str, sorted(sizes))) or 'no'} columns"
        )
    return matrix
