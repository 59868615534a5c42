"""The forwards of an adapted Linear and of transformers' Conv1D."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..compute import lowrank
from ..compute.rescaled import rescaled_linear
from ..site.find import parametrization_lists
from ..site.stack import Stack
from ..site.tie import Tie
from . import rows
from .dense import dense


def alone(module: nn.Module) -> tuple[Tensor, Stack] | None:
    """Return the stored weight and its stack; None if there is another parametrization.

    It avoids nn.Module.__getattr__, which would take most of the time of a small layer's forward.
    """
    plist = module._modules["parametrizations"]._modules.get("weight")  # type: ignore[union-attr]
    if plist is None or len(plist._modules) != 1:
        return None
    stack = plist._modules["0"]
    if type(stack) is not Stack:
        if type(stack) is not Tie:
            return None
        stack = stack.stack
    weight = module._parameters.get("weight")
    return (plist.original if weight is None else weight), stack  # type: ignore[return-value]


@functools.wraps(nn.Linear.forward)
def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    # See Note [the choice of forward] in forward.py.
    site = alone(self)
    if site is not None:
        weight, stack = site
        state = stack.state()
        if state.route is None:
            terms = stack.low_rank(state)
            if terms is not None:
                return lowrank.linear(input, weight, self.bias, terms)
            rescaled = stack.rescaled(weight, state)
            if rescaled is not None:
                return rescaled_linear(input, weight, self.bias, rescaled)
        elif len(parametrization_lists(self)) == 1:
            output = rows.linear(input, weight, self.bias, stack, state)
            if output is not None:
                return output
    return dense_linear(self, input)


def conv1d_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of transformers' Conv1D: a Linear whose weight is stored as (in, out)."""
    run_dense = dense(plain)

    @functools.wraps(plain)
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        site = alone(self)
        output = None
        if site is not None:
            W, stack = site[0].t(), site[1]
            state = stack.state()
            if state.route is None:
                terms = stack.low_rank(state)
                if terms is not None:
                    terms = [term.transposed() for term in terms]
                    output = lowrank.linear(x, W, self.bias, terms)  # type: ignore[arg-type]
            elif len(parametrization_lists(self)) == 1:
                output = rows.linear(x, W, self.bias, stack, state, transposed=True)  # type: ignore[arg-type]
        return run_dense(self, x) if output is None else output

    return forward


dense_linear = dense(nn.Linear.forward)
