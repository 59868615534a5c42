"""Direct reads and writes of an adapted weight; reads are never stale.

Notes on PEFT were checked with version 0.21.
"""

import copy
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import EXACT, unchanged
from tests.support.mixed import MATRICES, mixed, small, train
from tests.support.reference import floats, shake


class Direct(nn.Module):
    """A model that reads its layer's weight and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_functional_call_of_a_weight() -> None:
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
def test_output_projection_of_attention(batch_first: bool) -> None:
    """An adapter on `out_proj` is trained, though MultiheadAttention reads its weight directly.

    In PEFT an adapter on `out_proj` alone gets no gradient: that layer's forward never runs.
    """
    torch.default_generator.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with (
        torch.no_grad()
    ):  # with the identity as projection, the output is the input of the projection
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
    with torch.no_grad():  # the fast path of inference reads it too
        assert_close(model.eval()(x, x, x)[0], expected, **EXACT)


def test_plain_tensor() -> None:
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


def test_writing() -> None:
    """Writing to an adapted `.weight` has no effect; writing to the stored W or A has."""
    model = small()
    with unchanged(model), torch.no_grad():
        nn.init.zeros_(model[0].weight)
        model[0].weight.data.zero_()
    with (
        unchanged(model),
        pytest.raises(
            pl.StateError, match=r"would replace the base's.*load_base_state_dict, or detach"
        ),
    ):
        model[0].weight = nn.Parameter(torch.zeros(5, 6))
    with unchanged(model), pytest.raises(TypeError, match=r"cannot assign .* as parameter"):
        model[0].weight = torch.zeros(5, 6)
    x = torch.eye(6)
    for tensor in (pl.parameters(model)[1], pl.base_state_dict(model)["0.weight"]):
        before = model[0].weight.detach().clone()
        tensor.data[0] += 1
        assert not torch.equal(model[0].weight, before)
        assert_close(model[0](x), F.linear(x, model[0].weight, model[0].bias))


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def test_class_dtype_and_rank() -> None:
    """The layer keeps its class, its weight is dense in its dtype, and ΔW has rank r at most."""
    for dtype in DTYPES:
        model, x = mixed(dtype)
        base = copy.deepcopy(model)
        pl.attach(model, pl.LoRA(rank=2), MATRICES)
        train(model.eval(), x)
        assert isinstance(model.head, nn.Linear)
        assert isinstance(model.rnn, nn.GRU)
        for row in pl.summary(model).sites:
            owner, _, name = row.site.rpartition(".")
            read = getattr(model.get_submodule(owner), name)
            assert type(read) is Tensor
            assert read.dtype == dtype
            assert read.layout is torch.strided
            update = (read - base.get_parameter(row.site)).detach().double().flatten(1)
            assert update.any()
            # Rounding W + ΔW adds singular values of at most eps·‖W'‖.
            noise = torch.finfo(dtype).eps * float(read.detach().double().norm())
            assert torch.linalg.matrix_rank(update, atol=noise, rtol=0.0) <= 2


def hosts() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return modules whose forwards read weights in different ways, with inputs."""
    x = torch.randn(3, 2, 4)
    return {
        "linear": (nn.Linear(4, 4), (x,)),
        "conv": (nn.Conv1d(2, 4, 3), (x,)),
        "lstm": (nn.LSTM(4, 4), (x,)),
        "attention": (nn.MultiheadAttention(4, 2), (x, x, x)),
    }


@pytest.mark.parametrize("spec", [pl.LoRA(rank=2), pl.Delta()])
@pytest.mark.parametrize("host", hosts())
def test_reads_after_a_change(host: str, spec: pl.kinds.Spec) -> None:
    """Every forward and every read uses the current factors, also after a read under no_grad."""
    torch.default_generator.manual_seed(0)
    model, inputs = hosts()[host]
    pl.attach(model, spec, "*weight*")
    names = [row.site for row in pl.summary(model).sites if "." not in row.site]
    seen: list[Tensor] = []
    for _ in range(3):
        shake(model)
        with torch.no_grad():
            assert not any(getattr(model, name).requires_grad for name in names)
            no_grad_out = floats(model(*inputs))[0]
        assert all(getattr(model, name).requires_grad for name in names)
        out = floats(model(*inputs))[0]
        assert_close(out, no_grad_out)
        assert all(not torch.equal(out, before) for before in seen)
        grads = torch.autograd.grad(out.square().sum(), pl.parameters(model))
        assert all(grad.any() for grad in grads)
        seen.append(out)


class Waiting(pl.Delta):
    """A Delta that waits in `apply` until it may continue."""

    inside, go_on = threading.Event(), threading.Event()

    def apply(
        self, weight: Tensor, factors: Mapping[str, Tensor], strength: float | Tensor = 1.0
    ) -> Tensor:
        self.inside.set()
        self.go_on.wait(30)
        return super().apply(weight, factors, strength)


@pytest.mark.parametrize("host", hosts())
def test_reads_beside_another_thread(host: str) -> None:
    """Reads are current while another thread is inside a forward of another model."""
    (model, inputs), (other, _) = hosts()[host], hosts()[host]
    pl.attach(model, pl.Delta(), "*weight*")
    Waiting.go_on.set()
    pl.attach(other, Waiting(), "*weight*")
    Waiting.go_on.clear()
    Waiting.inside.clear()
    thread = threading.Thread(target=lambda: other(*inputs))
    thread.start()
    try:
        assert Waiting.inside.wait(30)
        with torch.no_grad():
            before = floats(model(*inputs))[0]
        shake(model)
        after = floats(model(*inputs))[0]
        assert after.requires_grad
        assert not torch.equal(before, after)
    finally:
        Waiting.go_on.set()
        thread.join()


class Pausing(nn.LSTM):
    """An LSTM that can pause between reading its weights and using them."""

    paused, inside, go_on = False, threading.Event(), threading.Event()

    def check_forward_args(self, *args: Any) -> None:
        if self.paused:
            self.inside.set()
            self.go_on.wait(30)
        super().check_forward_args(*args)


def test_two_threads_in_one_recurrent_module() -> None:
    """A forward in one thread does not change the weights that another is about to use."""
    model, x = Pausing(4, 4), torch.randn(3, 2, 4)
    pl.attach(model, pl.LoRA(rank=2), "weight*")
    shake(model)
    expected, found = model(x)[0].detach(), []
    model.paused = True
    thread = threading.Thread(target=lambda: found.append(model(x)[0].detach()))
    thread.start()
    try:
        assert model.inside.wait(30)
        model.paused = False
        model(x)
    finally:
        model.go_on.set()
        thread.join()
    assert_close(found, [expected])
