"""Delta: a full-size update.

    W' = W + λ · D        D: the shape of W

λ is the strength (`pl.scale`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Factors, Spec, Strength, add_update, factor_dtype


@dataclass(frozen=True)
class Delta(Spec):
    """A full-size update of a tensor of any shape, W' = W + λ·D. D starts at zero.

    Use it for biases, norms and heads that are trained together with low-rank adapters. Unlike
    unfrozen parameters they can then be switched off, saved and merged with the adapter.

    >>> Delta().create(torch.ones(3))
    {'D': tensor([0., 0., 0.])}
    """

    additive = True

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"D": torch.zeros_like(weight, dtype=factor_dtype(weight), requires_grad=False)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        return add_update(weight, strength * factors["D"])
