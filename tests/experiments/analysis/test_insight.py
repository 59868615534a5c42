"""The effects of adapters on small models: flips, strengths, attribution and geometry."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from experiments.analysis.geometry import Geometry, geometry
from experiments.analysis.insight import (
    Predictions,
    attribution,
    flips,
    only_at,
    predict,
    predict_off_and_on,
    shapley,
    sites_of,
    strength_curve,
    trade_off,
)
from experiments.harness.settings import StudyError
from tests.support.helpers import unchanged

CLASSES = 4


@pytest.fixture
def model() -> nn.Module:
    """A small network with two adapters that change its outputs, "b" on two of three layers."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    pl.attach(made, pl.LoRA(rank=2), name="a")
    pl.attach(made, pl.LoRA(rank=1), ["0", "5"], name="b", activate="also")
    with torch.no_grad():
        for factor in pl.parameters(made):
            factor.normal_()
    return made


@pytest.fixture
def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
        for n in (20, 20, 7)
    ]


def accuracy_on(loader, label):
    def value(model: nn.Module) -> float:
        predictions = predict(model, loader)
        return float(predictions.correct[predictions.labels == label].float().mean())

    return value


def test_predictions_off_and_on_are_the_models(model, loader):
    """Off: the base; on: the named adapters. Both run in evaluation mode and change nothing."""
    model.train()
    model[2].eval()
    with unchanged(model):
        off, on = predict_off_and_on(model, loader, "a")
    inputs = torch.cat([x for x, _ in loader])
    model.eval()
    with torch.no_grad():
        with pl.using(model):
            assert_close(off.logits, model(inputs))
        with pl.using(model, "a"):
            assert_close(on.logits, model(inputs))
    assert torch.equal(off.labels, torch.cat([y for _, y in loader]))
    pl.detach(model)
    with pytest.raises(StudyError, match="the model has no adapter"):
        predict_off_and_on(model, loader)


def test_accuracies_are_those_of_the_two_groups_of_classes(model, loader):
    """The accuracies on tuned and other classes are means over their examples."""
    predictions = predict(model, loader)
    hits = {"tuned": [], "other": []}
    for logits, label in zip(predictions.logits, predictions.labels.tolist(), strict=True):
        hits["tuned" if label in (1, 3) else "other"].append(int(logits.argmax()) == label)
    expected = {group: sum(its) / len(its) for group, its in hits.items()}
    assert predictions.accuracies([1, 3]) == pytest.approx(expected)


def test_flips_are_those_of_a_loop_over_examples(model, loader):
    """Each example is in the one list that its two predictions determine."""
    off, on = predict_off_and_on(model, loader)
    flipped = flips(off, on)
    for row, label in enumerate(off.labels.tolist()):
        before, after = (int(a.logits[row].argmax()) == label for a in (off, on))
        assert (row in flipped.positive[label]) is (after and not before)
        assert (row in flipped.negative[label]) is (before and not after)
    up, down = flipped.positive, flipped.negative
    listed = [row for side in (up, down) for rows in side.values() for row in rows]
    assert len(listed) == len(set(listed)) == int((off.correct != on.correct).sum())
    assert flipped.counts() == [(c, len(up[c]), len(down[c])) for c in range(CLASSES)]
    assert listed


def test_confusion_is_counted_per_cell(model, loader):
    """Each cell has the number of examples of its class that got its prediction."""
    predictions = predict(model, loader)
    for label, answer in itertools.product(range(CLASSES), repeat=2):
        cell = (predictions.labels == label) & (predictions.logits.argmax(1) == answer)
        assert predictions.confusion[label][answer] == int(cell.sum())


def test_strengths_are_those_of_using(model, loader):
    """At λ = 0 the logits are bit-for-bit the base's, at other λ those of a block with that λ."""
    with unchanged(model):
        curve = dict(strength_curve(model, loader, [0.0, 0.5, 1.0]))
    off, on = predict_off_and_on(model, loader)
    assert torch.equal(curve[0.0].logits, off.logits)
    assert_close(curve[1.0].logits, on.logits)
    with pl.using(model, a=0.5, b=0.5):
        assert torch.equal(curve[0.5].logits, predict(model, loader).logits)


def test_the_trade_off_by_hand():
    """Points are (tuned, other) accuracies; the area starts at the base's tuned accuracy."""
    labels = torch.tensor([0, 0, 1, 1])

    def predicting(*predicted: int) -> Predictions:
        return Predictions(torch.eye(2)[list(predicted)], labels)

    curve = [(0.0, predicting(0, 0, 0, 0)), (1.0, predicting(0, 1, 1, 1))]
    found = trade_off(curve, [1])
    assert found.strengths == [0.0, 1.0]
    assert found.points == [(0.0, 1.0), (1.0, 0.5)]
    assert found.front == [(0.0, 1.0), (1.0, 0.5)]
    assert found.area == 0.5
    assert trade_off(curve[:1], [1]).area == 0


