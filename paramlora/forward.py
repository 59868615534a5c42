"""The forwards of adapted layers: factored where that is possible, else dense with W' built once.

A host module gets one of these as the forward of its class where its own forward is torch's and
computes the same (`forward_for`); it costs a look at the stack. A Linear or an Embedding never
builds W' in training (but see `lowrank.choose` for many rows); where an active adapter has no
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

from . import lowrank, rescale
from .adapters import LowRank, Rescaled, add_update
from .stack import CHANGED, Stack, exact, lists, once, stack_of, stored


def forward_for(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the forward for adapted modules of class `cls`, None where its own will do."""
    for base, forward in _FORWARDS.items():
        # Not for a subclass with a forward of its own: that one has to run, and reads W'.
        if issubclass(cls, base) and cls.forward is base.forward:
            return forward
    return None


def _factored(module: nn.Module) -> tuple[Tensor, list[LowRank]] | None:
    """Return the stored weight and the live updates of a module's `weight`, None if not factored.

    It reads past the modules' `__getattr__`: at small sizes that is what a forward costs.
    """
    plist = module._modules["parametrizations"]._modules.get("weight")  # type: ignore[union-attr]
    if plist is None or len(plist._modules) != 1:
        return None
    stack = plist._modules["0"]
    terms = stack.low_rank() if type(stack) is Stack else None
    return None if terms is None else (plist._parameters["original"], terms)  # type: ignore[return-value]


def _rescaled(module: nn.Module) -> tuple[Tensor, list[LowRank], Rescaled] | None:
    """Return what `_factored` does, and how that is rescaled, None if it is not."""
    plist = lists(module).get("weight")
    stack = stack_of(plist)
    if plist is None or stack is None or len(plist) != 1:
        return None
    term = stack.rescaled(plist.original)
    if term is None:
        return None
    return plist.original, [] if term.update is None else [term.update], term


@functools.wraps(nn.Linear.forward)
def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    site = _factored(self)
    if site is None:
        return _no_low_rank_linear(self, input)
    weight, terms = site
    return lowrank.linear(input, weight, self.bias, terms)


def _no_low_rank_linear(self: nn.Linear, input: Tensor) -> Tensor:
    site = _rescaled(self)
    if site is None:
        return _dense_linear(self, input)
    return rescale.linear(input, self.bias, *site)


@functools.wraps(nn.Embedding.forward)
def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    # Both of these depend on the whole of W': its row norms, or how often a row occurs.
    whole = self.max_norm is not None or self.scale_grad_by_freq
    site = None if whole else _factored(self)
    rescaled = _rescaled(self) if site is None and not whole else None
    if rescaled is not None:
        site = rescaled[:2]
    weight, terms = (self.weight, []) if site is None else site
    output = F.embedding(
        input,
        weight,
        self.padding_idx,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.sparse and weight.is_leaf,
    )
    for A, B, scale in terms:
        # Dense gradients for the factors, whatever `sparse` says of W: B has r columns only, and
        # one optimizer can then take A and B.
        rows = F.embedding(input, B, self.padding_idx)
        with exact(weight):
            update = scale * (rows @ A)
        if self.padding_idx is not None:
            # torch gives the padding row no gradient; through A it would get one here.
            padding = (input == self.padding_idx).unsqueeze(-1)
            update = torch.where(padding, update.detach(), update)
        output = add_update(output, update)
    return (
        output if rescaled is None else rescale.rows(output, input, rescaled[2], self.padding_idx)
    )


@functools.wraps(nn.EmbeddingBag.forward)
def _embedding_bag(
    self: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
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
        # The compiler finds repeated reads, and what to recompute, by itself.
        if lowrank.transformed():
            return plain(self, *args, **kwargs)
        # torch's attention reads in_proj_weight half a dozen times.
        with once(), _rebuilt(self) if torch.is_grad_enabled() else nullcontext():
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
        if lowrank.transformed():
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
