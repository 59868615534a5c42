"""Reads are never stale: after a change, after a read under no_grad, or with other threads."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.reference import floats, shake


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
def test_nothing_stale_is_read(host: str, spec: pl.kinds.Spec) -> None:
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
            without = floats(model(*inputs))[0]
        assert all(getattr(model, name).requires_grad for name in names)
        out = floats(model(*inputs))[0]
        assert_close(out, without)
        assert all(not torch.equal(out, before) for before in seen)
        grads = torch.autograd.grad(out.square().sum(), pl.parameters(model))
        assert all(grad.any() for grad in grads)
        seen.append(out)


class Waiting(pl.Delta):
    """A Delta that waits while it is applied, until it may continue."""

    inside, go_on = threading.Event(), threading.Event()

    def apply(
        self, weight: Tensor, factors: Mapping[str, Tensor], strength: float | Tensor = 1.0
    ) -> Tensor:
        self.inside.set()
        self.go_on.wait(30)
        return super().apply(weight, factors, strength)


@pytest.mark.parametrize("host", hosts())
def test_other_threads_share_nothing(host: str) -> None:
    """Reads are not stale while another thread is inside a forward of another model."""
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


def test_threads_share_a_recurrent_module() -> None:
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