def test_only_some_sites_are_on_inside(model, loader):
    """An active site contributes as before, any other not at all; the state is restored."""
    inputs = loader[0][0]
    copied = copy.deepcopy(model.eval())
    with torch.no_grad():
        for name in ("a.B", "b.B"):
            state = dict(copied[0].named_parameters())
            state[next(k for k in state if k.endswith(name))].zero_()
    with unchanged(model), only_at(model, ["3.weight", "5.weight"]):
        assert_close(model(inputs), copied(inputs))
    with unchanged(model), only_at(model, ["0.weight"], "b"):
        rows = [(r.site, r.adapter) for r in pl.summary(model).sites if r.active]
        assert rows == [("0.weight", "b")]
    assert sites_of(model) == ["0.weight", "3.weight", "5.weight"]
    assert sites_of(model, "b") == ["0.weight", "5.weight"]


def test_attribution_has_every_subset(model, loader):
    """2ⁿ values: the base's for the empty set, the adapted model's for the full set."""
    value = accuracy_on(loader, 1)
    with unchanged(model):
        values = attribution(model, value)
    assert len(values) == 8
    with pl.using(model):
        assert values[frozenset()] == value(model)
    assert values[frozenset(sites_of(model))] == value(model)
    assert len(attribution(model, value, "b")) == 4
    with pytest.raises(StudyError, match=r"3 sites have 2\^3 subsets"):
        attribution(model, value, max_sites=2)


def test_shapley_values_are_means_over_all_orders():
    """Each value is the mean gain over all orders of switching on; their sum is the total gain."""
    sites, generator = ["a", "b", "c", "d"], torch.Generator().manual_seed(0)
    values = {
        frozenset(chosen): float(torch.rand((), generator=generator))
        for size in range(5)
        for chosen in itertools.combinations(sites, size)
    }
    expected = dict.fromkeys(sites, 0.0)
    for order in itertools.permutations(sites):
        for place, site in enumerate(order):
            before = frozenset(order[:place])
            gain = values[before | {site}] - values[before]
            expected[site] += gain / math.factorial(4)
    got = shapley(values)
    assert got == pytest.approx(expected)
    assert sum(got.values()) == pytest.approx(values[frozenset(sites)] - values[frozenset()])


def test_geometry_is_that_of_the_update(model):
    """Rank, relative norm and angles are those of B A multiplied out."""
    with unchanged(model):
        found = geometry(model, "a")
    state = pl.state_dict(model, "a")
    for site, got in found.items():
        update = (state[f"{site}.B"] @ state[f"{site}.A"]).double()
        weight = pl.base_state_dict(model)[site].double()
        assert got.rank == 2
        assert got.relative_norm == pytest.approx(float(update.norm() / weight.norm()), rel=1e-5)
        ours = torch.linalg.qr(update)[0][:, :2] if update.shape[0] > 2 else torch.eye(2).double()
        theirs = torch.linalg.svd(weight)[0][:, :2]
        cosines = torch.linalg.svdvals(ours.T @ theirs).clamp(max=1)
        assert got.angles == pytest.approx(torch.rad2deg(cosines.arccos()).tolist(), abs=1e-3)
        assert len(got.angles) == 2
    both = geometry(model)["0.weight"]
    assert both.rank == 3


def test_geometry_of_known_directions():
    """An update along W's leading direction has an angle of 0°, one along another axis 90°."""
    layer = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
    model = nn.Sequential(layer)
    pl.attach(model, pl.LoRA(rank=1), name="x")
    A, B = pl.parameters(model)
    with torch.no_grad():
        A.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        B.copy_(torch.tensor([[2.0], [0.0], [0.0]]))
    along = geometry(model)["0.weight"]
    assert along.angles == pytest.approx((0.0,), abs=1e-5)
    assert along.amplification == pytest.approx(0.5)
    assert along.relative_norm == pytest.approx(2 / math.sqrt(21))
    with torch.no_grad():
        B.copy_(torch.tensor([[0.0], [0.0], [2.0]]))
    assert geometry(model)["0.weight"].angles == pytest.approx((90.0,))
    with torch.no_grad():
        B.zero_()
    assert geometry(model)["0.weight"] == Geometry(0, 0.0, (), 0.0)
