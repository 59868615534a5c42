"""The forwards of adapted layers: factored where that is possible, else dense with W' built once.

A host module gets one of these as the forward of its class where its own forward is torch's and
computes the same (`forward_for`); it costs a look at the stack. A Linear or an Embedding never
builds W' in training (but see `plan.choose` for many rows); where an active adapter has no
factored or rescaled form, or another parametrization is on the tensor, and for all other layers,
torch's own forward runs on the dense W', which is built once a forward and again for the backward.

What is kept for the backward: of a factored layer x and x Aᵀ, of a dense one x, and never W'.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .dense import dense, read_once, recurrent
from .embedding import embedding_bag_forward, embedding_forward
from .linear import conv1d_forward, linear_forward


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
        return conv1d_forward(cls.forward)
    # A loop over experts reads the stack of their weights once for each.
    return read_once(cls.forward) if alone and not cls.__module__.startswith("torch.") else None


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: linear_forward,
    nn.Embedding: embedding_forward,
    nn.EmbeddingBag: embedding_bag_forward,
    nn.MultiheadAttention: dense(nn.MultiheadAttention.forward),
    nn.Bilinear: dense(nn.Bilinear.forward),
    nn.Conv1d: dense(nn.Conv1d.forward),
    nn.Conv2d: dense(nn.Conv2d.forward),
    nn.Conv3d: dense(nn.Conv3d.forward),
    nn.ConvTranspose1d: dense(nn.ConvTranspose1d.forward),
    nn.ConvTranspose2d: dense(nn.ConvTranspose2d.forward),
    nn.ConvTranspose3d: dense(nn.ConvTranspose3d.forward),
    nn.LSTM: recurrent(nn.LSTM.forward),
    nn.GRU: recurrent(nn.GRU.forward),
    nn.RNN: recurrent(nn.RNN.forward),
}
