"""Figures show the values that they are given; the example on a ResNet-18 runs."""

from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import paramlora as pl
from experiments.analysis.geometry import Geometry
from experiments.analysis.insight import Flips, Predictions, TradeOff, flips, shapley
from experiments.examples import own_model
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


@pytest.fixture
def small_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the example's network by a small one of the same kind, so that it takes seconds."""
    from torchvision.models import resnet

    def small(weights: Path | None = None) -> nn.Module:
        made = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
        return made.eval()

    monkeypatch.setattr(own_model, "resnet", small)


@pytest.mark.usefixtures("small_resnet")
def test_the_example_writes_a_page_on_a_convolutional_network(tmp_path, monkeypatch):
    """The page on adapters of convolutions has figures, updates and explorer."""
    seen = []
    plain = own_model.report

    def report(path, model, *rest):
        seen.append(model)
        return plain(path, model, *rest)

    monkeypatch.setattr(own_model, "report", report)
    path = own_model.run(tmp_path, base_steps=2, steps=3, images=64)
    text = path.read_text()
    assert 'id="explorer"' in text
    assert "layer3.0.conv2.weight" in text
    assert text.count("<figure>") >= 1
    sites = {row.site for row in pl.summary(seen[0]).sites}
    assert sites == {f"layer{n}.0.conv{c}.weight" for n in (2, 3) for c in (1, 2)}


def test_the_examples_network_is_torchvisions_resnet18(tmp_path):
    """The network is ResNet-18 with ten outputs; given weights are loaded bit for bit."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = own_model.resnet()
    assert sum(p.numel() for p in model.parameters()) == 11_181_642
    path = tmp_path / "w.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    again = own_model.resnet(path)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
