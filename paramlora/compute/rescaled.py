"""The outputs of layers on a rescaled weight, W' = (1 + g) ⊙ (W + s · B A), without building W'.

    g on the outputs    y = y₁ + g ⊙ (y₁ − b)                       y₁ = x (W + s · B A)ᵀ + b
    g on the inputs     y = (x + g ⊙ x) (W + s · B A)ᵀ + b

g is `Rescaled.change`: (m,) on the outputs, (k,) on the inputs. If it is None, y is y₁. It is never
added to the 1. If g is zero, y is therefore bitwise y₁, which is the base's output if the update is
zero as well. And half precision rounds the small g, not 1 + g.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds.spec import Rescaled
from . import lowrank


def rescaled_linear(x: Tensor, W: Tensor, b: Tensor | None, term: Rescaled) -> Tensor:
    """Return x W'ᵀ + b.

    Args:
        x: (…, k).
        W: (m, k), of the dtype of x except under autocast.
        b: (m,) or None.
        term: the rescaling, with m changes along dimension 0 or k changes along dimension 1.
    """
    if term.change is not None and term.dim == 1:
        x = _add_scaled(x, x, term.change)
    y = lowrank.linear(x, W, b, [] if term.update is None else [term.update])
    if term.change is not None and term.dim == 0:
        # The bias is not rescaled: (1 + g) ⊙ (y − b) + b = y + g ⊙ (y − b).
        y = _add_scaled(y, y if b is None else y - b.to(y.dtype), term.change)
    return y


def rescaled_rows(y: Tensor, ids: Tensor, term: Rescaled, padding_idx: int | None) -> Tensor:
    """Return the embeddings of `ids` from W', given y, (…, k), those from W + s · B A."""
    g = term.change
    if g is None:
        return y
    if term.dim == 0:
        g = F.embedding(ids, g.unsqueeze(-1))  # (…, 1), one change per row of W
    rows = _add_scaled(y, y, g)
    if padding_idx is None:
        return rows
    # torch gives the padding row no gradient. Through g it would get one.
    return torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)


def _add_scaled(y: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Return y + g ⊙ z."""
    return torch.addcmul(y, z, g.to(y.dtype))
