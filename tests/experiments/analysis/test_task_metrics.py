"""Metrics of an accuracy matrix: cases worked out by hand, and published definitions."""

import numpy as np
import pytest

from experiments.analysis.task_metrics import (
    all_metrics,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    hypervolume,
    learning_accuracy,
    min_accuracy,
    pareto_front,
    stability_gap,
    worst_case_accuracy,
)
from experiments.harness.settings import StudyError

# Three tasks; b = (0.1, 0.2, 0.3) before any.
MATRIX = [[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.5, 0.85, 0.6]]
BEFORE = [0.1, 0.2, 0.3]


def test_a_case_by_hand():
    """The metrics of a matrix of three tasks are those worked out by hand."""
    assert average_accuracy(MATRIX) == pytest.approx((0.5 + 0.85 + 0.6) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.9) + (0.85 - 0.8)) / 2)
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.85)) / 2)
    assert learning_accuracy(MATRIX) == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert forward_transfer(MATRIX, BEFORE) == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)
    assert all_metrics(MATRIX, BEFORE) == {
        "ACC": average_accuracy(MATRIX),
        "LA": learning_accuracy(MATRIX),
        "BWT": backward_transfer(MATRIX),
        "forgetting": forgetting(MATRIX),
        "FWT": forward_transfer(MATRIX, BEFORE),
    }


def test_forgetting_is_from_the_best_and_bwt_from_the_first():
    """Forgetting starts at a task's highest accuracy, BWT at the accuracy after its own stage."""
    matrix = [[0.5, 0.0, 0.0], [0.9, 0.7, 0.0], [0.6, 0.7, 0.8]]
    assert backward_transfer(matrix) == pytest.approx(((0.6 - 0.5) + 0) / 2)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.6) + 0) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_transfer_is_as_its_authors_code_computes_it(seed):
    """ACC, BWT and FWT are those of GEM's published code.

    That code averages over all T tasks, one of which always adds 0. Its paper divides by T - 1.
    """
    tasks = 5
    rounds = np.random.default_rng(seed).random((tasks + 1, tasks))  # row 0: before any stage
    matrix, last = rounds[1:], rounds[-1]
    backward = (last - np.diag(matrix)).mean()
    forward = np.append(0.0, np.diag(matrix, 1) - rounds[0, 1:]).mean()
    share = tasks / (tasks - 1)
    assert average_accuracy(matrix.tolist()) == pytest.approx(last.mean())
    assert backward_transfer(matrix.tolist()) == pytest.approx(backward * share)
    assert forward_transfer(matrix.tolist(), rounds[0].tolist()) == pytest.approx(forward * share)


def test_the_stability_gap_counts_evaluations_between_stages():
    """A fall to 0.2 during a later stage counts, although the last accuracy is 0.88 again."""
    curve = [0.9, 0.2, 0.5, 0.88]
    assert min_accuracy([curve]) == 0.2
    assert worst_case_accuracy(0.9, [curve]) == pytest.approx(0.45 + 0.5 * 0.2)
    assert stability_gap(curve) == pytest.approx(0.68)
    assert stability_gap([0.9, 0.9]) == 0
    assert worst_case_accuracy(0.7, []) == 0.7


def test_a_point_is_on_the_front_if_no_other_beats_it():
    """Of random points, those on the front are the ones that no other point beats."""
    points = [tuple(pair) for pair in np.random.default_rng(0).random((60, 2)).tolist()]
    kept = pareto_front(points)
    assert kept == sorted(kept)
    for x, y in points:
        beaten = any(u >= x and v >= y and (u, v) != (x, y) for u, v in points)
        assert ((x, y) in kept) is not beaten


def test_the_hypervolume_is_a_share_of_a_grid():
    """The hypervolume is the share of a fine grid that some point dominates."""
    points = [tuple(pair) for pair in np.random.default_rng(1).random((12, 2)).tolist()]
    grid = (np.arange(500) + 0.5) / 500
    x, y = np.meshgrid(grid, grid)
    covered = np.zeros_like(x, dtype=bool)
    for u, v in points:
        covered |= (x <= u) & (y <= v)
    assert hypervolume(points) == pytest.approx(covered.mean(), abs=2e-3)
    assert hypervolume(points, (1.0, 1.0)) == 0


@pytest.mark.parametrize("matrix", [[], [[0.5, 0.5]], [[0.5], [0.5]]])
def test_a_matrix_of_wrong_shape_raises(matrix):
    """A matrix that is not square, or has too few stages, raises and names the size found."""
    rows = len(matrix)
    with pytest.raises(StudyError, match=f"needs one row per stage .*; got {rows} rows of"):
        backward_transfer(matrix)
