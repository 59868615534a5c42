"""Contestants on the models of a cell, and their check against float64 before they are timed.

    overhead = time / time of the floor - 1

The floor is the same model, frozen and without an adapter. Its training step computes the gradient
of the input, as it would inside a larger network.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contestants import Contestant, Factors, linears, set_factors
from .models import Cell

Values = dict[str, tuple[Tensor, Tensor]]

# Upper bounds of the relative error, by the dtype of the products. Rounding stays below them.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass
class Entry:
    """A contestant that is ready to be timed in one cell."""

    contestant: Contestant
    model: nn.Module
    factors: Factors
    run: Callable[[Tensor], Tensor]


@dataclass
class Case:
    """A cell with its base model, its input, and the factors that all contestants get."""

    cell: Cell
    base: nn.Module
    x: Tensor
    values: Values
    alpha: float

    @classmethod
    def create(cls, cell: Cell, device: str) -> "Case":
        """Create the model, the input and the factors of a cell from seed 0."""
        torch.manual_seed(0)
        base = cell.model().to(device, cell.dtype).requires_grad_(False)
        x = torch.randn(cell.shape, device=device, dtype=cell.dtype)
        values = {
            path: (
                torch.randn(cell.rank, layer.in_features, device=device) / cell.rank,  # A: (r, k)
                torch.randn(layer.out_features, cell.rank, device=device) * 0.02,  # B: (m, r)
            )
            for path, layer in linears(base).items()
        }
        return cls(cell, base, x, values, 2.0 * cell.rank)

    def prepare(self, contestant: Contestant, mode: str) -> Entry:
        """Return a contestant on a copy of the base.

        Args:
            contestant: the contestant.
            mode: "eager", "compiled", or "graphs" for `torch.compile` with CUDA graphs.
        """
        model, factors = contestant.build(copy.deepcopy(self.base), self.cell.rank, self.alpha)
        set_factors(factors, self.values)
        if contestant.finish is not None:
            contestant.finish(model)
        run: Callable[[Tensor], Tensor] = model
        if mode != "eager":
            compile_mode = "reduce-overhead" if mode == "graphs" else "default"
            run = torch.compile(_own_code(model), dynamic=False, mode=compile_mode, fullgraph=True)
        if self.cell.autocast is not None:
            run = torch.autocast(self.x.device.type, self.cell.autocast)(run)
        return Entry(contestant, model, factors, run)


def _own_code(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function with a code object of its own that calls the model.

    torch.compile keeps its graphs by code object, and runs code with more than eight graphs
    uncompiled. All contestants share the code of `nn.Sequential.forward`, for example.
    """

    def run(x: Tensor) -> Tensor:
        return model(x)

    run.__code__ = run.__code__.replace()
    return run


def train_step(entry: Entry, x: Tensor) -> Tensor:
    """Run forward and backward, with the gradients of the factors and of x; return the output."""
    x.grad = None
    for pair in entry.factors.values():
        for factor in pair:
            factor.grad = None
    y = entry.run(x)
    y.backward(torch.ones_like(y))
    return y


@torch.no_grad()
def infer(entry: Entry, x: Tensor) -> Tensor:
    """Run forward without gradients; return the output."""
    return entry.run(x)


def check(case: Case, entry: Entry) -> float:
    """Return the largest relative error of outputs and gradients.

    The reference is the base in float64 with dense weights V = W + s · BA, or for DoRA c ⊙ V with
    c = ‖W‖ / ‖V‖, a constant of the backward.

    Raises:
        AssertionError: if the error exceeds the bound of the cell's dtype.
    """
    x = case.x.clone().requires_grad_()
    y = train_step(entry, x)
    reference = copy.deepcopy(case.base).double()
    s = case.alpha / case.cell.rank
    c: dict[str, Tensor | float] = dict.fromkeys(case.values, 1.0)
    if entry.factors and entry.contestant.active:
        for path, layer in linears(reference).items():
            A, B = (value.double() for value in case.values[path])
            V = layer.weight + s * B @ A
            if entry.contestant.dora:
                c[path] = (layer.weight.norm(dim=1) / V.norm(dim=1)).unsqueeze(1)  # (m, 1)
            layer.weight = nn.Parameter(c[path] * V)
    x64 = case.x.double().requires_grad_()
    y64 = reference(x64)
    y64.backward(torch.ones_like(y64))
    pairs: list[Any] = [(y, y64), (x.grad, x64.grad)]
    for path, (A, B) in entry.factors.items() if entry.contestant.trained else ():
        dW = reference.get_parameter(f"{path}.weight").grad
        assert dW is not None
        dW = c[path] * dW
        A64, B64 = (value.double() for value in case.values[path])
        pairs += [(A.grad, s * B64.T @ dW), (B.grad, s * dW @ A64.T)]
    worst = max(relative_error(found, expected) for found, expected in pairs)
    assert worst < BOUNDS[case.cell.products], (
        f"{entry.contestant.name} is off by {worst:.1e} in {case.cell}; not timed"
    )
    return worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖, computed in the dtype of `expected`."""
    expected = expected.detach()
    return float((found.detach().to(expected.dtype) - expected).norm() / expected.norm())
