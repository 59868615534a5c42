"""Layer forwards that never build W', and those that build it only once.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        instead of        y = x (W + s · B A)ᵀ + b

A host module gets one of these as the forward of its class where its own forward is torch's and
computes the same (`forward_for`). They replace `nn.Linear.forward` and so on, and cost a look at
the stack; where an active adapter has no factored form, or another parametrization is on the
tensor, they fall back on torch's own forward and the dense W'.

What is kept for the backward of a factored layer: x, x Aᵀ, and the factors.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import LowRank, add_update
from .stack import Stack, lists, stored


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


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    site = _factored(self)
    if site is None:
        return nn.Linear.forward(self, input)
    weight, terms = site
    output = F.linear(input, weight, self.bias)
    for A, B, scale in terms:
        # The factors are cast, never x: x is shared with the layers beside this one.
        hidden = F.linear(input, A.to(input.dtype)) * scale
        output = output + F.linear(hidden, B.to(input.dtype))
    return output


def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    site = _factored(self)
    # Both of these depend on the whole of W': its row norms, or how often a row occurs.
    if site is None or self.max_norm is not None or self.scale_grad_by_freq:
        weight, terms = self.weight, list[LowRank]()
    else:
        weight, terms = site
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
        update = scale * (rows @ A)
        if self.padding_idx is not None:
            # torch gives the padding row no gradient; through A it would get one here.
            padding = (input == self.padding_idx).unsqueeze(-1)
            update = torch.where(padding, update.detach(), update)
        output = add_update(output, update)
    return output


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


def _attention(self: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    # torch's forward reads in_proj_weight half a dozen times; the compiler finds that by itself.
    if torch.compiler.is_compiling():
        return nn.MultiheadAttention.forward(self, *args, **kwargs)
    with parametrize.cached():
        return nn.MultiheadAttention.forward(self, *args, **kwargs)


def _recurrent(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    base = parametrize.type_before_parametrizations(self)
    try:
        # torch's forward reads every weight three times.
        with parametrize.cached():
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        # It leaves the weights that it used in a list; W' there would keep the graph alive, and
        # a tensor with a graph cannot be deep-copied.
        held = lists(self)
        weights = [
            stored(held[name])[0] if name in held else getattr(self, name, None)
            for name in self._flat_weights_names
        ]
        self._flat_weights = weights
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]  # type: ignore[arg-type]


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    nn.MultiheadAttention: _attention,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
}
