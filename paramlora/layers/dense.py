"""Forwards that run torch's own code on the dense W', built once per forward.

The backward of such a layer needs x and W'. Keeping W' would cost as much memory as the weights of
the layer, so `dense` builds it again in the backward: see `_rebuilt`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.modes import transforms_active
from ..private_torch import KNOWS_HOOKS, flat_weight_names, saved_tensors_hooks, set_flat_weights
from ..routing import rows
from ..routing.row_groups import by_group
from ..site.find import parametrization_lists, stack_of, stored_tensors
from ..stack.built import build_once
from ..stack.stack import CHANGED


def dense(plain: Callable[..., Any], *, unknown: bool = False) -> Callable[..., Any]:
    """Return a forward that builds each W' once, and once more in the backward.

    Args:
        plain: the forward of the module's class.
        unknown: whether `plain` is not torch's, so that it may compute anything. Its rows cannot be
            routed, and it keeps W' for the backward.
    """

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not unknown and rows.route_of(self) is not None:
            return by_group(self, args, kwargs)
        # The compiler decides by itself what to build once and what to recompute.
        if transforms_active():
            return plain(self, *args, **kwargs)
        # torch's attention reads in_proj_weight half a dozen times.
        if unknown or not torch.is_grad_enabled():
            with build_once():
                return plain(self, *args, **kwargs)
        with build_once(), _rebuilt(self):
            return plain(self, *args, **kwargs)

    return forward


@contextmanager
def _rebuilt(module: nn.Module) -> Iterator[None]:
    """Save no W' of the module for the backward, but a closure that rebuilds it.

    Autograd saves the tensors that a backward needs. `saved_tensors_hooks` replaces each of them:
    `pack` is called in the forward and returns what is kept, `unpack` in the backward and returns
    the tensor. Three steps need care.

    1. torch's code saves W', or a view of it such as Wᵀ or the first third of `in_proj_weight`.
       A view has the storage of W', so storages are compared, and `unpack` makes the same view of
       the rebuilt tensor. The addresses stay valid, because `build_once` keeps each W' during the
       forward.
    2. Hooks do not nest. While these are set, torch does not call the user's hooks (activation
       checkpointing, offloading to the CPU). So every other tensor is passed to those here.
    3. Autograd raises an error if a saved tensor was written to before the backward. It does not
       check tensors that hooks have replaced. So their versions are kept and compared here, as
       `recipe` does for the factors.

    For the layer torch.nn.Bilinear, for example, the backward needs x₁, x₂ and W': x₁ and x₂ are
    packed as (version, tensor), W' as (recipe, its shape and strides).
    """
    recipes = {}
    for name, plist in parametrization_lists(module).items():
        stack = stack_of(plist)
        if stack is not None and stack.state().live and len(plist) == 1:
            built = getattr(module, name)
            if type(built) is Tensor and not built.is_meta:
                recipes[built.untyped_storage().data_ptr()] = stack.recipe(plist.original)
    if not recipes or not KNOWS_HOOKS:  # torch 2.6 keeps W'
        yield
        return
    outer = saved_tensors_hooks()

    def pack(tensor: Tensor) -> Any:
        recipe = recipes.get(tensor.untyped_storage().data_ptr())
        if recipe is not None:  # W' or a view of it, such as its transpose
            return recipe, (tensor.shape, tensor.stride(), tensor.storage_offset())
        return (None, outer[0](tensor)) if outer else (tensor._version, tensor)

    def unpack(packed: Any) -> Tensor:
        first, second = packed
        if callable(first):
            return first().as_strided(*second)
        if outer:
            return outer[1](second)
        if second._version != first:
            raise RuntimeError(CHANGED)
        return second

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def recurrent(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an adapted LSTM, GRU or RNN.

    torch's forward reads its weights into the list `_flat_weights` of the module. A W' left there
    would keep its graph alive, and another thread may be about to use its own list. So the forward
    runs on a stand-in, a second module object with the same attributes.
    """

    @functools.wraps(plain)
    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        if rows.route_of(self) is not None:
            return by_group(self, args, kwargs)
        if transforms_active():
            try:
                return plain(self, *args, **kwargs)
            finally:
                hold_stored(self)
        stand_in = object.__new__(type(self))
        stand_in.__dict__.update(vars(self))
        # torch's forward reads every weight three times.
        with build_once():
            return plain(stand_in, *args, **kwargs)

    return forward


def hold_stored(module: nn.RNNBase) -> None:
    """Put the stored weights into a recurrent module's list `_flat_weights`.

    torch's forward, and moving or casting the module, leave W' in that list. It would keep its
    graph alive there, and a tensor with a graph cannot be deep-copied.
    """
    set_flat_weights(module, [_stored(module, name) for name in flat_weight_names(module)])


def _stored(module: nn.RNNBase, name: str) -> Tensor | None:
    if name in module._parameters:
        return module._parameters[name]
    plist = parametrization_lists(module).get(name)
    return getattr(module, name, None) if plist is None else stored_tensors(plist)[0]
