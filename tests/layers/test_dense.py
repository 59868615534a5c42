"""Layers that compute with a dense W': what they keep for the backward, and what they read once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.reference import shake


def bilinear() -> nn.Bilinear:
    torch.manual_seed(0)
    return nn.Bilinear(3, 4, 2)


class Wrapper(torch.Tensor):
    """A tensor subclass that computes on the tensor `plain` and has no storage of its own."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> "Wrapper":
        new = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)
        new.plain = plain
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrapped(value: Any) -> Any:
            return value.plain if isinstance(value, Wrapper) else value

        out = op(*torch.utils._pytree.tree_map(unwrapped, args), **(kwargs or {}))
        return torch.utils._pytree.tree_map(lambda x: cls(x) if type(x) is Tensor else x, out)


def test_tensor_subclass() -> None:
    """A layer whose W' is a tensor subclass without storage has the gradients of a plain one."""
    grads = []
    for wrap in (lambda tensor: tensor, Wrapper):
        layer = bilinear()
        layer.weight = nn.Parameter(wrap(layer.weight.detach()))
        pl.attach(layer, pl.LoRA(2), "weight", generator=torch.Generator().manual_seed(0))
        x, y = torch.ones(5, 3, requires_grad=True), torch.ones(5, 4)
        layer(x, y).sum().backward()
        assert x.grad is not None
        grads.append(getattr(x.grad, "plain", x.grad))
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_write_to_an_input_before_the_backward(device: str) -> None:
    """It raises. On the meta device no tensor has an address, and no input is taken for W'."""
    layer = bilinear().to(device)
    pl.attach(layer, pl.LoRA(2), "weight")
    x, y = (torch.ones(5, size, device=device, requires_grad=True) * 1 for size in (3, 4))
    out = layer(x, y)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        out.sum().backward()


class Parent(nn.Module):
    """A module with a tensor, which it reads before and after its child writes to a factor."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 3))
        self.child = child

    def forward(self, write: Callable[[], object]) -> tuple[Tensor, Tensor]:
        before = self.table.detach().clone()
        write()
        return before, self.table.detach().clone()


def test_module_with_children_reads_again() -> None:
    """W' is built once a forward only in a module whose parameters are all its own."""
    for child, built_again in ((nn.Linear(3, 3), True), (nn.Identity(), False)):
        model = Parent(child)
        pl.attach(model, pl.LoRA(1), "table")
        shake(model)

        def write(model: nn.Module = model) -> None:
            with torch.no_grad():
                for factor in pl.parameters(model):
                    factor.mul_(2)

        before, after = model(write)
        assert torch.equal(before, after) != built_again
