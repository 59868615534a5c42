"""Figures show the values that they are given."""

import pytest
import torch
from matplotlib import pyplot as plt

from experiments.analysis.geometry import Geometry
from experiments.analysis.insight import Flips, Predictions, TradeOff, flips, shapley
from experiments.harness.loggers import Curve
from experiments.report.figures import (
    confusion_panels,
    contact_sheet,
    flip_bars,
    geometry_table,
    png,
    shapley_bars,
    trade_off_curve,
    training_curve,
)

CLASSES = ["a", "b", "c"]


def made() -> tuple[Predictions, Predictions, Flips]:
    """Return predictions before and after on six examples of three classes, and their flips."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    before, after = (
        Predictions(torch.eye(3)[predicted], labels)
        for predicted in ([0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 2])
    )
    return before, after, flips(before, after)


def test_a_contact_sheet_shows_each_flipped_example_with_its_predictions():
    """One row per class with flips, one image per example, titled with both predictions."""
    before, after, flipped = made()
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1).expand(6, 4, 4)
    figure = contact_sheet(flipped, images, (before, after), CLASSES, "negative", per_class=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == ["a → b", "c → b"]
    shown = [int(axes.images[0].get_array()[0, 0]) for axes in figure.axes if axes.images]
    assert shown == [1, 4]
    figure = contact_sheet(flipped, images, (before, after), CLASSES, "positive", per_class=2)
    assert [axes.get_title() for axes in figure.axes if axes.images] == ["a → b"]
    plt.close("all")


def test_bars_are_as_high_as_their_figures():
    """Positive flips go up and negative ones down; Shapley values are in accuracy points."""
    flipped = made()[2]
    _, axes = plt.subplots()
    flip_bars(axes, flipped, CLASSES)
    assert [bar.get_height() for bar in axes.patches] == [0, 1, 0, -1, 0, -1]
    _, axes = plt.subplots()
    both = frozenset({"x", "y"})
    values = shapley({frozenset(): 0.0, frozenset({"x"}): 0.1, frozenset({"y"}): 0.0, both: 0.1})
    shapley_bars(axes, {"tuned": values, "other": {"x": -0.2, "y": 0.0}})
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([10, 0, -20, 0])
    plt.close("all")


def test_curves_go_through_their_points():
    """The trade-off and the training curve are drawn in %, through each measured point."""
    _, axes = plt.subplots()
    found = TradeOff([0.0, 1.0], [(0.5, 0.9), (0.8, 0.6)], [(0.5, 0.9), (0.8, 0.6)], 0.18)
    trade_off_curve(axes, found)
    assert axes.lines[0].get_xydata().tolist() == [[50.0, 90], [80, 60]]
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    _, axes = plt.subplots()
    curve = Curve()
    for step, value in ((5, 0.5), (10, 0.75)):
        curve(step, {"loss": 9.0, "tuned": value})
    training_curve(axes, curve)
    assert axes.lines[0].get_xydata().tolist() == [[5.0, 50], [10, 75]]
    assert len(axes.lines) == 1
    plt.close("all")


def test_confusion_panels_leave_right_answers_out():
    """The panels are off, on and on − off without the diagonal; equal figures give equal bytes."""
    before, after, _ = made()
    figure = confusion_panels(before.confusion, after.confusion, CLASSES, [1])
    off, on, change = (axes.images[0].get_array() for axes in figure.axes)
    assert off.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert on.tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert change.tolist() == [[0, 1, 0], [-1, 0, 0], [0, 1, 0]]
    again = confusion_panels(before.confusion, after.confusion, CLASSES, [1])
    assert png(figure) == png(again)
    assert not plt.get_fignums()


def test_the_geometry_table_has_one_row_per_site():
    """The cells are rank, relative norm, angles and amplification."""
    table = geometry_table({"fc.weight": Geometry(2, 0.1234, (10.2, 80.0), 3.04)})
    assert table.rows == [["fc.weight", "2", "0.123", "10, 80°", "3.0"]]
