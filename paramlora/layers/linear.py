"""The forwards of an adapted Linear and of transformers' Conv1D."""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..compute import lowrank
from ..compute.rescaled import rescaled_linear
from ..errors import StateError
from ..routing import rows
from ..routing.row_groups import only
from ..site.find import parametrization_lists, stack_of
from ..site.tie import Tie
from ..stack.overlay import ENTERED, State, state_within
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
            if stack.drops and self.training:
                output = _with_dropout(self, linear_forward, input, weight, bias, stack, state)
                if output is not None:
                    return output
            terms = stack.low_rank(state)
            if terms is not None:
                return lowrank.linear(input, weight, bias, terms, compiling)
            rescaled = stack.rescaled(weight, state)
            if rescaled is not None:
                return rescaled_linear(input, weight, bias, rescaled)
        elif single and not (stack.drops and self.training):
            output = rows.linear(input, weight, bias, stack, state)
            if output is not None:
                return output
    else:
        _check_dropout(self)
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
            drops = stack.drops and self.training
            if state.route is None and (single or rows.route_of(self) is None):
                if drops:
                    output = _with_dropout(self, forward, x, W, self.bias, stack, state, True)  # type: ignore[arg-type]
                    if output is not None:
                        return output
                terms = stack.low_rank(state)
                if terms is not None:
                    terms = [term.transposed() for term in terms]
                    output = lowrank.linear(x, W, self.bias, terms)  # type: ignore[arg-type]
            elif single and not drops:
                output = rows.linear(x, W, self.bias, stack, state, transposed=True)  # type: ignore[arg-type]
        else:
            _check_dropout(self)
        return run_dense(self, x) if output is None else output

    return forward


def _with_dropout(
    module: nn.Module,
    forward: Callable[..., Tensor],
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    stack: Stack,
    state: State,
    transposed: bool = False,
) -> Tensor | None:
    """Return the output in training mode, None if no live adapter has dropout.

    The other adapters, without dropout, take one of the paths of Note [the choice of forward].
    """
    rest, dropped = stack.dropped(state)
    if not dropped:
        return None
    others = stack.low_rank(rest)
    if others is None:
        with only(module, rest.live):
            y = forward(module, x)
    else:
        others = [term.transposed() for term in others] if transposed else others
        y = lowrank.linear(x, W, b, others)
    for term, p in dropped:
        y = lowrank.add_update(y, F.dropout(x, p), term.transposed() if transposed else term)
    return y


def _check_dropout(module: nn.Module) -> None:
    """Raise a StateError if an adapter should drop elements, and W' would be computed without."""
    stack = stack_of(parametrization_lists(module).get("weight"))
    if module.training and stack is not None and stack.drops and stack.dropped(stack.state())[1]:
        raise StateError(
            f"a parametrization of a {type(module).__bases__[0].__name__} was registered on top "
            "of an adapter with dropout, which acts on the input of the layer; remove one of them"
        )


dense_linear = dense(nn.Linear.forward)
