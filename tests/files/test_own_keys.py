"""The state dict of an adapted model has the base's own keys, with the factors beside them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import assert_bits, attach_two, flags, mixed, small
from tests.support.models import Tied
from tests.support.reference import shake

STATES = {"on": lambda m: None, "off": pl.disable, "merged": pl.merge}


def two_linears() -> Any:
    """Return the base of `small`."""
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def tied(seed: int = 0) -> Any:
    """Return a tied model with one adapter, its factors random."""
    torch.default_generator.manual_seed(seed)
    model = Tied()
    pl.attach(model, pl.LoRA(rank=2), "emb")
    shake(model)
    return model


def scaled(layer: nn.Module) -> None:
    """Put a parametrization with a parameter of its own on top of the layer's weight."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight: Tensor) -> Tensor:
            return self.by * weight

    parametrize.register_parametrization(layer, "weight", Scale())


def test_keys() -> None:
    """State dict and `named_parameters` have the base's keys in its order, then the factors."""
    model, base = small(), two_linears()
    keys = list(model.state_dict())
    assert keys == [name for name, _ in model.named_parameters()]
    assert keys[:4] == [
        "0.weight",
        "0.bias",
        "0.parametrizations.weight.0.factors.default.A",
        "0.parametrizations.weight.0.factors.default.B",
    ]
    assert [key for key in keys if ".factors." not in key] == list(base.state_dict())
    assert model[0].parametrizations.weight.original is model.get_parameter("0.weight")


