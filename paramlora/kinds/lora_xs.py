"""LoRA-XS: a small learned matrix between the singular vectors of the weight.

    W' = W + λ · s · B R A        W ≈ U Σ Vᵀ,  A = Vᵀ, B = U Σ,  s = alpha / r

A: (r, in), B: (out, r), R: (r, r), with the r largest singular values. Only R is learned. λ is the
strength (`pl.scale`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_rank, low_rank_refusal, rank_limit, scaling_of
from .spec import Factors, LowRank, Spec, Strength, add_update, factor_dtype


@dataclass(frozen=True)
class LoRAXS(Spec):
    """LoRA with extremely few numbers, W' = W + λ·(alpha/r)·BRA, of a tensor seen as (out, in).

    A and B are the principal singular vectors of W, and never trained. R starts at zero; the paper
    draws it with a standard deviation of 1e-5.

    Args:
        rank: r, from 1 to the smaller side of the matrix. r² numbers are learned.
        alpha, rank_stabilized: as in `LoRA`.

    Raises:
        ValueError: a field has an invalid value.

    >>> factors = LoRAXS(rank=2).create(torch.randn(5, 4))
    >>> {key: tuple(factor.shape) for key, factor in factors.items()}
    {'R': (2, 2), 'A': (2, 4), 'B': (5, 2)}

    Source: Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
    Parameters", arXiv 2405.17604, section 3.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = field(default=False, kw_only=True)

    constants = ("A", "B")
    additive = True

    def __post_init__(self) -> None:
        check_rank(self)

    @property
    def scaling(self) -> float:
        return scaling_of(self)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        W, r = weight.flatten(1).to(factor_dtype(weight)), self.rank
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        A, B = Vh[:r].contiguous(), (U[:, :r] * S[:r]).contiguous()
        return {"R": A.new_zeros(r, r), "A": A, "B": B}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        A, B, scale = self.low_rank(factors, strength)
        return add_update(weight, (scale * (B @ A)).view(weight.shape))

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank:
        return LowRank(factors["A"], factors["B"] @ factors["R"], self.scaling * strength)

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight) or rank_limit("it", self.rank, weight.flatten(1))
