"""DoRA: equal to PEFT's, exact at the start, and without W' in the layer's forward."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import paramlora as pl
from tests.support.helpers import keeping
from tests.support.models import Wrapped

HOSTS: dict[str, tuple[Any, Any, pl.DoRA]] = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(4, 7), pl.DoRA(rank=3, alpha=2)),
    "linear_no_bias": (
        lambda: nn.Linear(7, 5, bias=False),
        lambda: torch.randn(2, 4, 7),
        pl.DoRA(rank=3, alpha=2),
    ),
    "transformers_conv1d": (
        lambda: Conv1D(5, 7),
        lambda: torch.randn(4, 7),
        pl.DoRA(rank=3, alpha=2, dim=1),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 9), pl.DoRA(3, 2)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(2, 3, 6, 6), pl.DoRA(3, 2)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), lambda: torch.randn(2, 2, 3, 3, 3), pl.DoRA(3, 2)),
    "embedding": (
        lambda: nn.Embedding(11, 6),
        lambda: torch.randint(11, (3, 4)),
        pl.DoRA(rank=3, alpha=2, dim=1),
    ),
}


def with_peft_dora(layer: nn.Module) -> Any:
    """Return a model with PEFT's DoRA, in float64, with all factors random."""
    fan_in_fan_out = isinstance(layer, Conv1D)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=["layer"],
        use_dora=True,
        fan_in_fan_out=fan_in_fan_out,
    )
    model = peft.get_peft_model(Wrapped(layer), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 4)
    return model


def peft_factors(theirs: nn.Module) -> dict[str, Any]:
    """Return PEFT's trained tensors by the names of our factors."""
    found = {}
    for key, parameter in theirs.named_parameters():
        for name, ours in (("_A", "A"), ("_B", "B"), ("magnitude", "d")):
            if parameter.requires_grad and name in key:
                found[ours] = parameter
    return found


def as_ours(found: dict[str, Any], transposed: bool) -> dict[str, Tensor]:
    """Return PEFT's tensors, or their gradients, in the shapes of our factors."""
    A, B, d = found["A"].flatten(1), found["B"].flatten(1), found["d"].flatten()
    # If dimension 1 of the weight is that of the outputs, PEFT's factors are of its transpose.
    return {"A": B.T, "B": A.T, "d": d} if transposed else {"A": A, "B": B, "d": d}