def test_keys_of_many_layers() -> None:
    """For layers of many types, in every state, the base's keys keep their order and values."""
    model, _ = mixed()
    plain = copy.deepcopy(model)
    attach_two(model)
    shake(model)
    names = [name for name, _ in plain.named_parameters()]
    for change in (pl.enable, pl.merge, pl.unmerge, pl.disable):
        change(model)
        assert [n for n, _ in model.named_parameters() if "parametrizations" not in n] == names
        found = pl.base_state_dict(model)
        assert list(found) == list(plain.state_dict())
        assert_bits(dict(found), dict(plain.state_dict()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("make", [small, tied])
def test_strict_round_trip(make: Any, state: str, assign: bool) -> None:
    """A state dict loads strictly, copied or assigned, into a model in the same state."""
    model, other = make(), make()
    shake(other)
    x = torch.arange(6) if make is tied else torch.randn(4, 6)
    for each in (model, other):
        STATES[state](each)
    saved = copy.deepcopy(model.state_dict())
    frozen = flags(model) if make is small else None
    other.load_state_dict(saved, assign=assign)
    assert_bits(other(x), model(x))
    assert frozen is None or flags(other) == frozen
    if state == "merged":
        with unchanged(other), pytest.raises(pl.StateError, match="written to since the merge"):
            pl.unmerge(other)


def test_base_state() -> None:
    """A base's state dict lacks the factors only; an adapted one lacks nothing of the base."""
    model, base, x = small(), two_linears(), torch.randn(4, 6)
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(".factors." in key for key in result.missing_keys)
    with pl.disabled(model):
        assert_bits(model(x), base(x))
    with unchanged(model), pytest.raises(RuntimeError, match=r"Missing key.*factors\.default\.A"):
        model.load_state_dict(base.state_dict())
    plain = two_linears()
    assert plain.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    assert_bits(plain(x), base(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [small, tied])
def test_merged_weights_are_not_adapted_again(make: Any, strict: bool) -> None:
    """Weights saved merged do not load below the same adapter unmerged; a plain model gets W'."""
    merged, model = make(), make()
    pl.merge(merged)
    state = merged.state_dict()
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match=r"weight was saved while 'default' was merged into it"),
    ):
        model.load_state_dict(state, strict=strict)
    plain: Any = Tied() if make is tied else two_linears()
    assert plain.load_state_dict(state, strict=False).missing_keys == []
    x = torch.arange(6) if make is tied else torch.randn(4, 6)
    assert_bits(plain(x), merged(x))
    pl.unmerge(merged)
    assert merged.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(merged.state_dict())


def test_tied_factors_are_saved_once() -> None:
    """The factors of tied tensors are in the state dict under the first path only."""
    model = tied()
    keys = [key for key in model.state_dict() if ".factors." in key]
    assert keys == [f"emb.parametrizations.weight.0.factors.default.{k}" for k in "AB"]
    assert "head.weight" in model.state_dict()
    other = tied(1)
    other.load_state_dict(model.state_dict())
    assert_bits(other.head.weight, model.emb.weight)
    pl.disable(other.head)
    assert not pl.summary(other).sites[0].active
    head = copy.deepcopy(other.head)
    shake(head)
    assert_bits(other.head.weight, other.emb.weight)


def test_functional_call() -> None:
    """`functional_call` with a tensor in place of W computes with W' of that tensor."""
    model, x = small(), torch.randn(4, 6)
    W = torch.randn(5, 6, requires_grad=True)
    y = torch.func.functional_call(model, {"0.weight": W}, (x,))
    y.sum().backward()
    assert W.grad is not None
    pl.load_base_state_dict(model, {**pl.base_state_dict(model), "0.weight": W.detach()})
    assert_bits(model(x), y.detach().requires_grad_())


def test_averaged_model() -> None:
    """`AveragedModel` averages the factors, and its state dict loads strictly."""
    model, x = small(), torch.randn(4, 6)
    average = AveragedModel(model)
    average.update_parameters(model)
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    assert_bits(average(x), model(x))


def test_cached_copies() -> None:
    """Inside of `parametrize.cached`, a model and its copy each read their own W'."""
    model = small()
    other = copy.deepcopy(model)
    shake(other)
    expected = [m[0].weight.detach() for m in (model, other)]
    with parametrize.cached():
        for m, weight in zip((model, other), expected, strict=True):
            assert m[0].weight is m[0].weight
            assert_bits(m[0].weight.detach(), weight)


@pytest.mark.parametrize("leave", [True, False])
def test_removed_by_torch(leave: bool) -> None:
    """torch's `remove_parametrizations` leaves a plain layer with W' or W, in the former order."""
    model = small()
    stored = pl.base_state_dict(model)["0.weight"].clone()
    expected = model[0].weight.detach().clone() if leave else stored
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=leave)
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model[0].named_parameters()] == ["weight", "bias"]
    assert_bits(model[0].weight.detach(), expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [parametrizations.weight_norm, scaled])
def test_beside_other_parametrizations(other: Any, first: bool) -> None:
    """Beside others the base keeps the keys that torch gives it; after detach nothing is left."""
    plain: Any = nn.Sequential(nn.Linear(4, 3))
    expected = copy.deepcopy(plain)
    other(expected[0])
    if first:
        other(plain[0])
    pl.attach(plain, pl.LoRA(2), "*.weight" if not first else "0.weight")
    if not first:
        other(plain[0])
    shake(plain)
    plain.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    assert list(pl.base_state_dict(plain)) == list(expected.state_dict())
    assert plain.get_parameter("0.bias") is plain[0].bias
    pl.detach(plain)
    assert list(plain.state_dict()) == list(expected.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(plain(x), expected(x))


def test_a_failing_kind_does_not_read_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AttributeError inside of a kind is an error, and not a read of the stored weight."""

    def broken(self: Any, weight: Tensor, factors: Any, strength: Any = 1.0) -> Tensor:
        return weight.no_such_attribute  # type: ignore[attr-defined]

    model = nn.Linear(3, 2)
    pl.attach(model, pl.Delta(), "weight")
    monkeypatch.setattr(pl.Delta, "apply", broken)
    with pytest.raises(RuntimeError, match="cannot compute 'weight' of an adapted module"):
        _ = model.weight
