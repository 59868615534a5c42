"""The forwards of adapted layers: factored where that is possible, else dense with W' built once.

A host module gets one of these as the forward of its class where its own forward is torch's and
computes the same (`forward_for`); it costs a look at the stack. A Linear or an Embedding never
builds W' in training (but see `paths.choose` for many rows); where an active adapter has no
factored or rescaled form, or another parametrization is on the tensor, and for all other layers,
torch's own forward runs on the dense W', which is built once a forward and again for the backward.

What is kept for the backward: of a factored layer x and x Aᵀ, of a dense one x, and never W'.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compute import lowrank
from ..compute import rescaled as rescaling
from ..compute.plan import transformed
from ..kinds.spec import LowRank, add_update
from ..site.stack import CHANGED, Stack, exact, lists, once, stack_of, stored
from . import rows


def forward_for(cls: type[nn.Module], *, alone: bool) -> Callable[..., Any] | None:
    """Return the forward for adapted modules of class `cls`, None where its own will do.

    `alone` says that the module has all its parameters itself, none in modules inside.
    """
    for base, forward in _FORWARDS.items():
        # Not for a subclass with a forward of its own: that one has to run, and reads W'.
        if issubclass(cls, base) and cls.forward is base.forward:
            return forward
    # Told by its name: to import transformers only to look would take seconds.
    if (cls.__module__, cls.__qualname__) == ("transformers.pytorch_utils", "Conv1D"):
        return _conv1d(cls.forward)
    # A loop over experts reads the stack of their weights once for each.
    return _read_once(cls.forward) if alone and not cls.__module__.startswith("torch.") else None


def _alone(module: nn.Module) -> tuple[Tensor, Stack] | None:
    """Return the stored weight and its stack, None where that is not all there is at the weight.

    It reads past the modules' `__getattr__`: at small sizes that is what a forward costs.
    """
    plist = module._modules["parametrizations"]._modules.get("weight")  # type: ignore[union-attr]
    if plist is None or len(plist._modules) != 1:
        return None
    stack = plist._modules["0"]
    return (plist._parameters["original"], stack) if type(stack) is Stack else None  # type: ignore[return-value]


@functools.wraps(nn.Linear.forward)
def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    site = _alone(self)
    if site is not None:
        weight, stack = site
        if stack.route is None:
            terms = stack.low_rank()
            if terms is not None:
                return lowrank.linear(input, weight, self.bias, terms)
            rescaled = stack.rescaled(weight)
            if rescaled is not None:
                return rescaling.linear(input, weight, self.bias, rescaled)
        elif len(lists(self)) == 1:
            output = rows.linear(input, weight, self.bias, stack)
            if output is not None:
                return output
    return _dense_linear(self, input)


def _conv1d(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of transformers' Conv1D: a Linear whose weight is stored as (in, out)."""
    dense = _dense(plain)

    @functools.wraps(plain)
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        site = _alone(self)
        output = None
        if site is not None:
            W, stack = site[0].t(), site[1]
            if stack.route is None:
                terms = stack.low_rank()
                if terms is not None:
                    terms = [term.transposed() for term in terms]
                    output = lowrank.linear(x, W, self.bias, terms)  # type: ignore[arg-type]
            elif len(lists(self)) == 1:
                output = rows.linear(x, W, self.bias, stack, transposed=True)  # type: ignore[arg-type]
        return dense(self, x) if output is None else output

    return forward


@functools.wraps(nn.Embedding.forward)
def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    weight = update = rescaled = None
    # Both of these depend on the whole of W': its row norms, or how often a row occurs.
    site = None if self.max_norm is not None or self.scale_grad_by_freq else _alone(self)
    if site is not None:
        weight, stack = site
        with exact(weight):
            if stack.route is not None:
                update = rows.embedding(input, stack, self.padding_idx)
            else:
                terms = stack.low_rank()
                if terms is None:
                    rescaled = stack.rescaled(weight)
                    terms = [rescaled.update] if rescaled and rescaled.update else []
                update = _looked_up(input, terms, self.padding_idx)
    if update is None and rescaled is None:
        if rows.route_of(self) is not None:
            return rows.by_group(self, (input,), {})
        weight = self.weight
    output = F.embedding(
        input,
        weight,  # type: ignore[arg-type]
        self.padding_idx,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.sparse and weight.is_leaf,  # type: ignore[union-attr]
    )
    if update is not None:
        if self.padding_idx is not None:
            # torch gives the padding row no gradient; through A it would get one here.
            padding = (input == self.padding_idx).unsqueeze(-1)
            update = torch.where(padding, update.detach(), update)
        output = add_update(output, update)
    if rescaled is not None:
        output = rescaling.rows(output, input, rescaled, self.padding_idx)
    return output


def _looked_up(input: Tensor, terms: list[LowRank], padding_idx: int | None) -> Tensor | None:
    """Return what low-rank updates add to the rows of an embedding, None where there are none."""
    # Dense gradients for the factors, whatever `sparse` says of W: B has r columns only, and one
    # optimizer can then take A and B.
    parts = [scale * (F.embedding(input, B, padding_idx) @ A) for A, B, scale in terms]
    return sum(parts[1:], parts[0]) if parts else None


@functools.wraps(nn.EmbeddingBag.forward)
def _embedding_bag(
    self: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    if rows.route_of(self) is not None:
        kwargs = {"offsets": offsets, "per_sample_weights": per_sample_weights}
        return rows.by_group(self, (input,), kwargs)
    weight = self.weight
    return F.embedding_bag(
        input,
        weight,
        offsets,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.mode,
        # A sparse gradient cannot go through W' to the factors.
        self.sparse and weight.is_leaf,
        per_sample_weights,
        self.include_last_offset,
        self.padding_idx,
    )


def _dense(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that builds each W' once, and again for the backward: it keeps none."""

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if rows.route_of(self) is not None:
            return rows.by_group(self, args, kwargs)
        # The compiler finds repeated reads, and what to recompute, by itself.
        if transformed():
            return plain(self, *args, **kwargs)
        # torch's attention reads in_proj_weight half a dozen times.
        with once(), _rebuilt(self) if torch.is_grad_enabled() else nullcontext():
            return plain(self, *args, **kwargs)

    return forward


def _read_once(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that builds each W' once, however often it reads it."""

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if transformed():
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


def _recurrent(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        if rows.route_of(self) is not None:
            return rows.by_group(self, args, kwargs)
        if transformed():
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


_dense_linear = _dense(nn.Linear.forward)

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    nn.MultiheadAttention: _dense(nn.MultiheadAttention.forward),
    nn.Bilinear: _dense(nn.Bilinear.forward),
    nn.Conv1d: _dense(nn.Conv1d.forward),
    nn.Conv2d: _dense(nn.Conv2d.forward),
    nn.Conv3d: _dense(nn.Conv3d.forward),
    nn.ConvTranspose1d: _dense(nn.ConvTranspose1d.forward),
    nn.ConvTranspose2d: _dense(nn.ConvTranspose2d.forward),
    nn.ConvTranspose3d: _dense(nn.ConvTranspose3d.forward),
    nn.LSTM: _recurrent(nn.LSTM.forward),
    nn.GRU: _recurrent(nn.GRU.forward),
    nn.RNN: _recurrent(nn.RNN.forward),
}
