"""The choice of the forward of an adapted layer.

Note [the choice of forward]
    A host module's class gets one of these forwards only if the module's own forward is torch's,
    because the computation of any other forward is unknown. An adapted forward looks at the stack
    and takes the first of these paths that the active adapters allow:

    routed      a route is set: routing/rows.py computes each row with its adapter.
    factored    y = x Wᵀ + b + s·(x Aᵀ) Bᵀ      Linear, Conv1D, Embedding with low-rank updates.
                W' is built only for many rows (`compute.plan.choose`).
    rescaled    W' = (1 + c) ⊙ (W + s·B A)      the same layers with IA3 or DoRA.
    quantized   y = module(x) + s·(x Aᵀ) Bᵀ    quantized linear layers, whatever their class:
                quantized.py. W is never read, and only low-rank updates can be there.
    dropout     in training, y of the adapters without dropout, and s·(D(x) Aᵀ) Bᵀ for each of the
                others: Linear, Conv1D and quantized layers, with plain operations.
    dense       torch's own code on W'          other layers, kinds without such a form, and
                tensors with other parametrizations. W' is built once per forward.

    For the backward, a factored layer keeps x and x Aᵀ, and not W'. A dense layer keeps x, and
    builds W' again (dense.py). Exceptions, which keep W': recurrent layers, modules with a forward
    of their own, tensors with further parametrizations, and torch 2.6. Under autocast torch keeps
    its cast of W'.

    A subclass with its own forward keeps it, because it may compute anything:

        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

    `super().forward` is torch's, which reads `self.weight`, the property that gives W'. So the
    result is right, at the cost of building W'.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..site.find import is_transformers_conv1d
from .dense import dense, recurrent
from .embedding import embedding_bag_forward, embedding_forward
from .linear import conv1d_forward, linear_forward


def forward_for(cls: type[nn.Module], *, alone: bool) -> Callable[..., Any] | None:
    """Return the forward for adapted modules of class `cls`; None to keep its own.

    Args:
        cls: the class of the module before it became a host.
        alone: whether all parameters are the module's own, so that no module inside has any.
    """
    for base, forward in _FORWARDS.items():
        if issubclass(cls, base) and cls.forward is base.forward:
            return forward
    if is_transformers_conv1d(cls):
        return conv1d_forward(cls.forward)
    # For each expert, a module of experts reads the tensor with the weights of all experts.
    if not alone or cls.__module__.startswith("torch."):
        return None
    return dense(cls.forward, unknown=True)


_DENSE: tuple[type[nn.Module], ...] = (
    *(nn.MultiheadAttention, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: linear_forward,
    nn.Embedding: embedding_forward,
    nn.EmbeddingBag: embedding_bag_forward,
    **{cls: dense(cls.forward) for cls in _DENSE},
    **{cls: recurrent(cls.forward) for cls in (nn.LSTM, nn.GRU, nn.RNN)},
}
