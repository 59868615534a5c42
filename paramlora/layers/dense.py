"""Forwards that run torch's own code on the dense W', built once a forward and not kept."""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.modes import transforms_active
from ..site.find import lists, stack_of, stored
from ..site.stack import CHANGED, once
from . import rows


def dense(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that builds each W' once, and again for the backward: it keeps none."""

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if rows.route_of(self) is not None:
            return rows.by_group(self, args, kwargs)
        # The compiler finds repeated reads, and what to recompute, by itself.
        if transforms_active():
            return plain(self, *args, **kwargs)
        # torch's attention reads in_proj_weight half a dozen times.
        with once(), _rebuilt(self) if torch.is_grad_enabled() else nullcontext():
            return plain(self, *args, **kwargs)

    return forward


def read_once(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that builds each W' once, however often it reads it."""

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if transforms_active():
            return plain(self, *args, **kwargs)
        with once():
            return plain(self, *args, **kwargs)

    return forward


# Not there in torch 2.6, which then keeps W' for the backward.
_outer_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@contextmanager
def _rebuilt(module: nn.Module) -> Iterator[None]:
    """Keep no W' of the module for the backward: rebuild it there from what it was made of."""
    recipes = {}
    for name, plist in lists(module).items():
        stack = stack_of(plist)
        if stack is not None and stack.live and len(plist) == 1:
            built = getattr(module, name)
            if type(built) is Tensor and not built.is_meta:
                recipes[built.untyped_storage().data_ptr()] = stack.recipe(plist.original)
    if not recipes or _outer_hooks is None:
        yield
        return
    # Hooks hide the ones outside (checkpointing, offloading), so what is not W' is handed on.
    outer = _outer_hooks(False)

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
    @functools.wraps(plain)
    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        if rows.route_of(self) is not None:
            return rows.by_group(self, args, kwargs)
        if transforms_active():
            try:
                return plain(self, *args, **kwargs)
            finally:
                hold_stored(self)
        # torch's forward leaves the weights that it used in a list of the module, where W' would
        # keep the graph alive, and where another thread may be about to use its own.
        stand_in = object.__new__(type(self))
        stand_in.__dict__.update(vars(self))
        # It reads every weight three times.
        with once():
            return plain(stand_in, *args, **kwargs)

    return forward


def hold_stored(module: nn.RNNBase) -> None:
    """Let a recurrent module's list of its weights hold what is stored.

    torch's forward, and moving or casting the module, leave W' there, which would keep the graph
    alive; and a tensor with a graph cannot be deep-copied.
    """
    held = lists(module)
    weights = [
        stored(held[name])[0] if name in held else getattr(module, name, None)
        for name in module._flat_weights_names
    ]
    module._flat_weights = weights
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]  # type: ignore[arg-type]
