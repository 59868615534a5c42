"""What adapters did: ledger, confusion, attribution, geometry, strength, on models of any kind."""

import copy
import doctest
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from experiments.analysis import insight
from experiments.analysis.geometry import Geometry, geometry
from experiments.analysis.insight import (
    Answers,
    answers_of,
    attribution,
    confusion_change,
    learning_and_forgetting,
    ledger,
    off_and_on,
    only_at,
    shapley,
    sites_of,
    strength_curve,
)
from experiments.harness.settings import StudyError
from tests.support.helpers import unchanged

CLASSES = 4


@pytest.fixture
def model() -> nn.Module:
    """A small network with two adapters that do something, "b" on two of its three layers."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    pl.attach(made, pl.LoRA(rank=2), name="a")
    pl.attach(made, pl.LoRA(rank=1), ["0", "5"], name="b")
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
        answers = answers_of(model, loader)
        return float(answers.right[answers.labels == label].float().mean())

    return value


def test_examples_in_docstrings_run():
    """The examples in the docstrings give what they say."""
    result = doctest.testmod(insight)
    assert result.attempted
    assert not result.failed


def test_answers_off_and_on_are_the_models(model, loader):
    """Off is the base, on the named adapters, in evaluation mode; mode and toggles come back."""
    model.train()
    model[2].eval()
    with unchanged(model):
        off, on = off_and_on(model, loader, "a")
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
        off_and_on(model, loader)


def test_the_ledger_is_a_loop_over_examples(model, loader):
    """Each example is in the list that its two answers say, and in no other."""
    off, on = off_and_on(model, loader)
    book = ledger(off, on)
    for row, label in enumerate(off.labels.tolist()):
        before, after = (int(a.logits[row].argmax()) == label for a in (off, on))
        assert (row in book.won[label]) is (after and not before)
        assert (row in book.lost[label]) is (before and not after)
    listed = [row for side in (book.won, book.lost) for rows in side.values() for row in rows]
    assert len(listed) == len(set(listed)) == int((off.right != on.right).sum())
    assert book.counts() == [(c, len(book.won[c]), len(book.lost[c])) for c in range(CLASSES)]
    assert listed


def test_the_change_of_confusion_is_counted_per_cell(model, loader):
    """After less before; each row of the difference adds up to none."""
    off, on = off_and_on(model, loader)
    change = confusion_change(off, on)
    for label, answer in itertools.product(range(CLASSES), repeat=2):
        its = off.labels == label
        expected = int((on.given[its] == answer).sum()) - int((off.given[its] == answer).sum())
        assert change[label][answer] == expected
    assert [sum(row) for row in change] == [0] * CLASSES


def test_strengths_are_those_of_using(model, loader):
    """At 0 the curve has the base's bits, at 1 the adapters as they are, between what λ gives."""
    with unchanged(model):
        curve = dict(strength_curve(model, loader, [0.0, 0.5, 1.0]))
    off, on = off_and_on(model, loader)
    assert torch.equal(curve[0.0].logits, off.logits)
    assert_close(curve[1.0].logits, on.logits)
    with pl.using(model, a=0.5, b=0.5):
        assert torch.equal(curve[0.5].logits, answers_of(model, loader).logits)


def test_learning_and_forgetting_by_hand():
    """Points are (tuned, other) accuracies, the area counts from the base's tuned accuracy."""
    labels = torch.tensor([0, 0, 1, 1])

    def answering(*given: int) -> Answers:
        return Answers(torch.eye(2)[list(given)], labels)

    curve = [(0.0, answering(0, 0, 0, 0)), (1.0, answering(0, 1, 1, 1))]
    found = learning_and_forgetting(curve, [1])
    assert found.points == [(0.0, 1.0), (1.0, 0.5)]
    assert found.front == [(0.0, 1.0), (1.0, 0.5)]
    assert found.area == 0.5
    assert learning_and_forgetting(curve[:1], [1]).area == 0


def test_only_some_sites_are_on_inside(model, loader):
    """A site that is on contributes as before, one that is off not at all; all comes back."""
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


def test_attribution_has_every_combination(model, loader):
    """2ⁿ values: none is the base's, all the adapted model's."""
    value = accuracy_on(loader, 1)
    with unchanged(model):
        values = attribution(model, value)
    assert len(values) == 8
    with pl.using(model):
        assert values[frozenset()] == value(model)
    assert values[frozenset(sites_of(model))] == value(model)
    assert len(attribution(model, value, "b")) == 4
    with pytest.raises(StudyError, match=r"3 sites have 2\^3 combinations"):
        attribution(model, value, most=2)


def test_shapley_values_are_means_over_all_orders():
    """Each value is the mean gain over all orders of switching sites on, and they add up."""
    sites, torch_generator = ["a", "b", "c", "d"], torch.Generator().manual_seed(0)
    values = {
        frozenset(chosen): float(torch.rand((), generator=torch_generator))
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
    """Rank, size and angles are those of B A multiplied out, by numpy-like definitions."""
    with unchanged(model):
        found = geometry(model, "a")
    state = pl.state_dict(model, "a")
    for site, its in found.items():
        update = (state[f"{site}.B"] @ state[f"{site}.A"]).double()
        weight = pl.base_state_dict(model)[site].double()
        assert its.rank == 2
        assert its.size == pytest.approx(float(update.norm() / weight.norm()), rel=1e-5)
        ours = torch.linalg.qr(update)[0][:, :2] if update.shape[0] > 2 else torch.eye(2).double()
        theirs = torch.linalg.svd(weight)[0][:, :2]
        cosines = torch.linalg.svdvals(ours.T @ theirs).clamp(max=1)
        assert its.angles == pytest.approx(torch.rad2deg(cosines.arccos()).tolist(), abs=1e-3)
        assert len(its.angles) == 2
    both = geometry(model)["0.weight"]
    assert both.rank == 3


def test_geometry_of_known_directions():
    """An update along W's first direction has angle 0 and amplifies it; across it, 90."""
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
    assert along.amplified == pytest.approx(0.5)
    assert along.size == pytest.approx(2 / math.sqrt(21))
    with torch.no_grad():
        B.copy_(torch.tensor([[0.0], [0.0], [2.0]]))
    assert geometry(model)["0.weight"].angles == pytest.approx((90.0,))
    with torch.no_grad():
        B.zero_()
    assert geometry(model)["0.weight"] == Geometry(0, 0.0, (), 0.0)
