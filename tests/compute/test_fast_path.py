"""torch's fused attention reads weights without calling the layers, and gets W'."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora as pl


class Called(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def run(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, nn.MultiheadAttention):
        return model(x, x, x, need_weights=False)[0]
    return model(x)


def dense(model: nn.Module) -> nn.Module:
    """Return a plain model with weights W + 1.5·BA in float64."""
    factors = pl.state_dict(model)
    plain = copy.deepcopy(model)
    pl.detach(plain)
    for key in [key.removesuffix(".A") for key in factors if key.endswith(".A")]:
        A, B = factors[f"{key}.A"], factors[f"{key}.B"]
        plain.get_parameter(key).data += 1.5 * (B @ A)
    return plain


@pytest.mark.parametrize(
    ("make", "targets", "op"),
    [
        (attention, ["in_proj_weight", "out_proj"], "aten::_native_multi_head_attention"),
        (
            encoder_layer,
            ["*.in_proj_weight", nn.Linear],
            "aten::_transformer_encoder_layer_fwd",
        ),
    ],
)
def test_fused_operation(make: Callable[[], nn.Module], targets: list[Any], op: str) -> None:
    """In eval mode under no_grad the fused operation runs: on W', and on W with adapters off."""
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        base = run(model, x)
        pl.attach(model, pl.LoRA(rank=2, alpha=3), targets)
        for parameter in pl.parameters(model):
            parameter.normal_()
        with Called() as called:
            on = run(model, x)
        assert op in called.names
        assert_close(on, run(dense(model), x))
        assert not torch.allclose(on, base)
        with pl.disabled(model), Called() as called:
            assert torch.equal(run(model, x), base)
        assert op in called.names
        with pl.merged(model):
            assert_close(run(model, x), on)
