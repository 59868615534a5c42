"""Metrics of learning a sequence of tasks, computed from the accuracy matrix alone.

a(i, j) is the accuracy on task j after training stage i, a fraction; stages and tasks are counted
from 1 to T. b(j) is the accuracy on task j before any training.

| metric     | definition                                                    | source |
| ---------- | ------------------------------------------------------------- | ------ |
| ACC        | mean over j of a(T, j)                                        | [1]    |
| BWT        | mean over j < T of a(T, j) - a(j, j), backward transfer       | [1]    |
| FWT        | mean over j > 1 of a(j-1, j) - b(j), forward transfer         | [1]    |
| forgetting | mean over j < T of max over l < T of a(l, j) - a(T, j)        | [2]    |
| LA         | mean over j of a(j, j), learning accuracy                     | [3]    |
| min-ACC    | mean over j < T of the lowest accuracy on j after stage j     | [4]    |
| WC-ACC     | a(T, T) / T + (1 - 1/T) · min-ACC, worst-case accuracy        | [4]    |

[1] Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory", arXiv 1706.08840
[2] Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", arXiv 1801.10112
[3] Riemer et al. 2019, "Learning to Learn without Forgetting", arXiv 1810.11910
[4] De Lange et al. 2023, "Continual evaluation for lifelong learning", arXiv 2205.13452

The functions take the matrix as a list of rows, one per stage; the columns are the tasks in the
order in which they are learned. Example with T = 2:

    [[0.9, 0.1],     after stage 1: task 1 was learned, task 2 not yet
     [0.7, 0.8]]     after stage 2: task 1 fell by 0.2, so BWT is -0.2 and forgetting 0.2
"""

from collections.abc import Sequence
from statistics import mean

