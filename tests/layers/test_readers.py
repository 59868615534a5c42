"""Code that handles parameters by name gets the stored tensor, or an error; see readers.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import assert_bits, small


def test_get_parameter() -> None:
    """`get_parameter` returns what `named_parameters` has under that name, and reads give W'."""
    model = small()
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
    assert not isinstance(model[0].weight, nn.Parameter)


def test_reads_elsewhere() -> None:
    """A user's layer in a module whose name begins like one of the readers' reads W'."""
    model, found = small(), {"__name__": "accelerated"}
    exec("def read(layer): return layer.weight", found)
    read: Any = found["read"]
    assert_bits(read(model[0]), model[0].weight)
    assert type(read(model[0])) is Tensor


TAKING: dict[str, Callable[[Any], object]] = {
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "del": lambda layer: delattr(layer, "weight"),
    "none": lambda layer: setattr(layer, "weight", None),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(5, 6))),
}


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("take", TAKING)
def test_taking_the_parameter(take: str, active: bool) -> None:
    """Taking the stored tensor out of its module is refused, and nothing changes."""
    model = small()
    if not active:
        pl.disable(model)
    before = vars(model[0])["_forward_pre_hooks"].copy()
    with unchanged(model), pytest.raises(pl.StateError, match=r"'weight' of .* adapters.*detach"):
        TAKING[take](model[0])
    assert vars(model[0])["_forward_pre_hooks"] == before


def test_same_parameter() -> None:
    """Assigning the stored parameter itself, as tying does, changes nothing."""
    model = small()
    with unchanged(model):
        model[0].weight = model.get_parameter("0.weight")


@pytest.mark.parametrize("merged", [False, True])
def test_swapped_tensors(merged: bool) -> None:
    """With torch's swapping of tensors, a cast and a load work, merged or not."""
    model, x = small(), torch.randn(4, 6)
    expected = model(x).detach()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if merged:
            pl.merge(model)
        model.double().float()
        if merged:
            pl.unmerge(model)
        assert_bits(model(x).detach(), expected)
        if merged:
            pl.merge(model)
        model.load_state_dict({key: value + 0 for key, value in model.state_dict().items()})
        if merged:
            with pytest.raises(pl.StateError, match="written to since the merge"):
                pl.unmerge(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_accelerate_moves_the_stored_tensor() -> None:
    """accelerate's `set_module_tensor_to_device` sets and moves W, and never W'."""
    modeling = pytest.importorskip("accelerate.utils.modeling")
    model = small()
    W = model.get_parameter("0.weight").detach().clone()
    for device, value in (("meta", None), ("cpu", W)):
        modeling.set_module_tensor_to_device(model, "0.weight", device, value)
    assert_bits(model.get_parameter("0.weight").detach(), W)
