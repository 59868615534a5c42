"""IA3: a tensor that is rescaled along one dimension by a learned vector.

    W' = (1 + λ · (l − 1)) ⊙ W        l: (W.shape[dim],)

λ is the strength (`pl.scale`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_dim
from .spec import Factors, Rescaled, Spec, Strength, along, factor_dtype


@dataclass(frozen=True)
class IA3(Spec):
    """One learned factor per output or per input, W' = (1 + λ·(l − 1)) ⊙ W. l starts at one.

    Only the weight is rescaled. To rescale a layer's output including its bias, attach to the bias
    as well.

    Args:
        dim: the dimension of the tensor along which l lies. 0 rescales the outputs of a Linear or
            a convolution, as the paper does for keys and values. 1 rescales the inputs, as the
            paper does in the feed-forward layer.

    Raises:
        ValueError: `dim` is not 0 or 1.

    >>> IA3().apply(torch.ones(2, 3), {"l": torch.tensor([1.0, 2.0])}, 0.5)
    tensor([[1.0000, 1.0000, 1.0000],
            [1.5000, 1.5000, 1.5000]])

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning", arXiv 2205.05638, section 3.3.
    """

    dim: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_dim(self.dim)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        dtype = factor_dtype(weight)
        return {"l": torch.ones(weight.shape[self.dim], dtype=dtype, device=weight.device)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        change = strength * (factors["l"] - 1)
        return (weight * along(1 + change, self.dim, weight)).to(weight.dtype)

    def rescaled(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Rescaled:
        return Rescaled(strength * (factors["l"] - 1), self.dim, None)

    def refusal(self, weight: Tensor) -> str | None:
        if weight.dim() <= self.dim:
            return f"dim={self.dim} is out of range, its number of dimensions is {weight.dim()}"
        return None
