"""Troubles of other tools that this one must not have, each test named after one.

What is said of PEFT was seen with its version 0.21; a number with # is a report at its repository.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import EXACT, refuses, unchanged
from tests.support.mixed import assert_bits, small, train
from tests.support.reference import shake


class Direct(nn.Module):
    """A model that never calls its layer: it reads the layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_code_that_reads_the_weight_itself() -> None:
    """`F.linear(x, m.fc.weight)` sees the adapter, and trains it.

    PEFT wraps the layer, whose `weight` stays the base's: outputs and gradients miss the adapter.
    """
    model, x = Direct().double(), torch.randn(5, 4, dtype=torch.float64)
    W, b = model.fc.weight.detach(), model.fc.bias.detach()
    pl.attach(model, LoRA(2, alpha=3))
    shake(model)
    A, B = (f.clone().requires_grad_() for f in pl.state_dict(model).values())
    expected = x @ (W + 1.5 * B @ A).T + b
    assert_close(model(x), expected, **EXACT)
    found = torch.autograd.grad(model(x).square().sum(), pl.parameters(model))
    assert_close(found, torch.autograd.grad(expected.square().sum(), (A, B)), **EXACT)


def test_merging_into_weight_norm() -> None:
    """A merge survives weight_norm, which computes the weight anew from what it stores.

    PEFT's merge of a Linear fails there.
    """
    model, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double(),
        torch.randn(2, 4, 5, 5).double(),
    )
    weight_norm(model[0])
    base = model(x)
    pl.attach(model, LoRA(2, alpha=3), "0")
    shake(model)
    expected = model(x)
    with unchanged(model):
        pl.merge(model)
        assert_close(model(x), expected, **EXACT)
        assert_close(model(x), expected, **EXACT)
        pl.unmerge(model)
    pl.merge(model)
    pl.bake(model)
    assert_close(model(x), expected, **EXACT)
    assert not torch.allclose(base, expected)


@pytest.mark.parametrize("groups", [2, 4])
def test_merging_a_grouped_convolution(groups: int) -> None:
    """A grouped convolution is adapted and merged as any other; the update is that of its weight.

    PEFT refuses to merge it.
    """
    model: Any = nn.Conv2d(4, 8, 3, groups=groups).double()
    W, x = model.weight.detach().clone(), torch.randn(2, 4, 6, 6).double()
    pl.attach(model, LoRA(2, alpha=3), "weight")
    shake(model)
    factors = pl.state_dict(model)
    wanted = W + 1.5 * (factors["weight.B"] @ factors["weight.A"]).view(W.shape)
    expected = F.conv2d(x, wanted, model.bias, groups=groups)
    assert_close(model(x), expected, **EXACT)
    with pl.merged(model):
        assert_close(model.weight.detach(), wanted, **EXACT)
        assert_close(model(x), expected, **EXACT)


def test_merging_a_tied_head_spares_the_embedding() -> None:
    """A tied head and embedding are adapted and merged as the one tensor that they are.

    PEFT's merge of the head changes the embedding too, which had no adapter (#2018).
    """
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    bits = model["embed"].weight.detach().clone()
    pl.attach(model, LoRA(rank=2), "head")
    shake(model)
    adapted, ids = model["head"].weight.detach().clone(), torch.arange(7)
    for _ in range(2):
        assert_close(model["embed"](ids), adapted)
        with pl.merged(model):
            assert_bits(model["embed"](ids).detach(), adapted)
            assert_bits(model["head"].weight.detach(), adapted)
        with pl.disabled(model):
            assert_bits(model["embed"](ids).detach(), bits)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_output_projection_of_attention_trains(batch_first: bool) -> None:
    """`MultiheadAttention` reads `out_proj.weight` past the layer's forward, and is adapted there.

    An adapter on `out_proj` alone gets no gradient in PEFT: that layer's forward never runs.
    """
    torch.default_generator.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():  # what goes into the projection, by making it the identity
        model.out_proj.weight.copy_(torch.eye(8))
        model.out_proj.bias.zero_()
        inside = model(x, x, x)[0]
        model.out_proj.weight.copy_(W := torch.randn(8, 8).double())
        model.out_proj.bias.copy_(b := torch.randn(8).double())
    pl.attach(model, LoRA(2), "out_proj")
    shake(model)
    A, B = (f.clone().requires_grad_() for f in pl.state_dict(model).values())
    expected = inside @ (W + B @ A).T + b
    found = model(x, x, x)[0]
    assert_close(found, expected, **EXACT)
    gradients = torch.autograd.grad(found.square().sum(), pl.parameters(model))
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), (A, B)), **EXACT)
    with torch.no_grad():  # the fast path of inference reads it, too
        assert_close(model.eval()(x, x, x)[0], expected, **EXACT)


