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
from ..errors import StateError
from ..routing import rows
from ..routing.row_groups import by_group
from ..site.find import parametrization_lists, stack_of
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


def check_quantizable(module: Any, name: str, packed: Any) -> None:
    """Raise a StateError if a library cannot quantize a tensor below its adapters."""
    plist: Any = parametrization_lists(module)[name]
    stack: Any = stack_of(plist)
    parts = [part for adapter in stack.named for part in stack.parts(adapter)]
    fits = isinstance(module, nn.Linear) and packed.shape == plist.original.shape
    fits = fits and name == "weight" and not stack.merged
    if not fits or any(part.low_rank() is None for part in parts):
        raise StateError(
            f"cannot quantize {name!r} of this {type(module).__bases__[0].__name__} below its "
            "adapters, which takes LoRA on the weight of a Linear, not merged: detach, quantize, "
            "and attach then"
        )


def put_below_hook(module: nn.Module) -> Any:
    """Make the hooks of accelerate call the forward of the class; return what they called."""
    called = vars(module).get(BELOW_HOOK)
    if called is not None:
        vars(module)[BELOW_HOOK] = MethodType(type(module).forward, module)
    return called
