"""The forwards of an adapted Linear and of transformers' Conv1D."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..compute import lowrank
from ..compute.rescaled import rescaled_linear
from ..routing import rows
from ..site.find import parametrization_lists
from ..site.tie import Tie
from ..stack.overlay import ENTERED, state_within
from ..stack.stack import Stack
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
        # As stack.state(), in line and asking the compiler once: a small layer feels every call.
        compiling = is_compiling()
        if compiling:
            state = stack.traced()
        elif ENTERED.get() is None and not stack.open:
            state = stack.own
        else:
            state = state_within(stack)
        single = len(self._modules["parametrizations"]._modules) == 1  # type: ignore[union-attr]
        own = self._parameters
        # nn.Module.__getattr__ takes as long as all of the above.
        bias = own["bias"] if single and "bias" in own else self.bias
        if state.route is None and (single or rows.route_of(self) is None):
            terms = stack.low_rank(state)
            if terms is not None:
                return lowrank.linear(input, weight, bias, terms, compiling)
            rescaled = stack.rescaled(weight, state)
            if rescaled is not None:
                return rescaled_linear(input, weight, bias, rescaled)
        elif single:
            output = rows.linear(input, weight, bias, stack, state)
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
            single = len(parametrization_lists(self)) == 1
            if state.route is None and (single or rows.route_of(self) is None):
                terms = stack.low_rank(state)
                if terms is not None:
                    terms = [term.transposed() for term in terms]
                    output = lowrank.linear(x, W, self.bias, terms)  # type: ignore[arg-type]
            elif single:
                output = rows.linear(x, W, self.bias, stack, state, transposed=True)  # type: ignore[arg-type]
        return run_dense(self, x) if output is None else output

    return forward


dense_linear = dense(nn.Linear.forward)
