"""Each method of the study agrees with its dense formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora as pl
from experiments.digits.methods import (
    BlogScrambled,
    WrappedLinear,
    attached_ranks,
    wrap,
    wrapped_ranks,
)
from experiments.digits.model import DigitNet


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill_factors(model: nn.Module) -> None:
    """Set all factors to random nonzero values."""
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(generator=seeded(5))


def test_a_network_is_its_formula():
    """The network is a chain of linear maps with ReLUs between the layers or on the logits."""
    x = torch.randn(5, 784)
    for inner, last in ((False, True), (True, False)):
        model = DigitNet([7, 6], "relu" if inner else "none", relu_logits=last)
        weights = list(model.parameters())
        expected = x
        for number in range(3):
            expected = expected @ weights[2 * number].T + weights[2 * number + 1]
            if inner if number < 2 else last:
                expected = expected.clamp(min=0)
        torch.testing.assert_close(model(x), expected)
        assert list(dict(model.named_children())) == ["linear1", "linear2", "linear3"]


def test_wrapped_layers_are_their_dense_formula():
    """A wrapped network has the values and gradients of one with dense weights W + s·BA."""
    model = DigitNet([7, 6], "relu").double()
    dense = copy.deepcopy(model)
    wrap(model, pl.LoRA(3, 2.0, init="gaussian"), seeded(0))
    layers = [layer for layer in model.children() if isinstance(layer, WrappedLinear)]
    with torch.no_grad():
        for layer in layers:
            layer.B.normal_(generator=seeded(1))
    x, labels = torch.randn(9, 784, dtype=torch.float64), torch.randint(10, (9,))
    copies = [
        [factor.detach().clone().requires_grad_() for factor in (layer.A, layer.B)]
        for layer in layers
    ]
    y = x
    for number, ((A, B), plain) in enumerate(zip(copies, dense.children(), strict=True)):
        y = y @ (plain.weight.detach() + 2.0 / 3 * (B @ A)).T + plain.bias
        y = y.relu() if number < 2 else y
    torch.testing.assert_close(model(x), y)
    F.cross_entropy(model(x), labels).backward()
    F.cross_entropy(y, labels).backward()
    for layer, (A, B), plain in zip(layers, copies, dense.children(), strict=True):
        torch.testing.assert_close(layer.A.grad, A.grad)
        torch.testing.assert_close(layer.B.grad, B.grad)
        torch.testing.assert_close(layer.linear.bias.grad, plain.bias.grad)
        assert layer.linear.weight.grad is None


def test_wrapping_trains_factors_and_biases_alone():
    """On the blog's network wrapping trains 3,518 parameters: 3,124 factors and 394 biases."""
    model = DigitNet([256, 128], "none", relu_logits=True)
    x = torch.randn(4, 784)
    before = model(x)
    wrap(model, pl.LoRA(2, 1.0, init="gaussian"), seeded(0))
    assert torch.equal(model(x), before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3518
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(p.requires_grad for p in biases)
    assert sum(p.numel() for p in biases) == 394


def test_methods_start_from_the_same_factors():
    """With the same seed, wrapped layers have the same initial A as attached adapters."""
    attached, wrapped = DigitNet([7, 6]), DigitNet([7, 6])
    spec = pl.LoRA(2, 1.0, init="gaussian")
    pl.attach(attached, spec, name="digits", generator=seeded(3))
    wrap(wrapped, spec, seeded(3))
    for name, layer in wrapped.named_children():
        assert torch.equal(layer.A, pl.state_dict(attached, "digits")[f"{name}.weight.A"])


def test_the_scrambled_update_is_the_blogs_element_by_element():
    """Element (o, i) of the scrambled update is element o·in + i of B A, read row by row."""
    model = nn.Sequential(nn.Linear(5, 3)).double()
    weight = model[0].weight.detach().clone()
    pl.attach(model, BlogScrambled(2, 3.0), name="digits", generator=seeded(0))
    factors = pl.state_dict(model, "digits")
    A, B = factors["0.weight.A"], factors["0.weight.B"]
    assert (A.shape, B.shape) == ((2, 3), (5, 2))
    assert torch.equal(model[0].weight, weight)
    fill_factors(model)
    for o in range(3):
        for i in range(5):
            row, column = divmod(o * 5 + i, 3)
            expected = weight[o, i] + 3.0 / 2 * (B[row] * A[:, column]).sum()
            torch.testing.assert_close(model[0].weight[o, i], expected)
    with pl.disabled(model):
        assert torch.equal(model[0].weight, weight)


def test_the_scrambled_update_hides_its_rank():
    """With equally many parameters, the scrambled update has ranks 128, 4, 10 instead of 2."""
    ranks = {}
    for spec in (pl.LoRA(2, 1.0), BlogScrambled(2, 1.0)):
        model = DigitNet([256, 128])
        attached = pl.attach(model, spec, name="digits", generator=seeded(0))
        assert attached.trainable == 3124
        assert set(attached_ranks(model, "digits").values()) == {0}
        fill_factors(model)
        ranks[type(spec)] = list(attached_ranks(model, "digits").values())
    assert ranks == {pl.LoRA: [2, 2, 2], BlogScrambled: [128, 4, 10]}


def test_ranks_are_measured_beside_other_adapters():
    """The ranks of one adapter do not include another active one; the model does not change."""
    model = DigitNet([20, 15])
    pl.attach(model, pl.LoRA(3), name="other", generator=seeded(0))
    pl.attach(model, pl.LoRA(1), name="digits", generator=seeded(1), activate="also")
    fill_factors(model)
    x = torch.randn(3, 784)
    before = model(x)
    assert attached_ranks(model, "digits") == {f"linear{n}.weight": 1 for n in (1, 2, 3)}
    assert torch.equal(model(x), before)


def test_ranks_of_wrapped_layers():
    """A wrapped layer's rank is that of B A; it is zero before training."""
    model = DigitNet([20, 15])
    wrap(model, pl.LoRA(2), seeded(0))
    assert set(wrapped_ranks(model).values()) == {0}
    with torch.no_grad():
        for layer in model.children():
            layer.B.normal_()
    assert wrapped_ranks(model) == {f"linear{n}.weight": 2 for n in (1, 2, 3)}


@pytest.mark.parametrize("spec", [pl.LoRA(2, 1.0, init="gaussian"), BlogScrambled(2, 1.0)])
def test_a_saved_adapter_is_the_one_that_was_trained(spec, tmp_path):
    """A saved adapter, loaded on a copy of the base, gives bit-for-bit the same outputs."""
    model = DigitNet([20, 15])
    other = copy.deepcopy(model)
    pl.attach(model, spec, name="digits", generator=seeded(0))
    fill_factors(model)
    pl.save(model, tmp_path / "adapter.safetensors", "digits")
    pl.load(other, tmp_path / "adapter.safetensors")
    x = torch.randn(3, 784)
    assert torch.equal(model(x), other(x))
