"""`merged_state_dict`: the plain model with the active adapters folded in."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import assert_bits, attach_two, mixed, small
from tests.support.models import Tied
from tests.support.reference import shake


def two() -> tuple[Any, Any, Tensor]:
    """Return a model of many layers with two active adapters, its plain model, and an input."""
    model, x = mixed(torch.float64)
    plain = copy.deepcopy(model)
    attach_two(model, activate="also")
    shake(model)
    return model.eval(), plain.eval(), x


def folded(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(pl.merged_state_dict(model)))


def test_computes_the_same() -> None:
    """Loaded into the plain model, it computes what the adapted one does, in any state."""
    model, plain, x = two()
    changes: list[Callable[[], None]] = [
        lambda: None,
        lambda: pl.scale(model, 0.3, "low"),
        lambda: pl.disable(model, "full"),
        lambda: pl.merge(model, "low"),
        lambda: pl.enable(model, "full"),  # on above a merged one
        lambda: pl.unmerge(model),
        lambda: pl.disable(model),
    ]
    for change in changes:
        change()
        with unchanged(model):
            state = pl.merged_state_dict(model)
        plain.load_state_dict(state)
        assert list(state) == list(plain.state_dict())
        torch.testing.assert_close(plain(x), model(x))
    assert_bits(dict(state), dict(pl.base_state_dict(model)))


def test_equals_merge() -> None:
    """Its tensors are those that `merge` stores, bit for bit, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model, plain = mixed(dtype)[0], mixed(dtype)[0]
        attach_two(model, activate="also")
        shake(model)
        state = folded(model)
        pl.bake(model)
        assert_bits(state, dict(model.state_dict()))
        assert state.keys() == plain.state_dict().keys()


def test_inside_of_blocks() -> None:
    """An open block counts, in the thread that has entered it."""
    model, plain, x = two()
    with pl.using(model, low=0.5):
        plain.load_state_dict(pl.merged_state_dict(model))
        torch.testing.assert_close(plain(x), model(x))
        raised = []

        def export() -> None:
            try:
                pl.merged_state_dict(model)
            except pl.StateError as error:
                raised.append(str(error))

        thread = threading.Thread(target=export)
        thread.start()
        thread.join()
        assert len(raised) == 1
    with pl.disabled(model):
        assert_bits(folded(model), dict(pl.base_state_dict(model)))
    layers = small()
    with (
        pl.routed(layers, [0, -1], "default"),
        pytest.raises(pl.StateError, match=r"no single weight; leave the block"),
    ):
        pl.merged_state_dict(layers)


def test_memory() -> None:
    """Adapted tensors are new and tied ones shared; all others are those of the model."""
    model = Tied()
    pl.attach(model, pl.LoRA(rank=2, init="gaussian"), "emb")
    state = pl.merged_state_dict(model)
    assert state["emb.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert state["emb.weight"].data_ptr() != model.get_parameter("emb.weight").data_ptr()
    layers = small()
    assert pl.merged_state_dict(layers)["0.bias"].data_ptr() == layers[0].bias.data_ptr()
    assert not any(tensor.requires_grad for tensor in pl.merged_state_dict(layers).values())


def test_autocast() -> None:
    """Inside of autocast the weights keep their dtype and bits."""
    model = small()
    expected = folded(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(folded(model), expected)


def test_beside_other_parametrizations() -> None:
    """weight_norm's tensors are computed anew; spectral_norm, which cannot, is named."""
    model: Any = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3).double()))
    plain, x = copy.deepcopy(model), torch.randn(5, 4).double()
    pl.attach(model, pl.LoRA(rank=2, init="gaussian"), "0.weight")
    shake(model)
    plain.load_state_dict(pl.merged_state_dict(model))
    torch.testing.assert_close(plain(x), model(x))
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)))
    pl.attach(model, pl.LoRA(rank=2), "0.weight")
    shake(model)
    with unchanged(model), pytest.raises(pl.StateError, match="_SpectralNorm below the adapter"):
        pl.merged_state_dict(model)


def test_without_adapters() -> None:
    """On a model without adapters it raises."""
    with pytest.raises(pl.StateError, match="no adapter is attached here"):
        pl.merged_state_dict(nn.Linear(3, 2))
