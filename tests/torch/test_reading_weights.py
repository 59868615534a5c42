"""Code that reads or writes the weight of an adapted layer itself.

Notes on PEFT were checked with version 0.21.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import EXACT, unchanged
from tests.support.mixed import small
from tests.support.reference import shake


class Direct(nn.Module):
    """A model that reads its layer's weight and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_code_that_reads_the_weight_itself() -> None:
    """`F.linear(x, m.fc.weight)` uses the adapter and trains it.

    PEFT wraps the layer, and its `weight` stays the base's: outputs and gradients miss the adapter.
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


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_output_projection_of_attention_trains(batch_first: bool) -> None:
    """An adapter on `out_proj` of MultiheadAttention, which reads its weight itself, is trained.

    In PEFT an adapter on `out_proj` alone gets no gradient: that layer's forward never runs.
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


def test_the_weight_is_a_plain_tensor() -> None:
    """`.weight` is W' even for code that bypasses `__torch_function__`."""
    model = small()
    weight = model[0].weight
    assert type(weight) is Tensor
    factors = pl.state_dict(model)
    A, B = factors["0.weight.A"], factors["0.weight.B"]
    wanted = pl.base_state_dict(model)["0.weight"] + 1.5 * B @ A
    with torch._C.DisableTorchFunctionSubclass():
        assert_close(weight * 1, wanted)
    assert_close(torch.tensor(weight.tolist()), wanted)
    assert weight.untyped_storage().nbytes() == 4 * weight.numel()


def test_writing_to_an_adapted_weight() -> None:
    """Writing to an adapted `.weight` has no effect; writing to the stored W or A has."""
    model = small()
    with unchanged(model), torch.no_grad():
        nn.init.zeros_(model[0].weight)
        model[0].weight.data.zero_()
    with unchanged(model), pytest.raises(KeyError, match="attribute 'weight' already exists"):
        model[0].weight = nn.Parameter(torch.zeros(5, 6))
    with unchanged(model), pytest.raises(NotImplementedError, match="cannot be assigned to"):
        model[0].weight = torch.zeros(5, 6)
    x = torch.eye(6)
    for tensor in (pl.parameters(model)[1], pl.base_state_dict(model)["0.weight"]):
        before = model[0].weight.detach().clone()
        tensor.data[0] += 1
        assert not torch.equal(model[0].weight, before)
        assert_close(model[0](x), F.linear(x, model[0].weight, model[0].bias))
