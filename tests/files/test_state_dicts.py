"""torch's state dict of an adapted model, and `base_state_dict`."""

import copy
import io

import torch
from torch import nn

import paramlora as pl
from tests.support.mixed import assert_bits, attach_two, mixed, small
from tests.support.reference import shake


def shake_all(model: nn.Module) -> None:
    """Add 1 to all parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def test_base_state_dict_keeps_the_keys() -> None:
    """`base_state_dict` returns the keys from before attaching and loads into a plain model."""
    model, x = mixed()
    plain = copy.deepcopy(model)
    attach_two(model)
    shake(model)
    assert model.state_dict().keys() != plain.state_dict().keys()
    assert_bits(dict(pl.base_state_dict(model)), dict(plain.state_dict()))
    with pl.merged(model):
        assert_bits(dict(pl.base_state_dict(model)), dict(plain.state_dict()))
    other, _ = mixed()
    shake_all(other)
    other.load_state_dict(pl.base_state_dict(model))
    assert_bits(other.eval()(x), plain.eval()(x))


def test_state_dict_round_trip() -> None:
    """The model's own state dict, saved and loaded with torch, restores base and factors."""
    model, x = small(), torch.randn(4, 6)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = small()
    shake_all(fresh)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_bits(fresh(x), model(x))
