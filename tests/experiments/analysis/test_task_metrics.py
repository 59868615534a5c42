"""Metrics of an accuracy matrix: hand-computed cases, and a published library's definitions."""

import doctest

import numpy as np
import pytest

from experiments.analysis import task_metrics as metrics
from experiments.analysis.task_metrics import (
    all_metrics,
    area,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    front,
    learning_accuracy,
    min_accuracy,
    recalls,
    stability_gap,
    worst_case_accuracy,
)
from experiments.harness.settings import StudyError

# Three tasks; b = (0.1, 0.2, 0.3) before any.
MATRIX = [[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.5, 0.85, 0.6]]
BEFORE = [0.1, 0.2, 0.3]


def test_examples_in_docstrings_run():
    """The examples in the docstrings give what they say."""
    result = doctest.testmod(metrics)
    assert result.attempted > 10
    assert not result.failed


def test_a_case_by_hand():
    """Every metric of a matrix of three tasks, worked out by hand."""
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
    """A task that improved after its stage and then fell: forgetting counts the peak, BWT not."""
    matrix = [[0.5, 0.0, 0.0], [0.9, 0.7, 0.0], [0.6, 0.7, 0.8]]
    assert backward_transfer(matrix) == pytest.approx(((0.6 - 0.5) + 0) / 2)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.6) + 0) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_transfer_is_as_its_authors_code_computes_it(seed):
    """ACC, BWT and FWT are those of GEM's published code: last row less diagonal, and so on.

    That code takes means over all T tasks, of which one adds nothing; its paper divides by T - 1.
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


def test_the_stability_gap_shows_between_the_stages_only():
    """A task that falls to 0.2 on the way and comes back is as good in the matrix, not here."""
    way = [0.9, 0.2, 0.5, 0.88]
    assert min_accuracy([way]) == 0.2
    assert worst_case_accuracy(0.9, [way]) == pytest.approx(0.45 + 0.5 * 0.2)
    assert stability_gap(way) == pytest.approx(0.68)
    assert stability_gap([0.9, 0.9]) == 0
    assert worst_case_accuracy(0.7, []) == 0.7


def test_the_front_is_what_nothing_beats():
    """Of random points none is beaten by another of the front, and each other one is."""
    points = [tuple(pair) for pair in np.random.default_rng(0).random((60, 2)).tolist()]
    kept = front(points)
    assert kept == sorted(kept)
    for x, y in points:
        beaten = any(u >= x and v >= y and (u, v) != (x, y) for u, v in points)
        assert ((x, y) in kept) is not beaten


def test_the_area_is_what_counting_points_gives():
    """The area under the front is the share of a fine grid that some point dominates."""
    points = [tuple(pair) for pair in np.random.default_rng(1).random((12, 2)).tolist()]
    grid = (np.arange(500) + 0.5) / 500
    x, y = np.meshgrid(grid, grid)
    covered = np.zeros_like(x, dtype=bool)
    for u, v in points:
        covered |= (x <= u) & (y <= v)
    assert area(points) == pytest.approx(covered.mean(), abs=2e-3)
    assert area(points, (1.0, 1.0)) == 0


@pytest.mark.parametrize("matrix", [[], [[0.5, 0.5]], [[0.5], [0.5]]])
def test_what_is_no_matrix_of_stages_and_tasks_is_refused(matrix):
    """A matrix that is not square, or of too few stages, is refused with its size."""
    with pytest.raises(StudyError, match="an accuracy matrix has a row a stage"):
        backward_transfer(matrix)


def test_recalls_are_a_row_of_the_matrix_of_classes():
    """Per class: the share of its images that got its answer."""
    assert recalls([[3, 1, 0], [0, 2, 2], [5, 0, 5]]) == [0.75, 0.5, 0.5]
