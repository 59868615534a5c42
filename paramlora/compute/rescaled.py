"""Layers on a rescaled weight, W' = (1 + g) ⊙ (W + s · B A), that do without W'.

    g on the outputs    y = y₁ + g ⊙ (y₁ − b),  y₁ = x (W + s · B A)ᵀ + b
    g on the inputs     y = (x + g ⊙ x) (W + s · B A)ᵀ + b

Where g is zero, y is bitwise y₁: the base's output as long as the update is zero, too. In half
precision it is g that is rounded, not 1 + g.
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
        W: (m, k), of the dtype of x but under autocast.
        b: (m,) or None.
        term: how W is updated and rescaled: m changes along its dimension 0, or k along 1.
    """
    if term.dim == 1:
        x = _rescaled(x, x, term.change)
    y = lowrank.linear(x, W, b, [] if term.update is None else [term.update])
    if term.dim == 0:
        y = _rescaled(y, y if b is None else y - b.to(y.dtype), term.change)
    return y


def rescaled_rows(y: Tensor, ids: Tensor, term: Rescaled, padding_idx: int | None) -> Tensor:
    """Return rows y, (…, k), of W + s · B A, looked up by `ids`, as those of W'."""
    g = term.change
    if term.dim == 0:
        g = F.embedding(ids, g.unsqueeze(-1))
    found = _rescaled(y, y, g)
    if padding_idx is None:
        return found
    # torch gives the padding row no gradient.
    return torch.where((ids == padding_idx).unsqueeze(-1), found.detach(), found)


def _rescaled(y: Tensor, by: Tensor, g: Tensor) -> Tensor:
    return torch.addcmul(y, by, g.to(y.dtype))
