"""State dicts: torch's own, those of adapters, and those of the base."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import paramlora as pl
from tests.support.helpers import Row, refuses
from tests.support.mixed import assert_bits, attach_two, mixed, small
from tests.support.models import Tied, attached, half_merged, plain
from tests.support.reference import shake


def add_one(model: nn.Module) -> None:
    """Add 1 to all parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def test_base_state_dict() -> None:
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
    add_one(other)
    other.load_state_dict(pl.base_state_dict(model))
    assert_bits(other.eval()(x), plain.eval()(x))


def test_state_dict_of_torch() -> None:
    """The model's own state dict, saved and loaded with torch, restores base and factors."""
    model, x = small(), torch.randn(4, 6)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = small()
    add_one(fresh)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_bits(fresh(x), model(x))


def factors(model: nn.Module, **changed: Any) -> dict[str, Any]:
    """Return the state of "digits" with some entries changed, and those that are None left out."""
    return edited(pl.state_dict(model, "digits"), changed)


def base(model: nn.Module, **changed: Any) -> dict[str, Any]:
    """Return the state of the base with some entries changed, and those that are None left out."""
    return edited(pl.base_state_dict(model), changed)


def edited(state: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    state = {**state, **{key.replace("_", "."): value for key, value in changed.items()}}
    return {key: value for key, value in state.items() if value is not None}


STATES: dict[str, Row] = {
    "a state with missing, unexpected and wrong entries": (
        attached,
        lambda m: pl.load_state_dict(
            m,
            factors(m, fc1_weight_A=None, fc3_weight_A=torch.ones(1), fc2_weight_B=torch.ones(9)),
            "digits",
        ),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: missing fc1.weight.A; unexpected "
        "fc3.weight.A; fc2.weight.B: expected (3, 2), found (9,)",
    ),
    "a state without tensors": (
        attached,
        lambda m: pl.load_state_dict(m, factors(m, fc2_weight_B=[[1.0]]), "digits"),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: fc2.weight.B: expected (3, 2), "
        "found list instead of a tensor",
    ),
    "a state without data": (
        attached,
        lambda m: pl.load_state_dict(
            m, factors(m, fc2_weight_B=torch.ones(3, 2, device="meta")), "digits"
        ),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: fc2.weight.B: expected (3, 2), found a "
        "tensor on the meta device, which has no data",
    ),
    "the state of another adapter": (
        attached,
        lambda m: pl.load_state_dict(m, pl.state_dict(m, "letters"), "digits"),
        pl.CheckpointError,
        "the state for adapter 'digits' does not fit: missing fc1.weight.A, fc1.weight.B; "
        "fc2.weight.A: expected (2, 4), found (1, 4); fc2.weight.B: expected (3, 2), found (3, 1)",
    ),
    "a base with missing, unexpected and wrong entries": (
        attached,
        lambda m: pl.load_base_state_dict(
            m, base(m, fc1_bias=None, fc3_bias=torch.ones(1), fc2_weight=torch.ones(9, 4))
        ),
        pl.CheckpointError,
        "the state for the base does not fit: missing fc1.bias; unexpected fc3.bias; fc2.weight: "
        "expected (3, 4), found (9, 4)",
    ),
    "a base under other keys": (
        attached,
        lambda m: pl.load_base_state_dict(
            m, {key.replace("fc", "0.fc"): value for key, value in plain().state_dict().items()}
        ),
        pl.CheckpointError,
        "the state for the base does not fit: missing fc1.weight, fc1.bias, fc2.weight, fc2.bias; "
        "unexpected 0.fc1.weight, 0.fc1.bias, 0.fc2.weight, 0.fc2.bias",
    ),
}


@pytest.mark.parametrize("row", STATES.values(), ids=STATES.keys())
def test_state_that_does_not_fit(row: Row) -> None:
    """A state with missing, unexpected or wrong entries raises, and all of them are listed."""
    make, call, error, message = row
    refuses(make(), call, error, message)


def test_base_of_a_merged_adapter() -> None:
    """Loading a base raises while an adapter is merged: unmerging would restore the old one."""
    refuses(
        half_merged(),
        lambda m: pl.load_base_state_dict(m, pl.base_state_dict(m)),
        pl.StateError,
        "cannot load a base under adapter 'digits' while it is merged; unmerge first",
    )


def test_order_of_factors() -> None:
    """`state_dict` and `parameters` return factors in the same order, with tied weights too."""
    tied = Tied()
    # The head comes last, but its tensor has the path of the embedding, which comes first.
    model = nn.ModuleDict({"emb": tied.emb, "fc": nn.Linear(4, 3), "head": tied.head})
    pl.attach(model, pl.LoRA(rank=1), ["head", "fc"])
    state, parameters = pl.state_dict(model), pl.parameters(model)
    assert list(state) == [f"{path}.{key}" for path in ("emb.weight", "fc.weight") for key in "AB"]
    assert [t.data_ptr() for t in state.values()] == [p.data_ptr() for p in parameters]