from ..harness.settings import StudyError

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Return ACC: the mean accuracy over all tasks after the last stage.

    >>> average_accuracy([[0.9, 0.1], [0.7, 0.8]])
    0.75
    """
    return mean(_checked(matrix)[-1])


def backward_transfer(matrix: Matrix) -> float:
    """Return BWT: the mean change of earlier tasks since their own stage; negative if they fell.

    >>> round(backward_transfer([[0.9, 0.1], [0.7, 0.8]]), 6)
    -0.2
    """
    rows = _checked(matrix, 2)
    return mean(rows[-1][j] - rows[j][j] for j in range(len(rows) - 1))


def forgetting(matrix: Matrix) -> float:
    """Return forgetting: the mean fall of earlier tasks from their best stage before the last.

    In the example task 1 falls from 0.95 (after stage 2, not its own) to 0.7, and task 2 from 0.8
    to 0.6.

    >>> round(forgetting([[0.9, 0.1, 0.0], [0.95, 0.8, 0.2], [0.7, 0.6, 0.8]]), 6)
    0.225
    """
    rows = _checked(matrix, 2)
    last = len(rows) - 1
    return mean(max(row[j] for row in rows[:last]) - rows[last][j] for j in range(last))


def learning_accuracy(matrix: Matrix) -> float:
    """Return LA: the mean accuracy on each task right after its own stage.

    >>> round(learning_accuracy([[0.9, 0.1], [0.7, 0.8]]), 6)
    0.85
    """
    rows = _checked(matrix)
    return mean(rows[j][j] for j in range(len(rows)))


def forward_transfer(matrix: Matrix, before: Sequence[float]) -> float:
    """Return FWT: the mean gain on each task from the stages before its own.

    Args:
        matrix: a(i, j).
        before: b(j), the accuracy on each task before any stage.

    >>> forward_transfer([[0.9, 0.3], [0.7, 0.8]], [0.1, 0.1])
    0.2
    """
    rows = _checked(matrix, 2)
    if len(before) != len(rows):
        raise StudyError(f"{len(rows)} tasks, but {len(before)} accuracies in before=")
    return round(mean(rows[j - 1][j] - before[j] for j in range(1, len(rows))), 12)


def min_accuracy(curves: Sequence[Sequence[float]]) -> float:
    """Return min-ACC: the mean over earlier tasks of each task's lowest accuracy.

    Args:
        curves: one per earlier task, its accuracy at every evaluation since its own stage ended.
            Evaluations during later stages count. The accuracy matrix does not have them, and the
            lowest accuracy is usually among them.

    >>> round(min_accuracy([[0.9, 0.2, 0.8], [0.7, 0.6]]), 6)
    0.4
    """
    return mean(min(curve) for curve in curves)


def worst_case_accuracy(current: float, curves: Sequence[Sequence[float]]) -> float:
    """Return WC-ACC: the mean of `current` and min-ACC, weighted by their number of tasks.

    Args:
        current: accuracy on the task of the last stage.
        curves: one per earlier task, as for `min_accuracy`.

    In the example there are three tasks: 0.9 / 3 + 2/3 · 0.4.

    >>> round(worst_case_accuracy(0.9, [[0.9, 0.2, 0.8], [0.7, 0.6]]), 6)
    0.566667
    """
    tasks = len(curves) + 1
    return current / tasks + (1 - 1 / tasks) * (min_accuracy(curves) if curves else 0.0)


def stability_gap(curve: Sequence[float]) -> float:
    """Return how far an earlier task's accuracy falls below its final value during later stages.

    >>> round(stability_gap([0.9, 0.2, 0.8]), 6)
    0.6
    """
    return curve[-1] - min(curve)


def all_metrics(matrix: Matrix, before: Sequence[float] | None = None) -> dict[str, float]:
    """Return ACC and LA; from two stages BWT and forgetting; with `before` FWT as well."""
    metrics = {"ACC": average_accuracy(matrix), "LA": learning_accuracy(matrix)}
    if len(matrix) > 1:
        metrics |= {"BWT": backward_transfer(matrix), "forgetting": forgetting(matrix)}
        if before is not None:
            metrics["FWT"] = forward_transfer(matrix, before)
    return metrics


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats on both axes, by ascending first coordinate.

    Args:
        points: for example (learned, kept) at each strength λ. Higher is better on both axes.

    >>> pareto_front([(0.0, 1.0), (0.5, 0.9), (0.4, 0.8), (1.0, 0.2)])
    [(0.0, 1.0), (0.5, 0.9), (1.0, 0.2)]
    """
    # From the largest x to the smallest, every point seen so far is at least as good in x. So a
    # point is on the front if and only if its y is higher than every y so far. Of points with the
    # same x the highest y comes first, and the others fail the test.
    front, best = [], -float("inf")
    for x, y in sorted(set(points), reverse=True):
        if y > best:
            front.append((x, y))
            best = y
    return front[::-1]


def hypervolume(
    points: Sequence[tuple[float, float]], origin: tuple[float, float] = (0.0, 0.0)
) -> float:
    """Return the area between `origin` and the points' Pareto front.

    Source: Zitzler and Thiele 1998, "Multiobjective optimization using evolutionary algorithms".

    The front of the example is a staircase of two rectangles: 0.5 · 0.9 and (1.0 - 0.5) · 0.2.

    >>> round(hypervolume([(0.5, 0.9), (1.0, 0.2)]), 6)
    0.55
    """
    total, left = 0.0, origin[0]
    for x, y in pareto_front(points):
        if x > left and y > origin[1]:
            total += (x - left) * (y - origin[1])
            left = x
    return total


def _checked(matrix: Matrix, min_stages: int = 1) -> Matrix:
    """Return the matrix after checking that it is square and has at least `min_stages` rows."""
    widths = {len(row) for row in matrix}
    if widths != {len(matrix)} or len(matrix) < min_stages:
        raise StudyError(
            f"an accuracy matrix needs one row per stage and one column per task, and at least "
            f"{min_stages} of each; got {len(matrix)} rows of "
            f"{' and '.join(map(str, sorted(widths))) or '0'} columns"
        )
    return matrix
