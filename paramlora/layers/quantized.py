"""The forward of a quantized linear layer: its own one, plus the updates in factored form.

    y = module(x) + s · B (A x)        in training with dropout: s · B (A D(x))

The gradient of x through the quantized product is that of the layer's library. Off, the layer
runs its own code alone.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..compute import lowrank
from ..routing import rows
from ..routing.row_groups import by_group
from ..site.find import stack_of
from ..site.quantized import BELOW_HOOK


def quantized_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an adapted layer; `plain` is the one of its class."""

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        plists: Any = self._modules["parametrizations"]._modules  # type: ignore[union-attr]
        stack: Any = stack_of(plists.get("weight"))
        state = None if stack is None else stack.state()
        drops = state is not None and stack.drops and self.training
        alone = state is not None and len(plists) == 1 and not drops
        if not alone and rows.route_of(self) is not None:
            return by_group(self, args, kwargs)
        y = plain(self, *args, **kwargs)
        if state is None or not (state.live or state.route):
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        if state.route is not None:
            terms = state.route.terms(stack, state)
            return rows.add_updates(x.to(y.dtype), y, state.route, stack, terms)
        rest, dropped = stack.dropped(state) if drops else (state, ())
        if rest.live:
            y = lowrank.add_update(y, x, *stack.low_rank(rest))
        for term, p in dropped:
            y = lowrank.add_update(y, F.dropout(x, p), term)
        return y

    return forward


def put_below_hook(module: nn.Module) -> Any:
    """Make the hooks of accelerate call the forward of the class; return what they called."""
    called = vars(module).get(BELOW_HOOK)
    if called is not None:
        vars(module)[BELOW_HOOK] = MethodType(type(module).forward, module)
    return called
