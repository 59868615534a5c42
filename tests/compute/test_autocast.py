"""A factored Linear under torch.autocast, by each implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.compute import lowrank
from paramlora.compute import plan as paths
from paramlora.kinds.spec import LowRank
from tests.support.helpers import BOUNDS, error, keeping, leaves

# A part of the name of the layer's autograd node, by implementation.
NODES = {"plain": "Add", "function": "_Linear", "native": "CppNode"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", ["forward", "both", "half x", "half W"])
@pytest.mark.parametrize("shape", [(60, 7), (4, 15, 7)], ids=str)
def test_values_and_gradients(
    implementation: str, shape: tuple[int, ...], inside: str, dtype: torch.dtype
) -> None:
    """Outputs have autocast's dtype, gradients their tensors' dtypes, and values match float64.

    `inside` says which part runs in autocast or already has the lower dtype. "both" also runs the
    backward pass in autocast, which torch advises against.
    """
    _, W, b, A, B = leaves(1, 7, 5, torch.float32)
    x = torch.randn(shape)
    x = x.to(dtype) if inside == "half x" else x
    W, b = (t.detach().to(dtype) if inside == "half W" else t.detach() for t in (W, b))
    tensors = [x.requires_grad_(), b.requires_grad_(), A, B]
    with torch.autocast("cpu", dtype):
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
        dy = torch.randn_like(y)
    with torch.autocast("cpu", dtype, enabled=inside == "both"):
        grads = torch.autograd.grad(y, tensors, dy)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    reference = F.linear(exact[0], W.double() + 0.7 * exact[3] @ exact[2], exact[1])
    expected = torch.autograd.grad(reference, exact, dy.double())
    assert y.grad_fn is not None
    assert NODES[implementation] in y.grad_fn.name()
    assert y.dtype == dtype
    assert error(y, reference.detach()) < BOUNDS[dtype]
    for tensor, grad, reference_grad in zip(tensors, grads, expected, strict=True):
        assert grad.dtype == tensor.dtype
        assert error(grad, reference_grad) < BOUNDS[dtype]


@pytest.mark.parametrize("autocast", [False, True])
def test_second_derivatives(implementation: str, autocast: bool) -> None:
    """Second derivatives reach float32 factors through their casts."""
    dtype = torch.bfloat16
    x, W, b, A, B = leaves(60, 7, 5, torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, W, b, A, B)]
    dense = F.linear(exact[0], exact[1] + 0.7 * exact[4] @ exact[3], exact[2])
    found = []
    for out, tensors in ((y, [x, A, B]), (dense, [exact[0], exact[3], exact[4]])):
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        total = torch.stack([grad.square().sum() for grad in first]).sum()
        found.append(torch.autograd.grad(total, tensors))
    for grad, reference_grad in zip(*found, strict=True):
        assert error(grad, reference_grad) < 3 * BOUNDS[dtype]


def test_zero_update(implementation: str) -> None:
    """With B = 0 the output is bit-for-bit the base's."""
    x, W, b, A, B = leaves(60, 7, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (x, x.bfloat16()):
            y = lowrank.linear(rows, W, b, [LowRank(A, 0 * B, 0.7)])
            assert_close(y, F.linear(rows, W, b), rtol=0, atol=0)


def test_backward_under_autocast(implementation: str) -> None:
    """With autocast around the backward only, gradients are those of float32, up to rounding."""
    x, W, b, A, B = tensors = leaves(60, 7, 5, torch.float32)
    y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, tensors, dy)
    bound = BOUNDS[torch.float32 if implementation == "native" else torch.bfloat16]
    for grad, reference_grad in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad, reference_grad.double()) < bound


