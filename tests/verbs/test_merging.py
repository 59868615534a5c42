"""Merging a grouped convolution, and merging adapters whose order matters."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import EXACT
from tests.support.reference import shake


@pytest.mark.parametrize("groups", [2, 4])
def test_merging_a_grouped_convolution(groups: int) -> None:
    """A grouped convolution is adapted and merged like any other layer.

    PEFT 0.21 refuses to merge it.
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


@pytest.mark.parametrize(
    ("first", "second"),
    [(pl.LoRA(2), pl.DoRA(2)), (pl.IA3(), pl.LoRA(2)), (pl.DoRA(2), pl.LoRA(2))],
)
def test_merging_out_of_order(first: pl.kinds.Spec, second: pl.kinds.Spec) -> None:
    """If the order of two adapters matters, merging the later one alone raises StateError."""
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
