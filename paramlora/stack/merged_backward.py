"""A backward through a merged adapter raises, because its factors would silently get no gradient.

    W_stored = W + ΔW        a number: the graph from the factors to W_stored was not kept

Training on after `merge` would leave the factors where they are. So while an adapter is merged and
its factors require a gradient, the forward of an adapted layer reads a tensor with the values of
W_stored and a hook that raises when a backward reaches it. `torch.autograd.grad(loss, inputs)` does
not reach it. Code that reads `layer.weight` itself gets the stored parameter, as always while an
adapter is merged; there `audit` and `summary` tell.
"""

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..errors import StateError, some
from ..private_torch import forward_ad_active, functorch_active, tracing_state


def trained(factors: Iterable[nn.Module]) -> bool:
    """Return whether a backward would be expected to reach one of these merged factors."""
    # Compilers and transforms record a graph of their own, which cannot contain a hook that raises.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if functorch_active() or forward_ad_active() or tracing_state() is not None:
        return False
    return any(p.requires_grad for one in factors for p in one.parameters())


def refuse_backward(weight: Tensor, names: Iterable[str]) -> Tensor:
    """Return a tensor with the values of `weight` through which a backward raises.

    Args:
        weight: a stored weight that contains merged adapters.
        names: these adapters.
    """
    listed = some(repr(name) for name in names)

    def refuse(gradient: Tensor) -> NoReturn:
        raise StateError(
            f"cannot train adapter {listed} while it is merged: its factors would get no gradient; "
            "unmerge it before the forward. To differentiate with respect to other tensors, such "
            "as the input, freeze its factors first: freeze(model)"
        )

    # A new tensor, because the hook must not stay at the parameter.
    read = weight.view_as(weight) if weight.requires_grad else weight.detach().requires_grad_()
    read.register_hook(refuse)
    return read