@pytest.mark.parametrize("cache", [False, True])
def test_cast_of_a_trained_weight(implementation: str, cache: bool) -> None:
    """Several calls share autocast's cached cast of a trained weight."""
    x, W, b, A, B = tensors = leaves(60, 7, 5, torch.float32)
    half = torch.bfloat16
    with torch.autocast("cpu", half, cache_enabled=cache), keeping() as kept:
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
        y = y + lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    copies = {t.data_ptr() for t in kept if t.dtype is half and t.numel() == 5 * 7}
    assert len(copies) == (1 if cache else 2)
    found = torch.autograd.grad(y.float().sum(), tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    dense = F.linear(exact[0], exact[1] + 0.7 * exact[4] @ exact[3], exact[2])
    expected = torch.autograd.grad(2 * dense.sum(), exact)
    for grad, reference_grad in zip(found, expected, strict=True):
        assert error(grad, reference_grad) < BOUNDS[half]


def test_optimizer_step_between_two_backwards(implementation: str) -> None:
    """Each backward uses the factors of its forward, as casts do in a plain model."""
    x, W, b, A, B = leaves(60, 7, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (lowrank.linear(x, W.detach(), b, [LowRank(A, B, 0.7)]) for _ in "12")
    expected = torch.autograd.grad(first.float().sum(), [x, A, B])
    with torch.no_grad():
        A.add_(1)
        B.add_(1)
    assert_close(torch.autograd.grad(second.float().sum(), [x, A, B]), expected)


@pytest.mark.parametrize("wrong", [torch.uint8, torch.complex64, torch.float64], ids=str)
def test_dtypes_that_autocast_does_not_cast(implementation: str, wrong: torch.dtype) -> None:
    """An input or a bias that torch rejects under autocast raises here too."""
    x, W, b, A, B = (tensor.detach() for tensor in leaves(60, 7, 5, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        for given in ((x.to(wrong), W, b), (x, W, b.to(wrong))):
            with pytest.raises(RuntimeError, match="type"):
                F.linear(*given)
            with pytest.raises(RuntimeError, match="type"):
                lowrank.linear(*given, [LowRank(A, B, 0.7)])


def test_autocast_of_another_device(implementation: str) -> None:
    """Autocast for GPUs does not change products on the CPU."""
    x, W, b, A, B = leaves(60, 7, 5, torch.float32)
    expected = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        found = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert_close(found, expected, rtol=0, atol=0)


def test_float64(implementation: str) -> None:
    """Autocast does not cast float64, and neither does a factored Linear."""
    x, W, b, A, B = leaves(60, 7, 5, torch.float64)
    expected = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    with torch.autocast("cpu", torch.bfloat16):
        found = lowrank.linear(x, W, b, [LowRank(A, B, 0.7)])
    assert_close(found, expected, rtol=0, atol=0)


def test_saved_tensors(implementation: str) -> None:
    """The forward saves x, W, the hidden rows and the factors in autocast's dtype.

    Like a frozen plain layer, it saves W only if x requires a gradient. With so many rows, a
    layer in float32 would save W' instead of the hidden rows. In half precision, W' would lose
    small updates.
    """
    layer = nn.Linear(64, 48).requires_grad_(False)
    pl.attach(layer, pl.LoRA(rank=4), "weight")
    x = torch.randn(512, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with keeping() as saved:
            layer(x)
        with keeping() as without:
            layer(x.detach())
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved_by_storage = {t.untyped_storage().data_ptr(): t for t in saved}
    sizes = sorted(t.nbytes for ptr, t in saved_by_storage.items() if ptr not in parameters)
    assert implementation == "plain" or not any(t.numel() == 48 * 64 for t in without)
    rows, factors = [2 * 512 * 64, 2 * 512 * 4], [2 * 4 * 48, 2 * 4 * 64]
    assert sizes == sorted([*rows, *factors, 2 * 48 * 64])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [False, True])
def test_on_a_gpu(
    implementation: str, kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients on a GPU, with the Triton kernels and without."""
    monkeypatch.setattr(paths, "WORTH_A_KERNEL", 0 if kernel else 2**63)
    monkeypatch.setattr(paths, "WORTH_PYTHON", 0)
    drawn = leaves(300, 150, 200, torch.float32, rank=16)
    x, W, b, A, B = tensors = [tensor.detach().cuda().requires_grad_() for tensor in drawn]
    with torch.autocast("cuda", dtype, cache_enabled=False):
        y = lowrank.linear(x, W, b, [LowRank(A, B, 0.1)])
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    dense = F.linear(exact[0], exact[1] + 0.1 * exact[4] @ exact[3], exact[2])
    dy = torch.randn_like(y)
    assert y.dtype == dtype
    assert error(y, dense.detach()) < BOUNDS[dtype]
    found = torch.autograd.grad(y, tensors, dy)
    expected = torch.autograd.grad(dense, exact, dy.double())
    for grad, reference_grad in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad, reference_grad) < BOUNDS[dtype]