def test_leaving_disabled_unfreezes_nothing() -> None:
    """Factors that were frozen are frozen after `disabled`, the base too.

    PEFT's `disable_adapter` lets the active adapter require a gradient when it is left.
    """
    model = small()
    pl.freeze(model)
    with unchanged(model):
        with pl.disabled(model):
            model(torch.randn(2, 6))
        with pytest.raises(ZeroDivisionError, match="inside"), pl.disabled(model):
            raise ZeroDivisionError("inside")
        pl.disable(model)
        pl.enable(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loading_one_adapter_never_changes_another(tmp_path: Path) -> None:
    """Whatever is loaded beside it, an adapter keeps its values, flags, strength and place."""
    model = small()
    pl.save(model, tmp_path / "a")
    pl.attach(model, LoRA(1), "2", name="mine")
    shake(model, "mine")
    pl.scale(model, 0.5, "mine")
    pl.freeze(model, "mine")
    pl.disable(model, "default")

    def mine() -> list[Any]:
        rows = [row for row in pl.summary(model).sites if row.adapter == "mine"]
        return [rows, {k: v.tolist() for k, v in pl.state_dict(model, "mine").items()}]

    before, x = mine(), torch.randn(3, 6)
    outputs = model(x)
    pl.load(model, tmp_path / "a")
    assert mine() == before
    assert_bits(model(x), outputs)
    pl.load(model, tmp_path / "a", name="beside")
    assert mine() == before
    with pl.using(model, "mine"):
        assert_bits(model(x), outputs)
    bad = tmp_path / "bad"
    bad.write_bytes((tmp_path / "a").read_bytes()[:-1])
    with unchanged(model), pytest.raises(pl.CheckpointError, match="damaged"):
        pl.load(model, bad)


def test_deleting_a_merged_adapter_is_refused() -> None:
    """A merged adapter is not taken away: its update would stay in the weights for ever."""
    model = small()
    base = {key: value.clone() for key, value in pl.base_state_dict(model).items()}
    pl.merge(model)
    for names in ((), ("default",)):
        refuses(
            model,
            lambda m, names=names: pl.detach(m, *names),  # type: ignore[misc]
            pl.StateError,
            "cannot detach adapter 'default' while it is merged; unmerge first",
        )
    pl.unmerge(model)
    pl.detach(model)
    assert_bits(dict(model.state_dict()), base)


def test_running_statistics_drift_under_a_frozen_base() -> None:
    """BatchNorm's statistics move in training mode, frozen or not (#1732).

    `fingerprint` notices, the summary says so, and `hold_statistics` holds them still.
    """
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    summary = pl.attach(model, LoRA(rank=2), name="first")
    assert summary.moving == ("1",)
    before = pl.fingerprint(model)
    train(model.eval(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    with pl.hold_statistics(model):
        train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    pl.attach(model, LoRA(rank=2), name="second", hold_statistics=True)
    train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) == before
    pl.detach(model, "second")
    train(model.train(), torch.randn(5, 6))
    assert pl.fingerprint(model) != before


@pytest.mark.parametrize(
    ("first", "second"),
    [(pl.LoRA(2), pl.DoRA(2)), (pl.IA3(), pl.LoRA(2)), (pl.DoRA(2), pl.LoRA(2))],
)
def test_merging_out_of_order(first: pl.Spec, second: pl.Spec) -> None:
    """Where the order of two adapters counts, merging the later one alone is refused."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)
    pl.attach(model, first, name="first")
    pl.attach(model, second, name="second")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.3)
    before = model(x)
    with pytest.raises(pl.StateError, match=r"cannot merge 'second' .* while 'first'"):
        pl.merge(model, "second")
    assert torch.equal(model(x), before)
    for names in (["first"], ["first", "second"]):
        with pl.merged(model, *names):
            torch.testing.assert_close(model(x), before)


def test_a_sum_over_one_side_of_a_tie() -> None:
    """Combining adapters that are on one side of tied tensors alone is refused, as loading is."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Sequential(nn.Linear(4, 7, bias=False))
            self.head[0].weight = self.embedding.weight

    model = Tied()
    pl.attach(model.head, pl.LoRA(2), name="a")
    with pytest.raises(pl.StateError, match="are tied, and adapters were attached to one side"):
        pl.combine(model, {"a": 1.0}, name="c")


@pytest.mark.parametrize(
    "make",
    [
        lambda: pl.LoRA(4, rank_stabilized="no"),  # type: ignore[arg-type]
        lambda: pl.DoRA(2, exact_gradient="no"),  # type: ignore[arg-type]
        lambda: pl.LoKr(2, decompose_both=1),  # type: ignore[arg-type]
    ],
)
def test_a_flag_that_is_a_word(make: Callable[[], pl.Spec]) -> None:
    """A flag that is no bool is refused: "no" would mean yes."""
    with pytest.raises(ValueError, match="must be True or False, got"):
        make()


@pytest.mark.parametrize("spec", [pl.LoRA(1), pl.Delta()])
def test_a_tensor_without_elements(spec: pl.Spec) -> None:
    """A tensor without elements is refused by name, and nothing is attached."""
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    with pytest.raises(pl.TargetError, match=r"'0.weight' with .*: it has no elements"):
        pl.attach(model, spec, "*weight")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
