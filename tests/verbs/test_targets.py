"""Targets: types of layers, and tensors without elements."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.mixed import train


def test_a_type_matches_adapted_and_derived_modules() -> None:
    """A type as target matches adapted modules and subclasses; `out_proj` is then trained."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    assert type(layer.self_attn.out_proj) is not nn.Linear
    pl.attach(layer, pl.LoRA(rank=2), nn.Linear, name="one")
    summary = pl.attach(layer, pl.LoRA(rank=1), nn.Linear, name="two")
    sites = {row.site for row in summary.sites if row.adapter == "two"}
    assert sites == {"linear1.weight", "linear2.weight", "self_attn.out_proj.weight"}
    before = layer(torch.ones(2, 3, 8))
    train(layer, torch.randn(2, 3, 8), steps=1)
    factors = pl.state_dict(layer, "two")
    assert factors["self_attn.out_proj.weight.B"].any()
    with pl.using(layer), torch.no_grad():
        off = layer(torch.ones(2, 3, 8))
    assert not torch.equal(layer(torch.ones(2, 3, 8)), before)
    assert_close(off, before)


@pytest.mark.parametrize("spec", [pl.LoRA(1), pl.Delta()])
def test_a_tensor_without_elements(spec: pl.kinds.Spec) -> None:
    """A tensor without elements raises TargetError with its path, and nothing is attached."""
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    with pytest.raises(pl.TargetError, match=r"'0.weight' with .*: it has no elements"):
        pl.attach(model, spec, "*weight")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