def norms(W: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(W, dim=[i for i in range(W.dim()) if i != dim])


@pytest.mark.parametrize("host", HOSTS)
def test_equal_to_peft(host: str) -> None:
    """With PEFT's factors, outputs, gradients and the merged weight equal PEFT's."""
    make, inputs, spec = HOSTS[host]
    torch.manual_seed(0)
    layer = make().double()
    W = layer.weight.detach().clone()
    ours: Any = Wrapped(copy.deepcopy(layer))
    theirs = with_peft_dora(layer)
    pl.attach(ours, spec, "layer")
    theirs_by_name = peft_factors(theirs)
    state = as_ours({key: tensor.detach() for key, tensor in theirs_by_name.items()}, spec.dim == 1)
    state["d"] = state["d"] - norms(W, spec.dim)
    pl.load_state_dict(ours, {f"layer.weight.{key}": value for key, value in state.items()})
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    found_y, expected_y = ours(x), theirs(x)
    assert_close(found_y, expected_y, rtol=1e-10, atol=1e-10)
    found_y.square().sum().backward()
    expected_y.square().sum().backward()
    gradients = as_ours({key: tensor.grad for key, tensor in theirs_by_name.items()}, spec.dim == 1)
    actual = zip(pl.state_dict(ours), pl.parameters(ours), strict=True)
    assert_close(
        {key.rpartition(".")[2]: parameter.grad for key, parameter in actual},
        gradients,
        rtol=1e-10,
        atol=1e-10,
    )
    pl.merge(ours)
    merged = theirs.merge_and_unload()
    assert_close(ours.layer.weight, merged.layer.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_base_at_the_start_and_at_strength_zero(dim: int, dtype: torch.dtype, exact: bool) -> None:
    """At the start, and at strength 0 after training, W' is bit-for-bit W.

    This holds for any strides, and for weights with rows or columns of zeros.
    """
    spec = pl.DoRA(rank=4, dim=dim, exact_gradient=exact)
    for seed in range(3):
        torch.manual_seed(seed)
        whole = torch.randn(33, 257, dtype=dtype)
        whole[5], whole[:, 5] = 0, 0
        for W in (whole, whole.T, whole[1:], whole[:, 1:], torch.randn(8, 6, 3, 3, dtype=dtype)):
            factors = spec.create(W)
            assert torch.equal(spec.apply(W, factors), W)
            moved = {key: torch.randn_like(factor) for key, factor in factors.items()}
            for found, strength in ((factors, 1.0), (moved, 0.0), (moved, torch.tensor(0.0))):
                assert torch.equal(spec.apply(W, found, strength), W)
                rescaled = spec.rescaled(W, found, strength)
                if rescaled is None:
                    assert exact
                else:
                    assert rescaled.change is not None
                    assert not rescaled.change.any()


@pytest.mark.parametrize("exact", [False, True])
def test_zero_rows(exact: bool) -> None:
    """A row of zeros, which has no direction, stays zero at first and gets finite gradients."""
    layer = nn.Linear(4, 5)
    layer.weight.data[2] = 0
    pl.attach(layer, pl.DoRA(rank=2, exact_gradient=exact), "weight")
    for read in (lambda: layer(torch.randn(3, 4)), lambda: layer.weight):
        gradients = torch.autograd.grad(read().sum(), pl.parameters(layer))
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert not layer.weight[2].any()


def test_exact_gradient() -> None:
    """With exact_gradient, gradients equal finite differences; without it, norms are constants."""
    torch.manual_seed(0)
    W = torch.randn(4, 5, dtype=torch.float64)
    factors = pl.DoRA(rank=2).create(W)
    inputs = [torch.randn_like(factor).requires_grad_() for factor in factors.values()]

    def call(*values: Tensor, exact: bool = True) -> Tensor:
        spec = pl.DoRA(rank=2, exact_gradient=exact)
        return spec.apply(W, dict(zip(factors, values, strict=True)), 0.7)

    assert torch.autograd.gradcheck(call, inputs)
    # Also at B = 0, where W' is W.
    start = [inputs[0], torch.zeros_like(inputs[1]).requires_grad_(), inputs[2]]
    assert torch.autograd.gradcheck(call, start)
    exact, constant = (
        torch.autograd.grad(call(*inputs, exact=flag).sum(), inputs) for flag in (True, False)
    )
    assert_close(exact[2], constant[2])
    assert not torch.allclose(exact[1], constant[1], rtol=0.1)


@pytest.mark.parametrize(("layer", "x"), [
    (nn.Linear(48, 64), torch.randn(8, 48)),
    (nn.Embedding(64, 48), torch.randint(64, (8,))),
])  # fmt: skip
@pytest.mark.parametrize("dim", [0, 1])
def test_forward_does_not_build_the_weight(
    layer: Any, x: Tensor, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward of a Linear and of an Embedding never calls `apply`, which builds W'."""
    layer = copy.deepcopy(layer)
    pl.attach(layer, pl.DoRA(rank=2, dim=dim), "weight")
    for parameter in pl.parameters(layer):
        nn.init.normal_(parameter)
    expected = layer.weight[x] if isinstance(layer, nn.Embedding) else None
    if expected is None:
        expected = nn.functional.linear(x, layer.weight, layer.bias)
    with monkeypatch.context() as patch:
        patch.delattr(pl.DoRA, "apply")
        found = layer(x)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_saved_for_the_backward() -> None:
    """Building W' saves W, the factors and a few numbers a row, but no second matrix."""
    W = torch.randn(64, 48)
    spec = pl.DoRA(rank=2)
    factors = {key: torch.randn_like(f).requires_grad_() for key, f in spec.create(W).items()}
    with keeping() as saved:
        spec.apply(W, factors)
    known = {tensor.untyped_storage().data_ptr() for tensor in (W, *factors.values())}
    sizes = {t.untyped_storage().data_ptr(): t.numel() for t in saved} | dict.fromkeys(known, 0)
    # B scaled by row, and some vectors with a number a row.
    assert sum(sizes.values()) <= 64 * 2 + 10 * 64


@pytest.mark.parametrize("dim", [0, 1])
def test_transforms(dim: int) -> None:
    """Under torch.func, checkpointing and torch.compile, gradients equal those of autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    pl.attach(model, pl.DoRA(rank=2, dim=dim))
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.add_(torch.randn(parameter.shape) / 4)
    x = torch.randn(7, 6, dtype=torch.float64)
    trained: dict[str, Any] = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def gradients(y: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(y.square().sum(), list(trained.values()))
        return dict(zip(trained, found, strict=True))

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    expected = gradients(model(x))
    assert_close(torch.func.grad(loss)(trained, x), expected)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x.unsqueeze(1))
    assert_close({key: value.sum(0) for key, value in rows.items()}, expected)
    step = torch.full_like(x, 1e-6)
    tangent = torch.func.jvp(model, (x,), (step / 1e-6,))[1]
    assert_close(tangent, (model(x + step) - model(x - step)) / 2e-6, rtol=1e-6, atol=1e-7)
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    assert_close(gradients(again), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled(x)), expected)
