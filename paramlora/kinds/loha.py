"""Kinds of adapters whose update is a product of two matrices other than the matrix product.

    LoHa    W' = W + λ·s·(B₁A₁) ∘ (B₂A₂)
    LoKr    W' = W + λ·s·W₁ ⊗ W₂

λ is the strength, s the scale of the adapter. Their layers are computed with the dense W'.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_rank, low_rank_refusal, scaling_of
from .spec import Factors, Spec, Strength, add_update
from .start import draw


@dataclass(frozen=True)
class LoHa(Spec):
    """A Hadamard product of two low-rank updates, W' = W + λ·s·(B₁A₁) ∘ (B₂A₂): rank up to r².

    The tensor is seen as a matrix as in `LoRA`. B₂ starts at zero, the others Gaussian with
    deviations 1 (A₁, A₂) and 0.1 (B₁), as in LyCORIS.

    Args:
        rank, alpha, rank_stabilized: those of `LoRA`; rank is that of each of the two.

    Source: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient
    Federated Learning", arXiv 2108.06098, section 2.2, without its 3-D form for convolutions.

    >>> {key: tuple(f.shape) for key, f in LoHa(rank=2).create(torch.zeros(5, 4)).items()}
    {'A1': (2, 4), 'B1': (5, 2), 'A2': (2, 4), 'B2': (5, 2)}
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_rank(self)

    @property
    def scaling(self) -> float:
        return scaling_of(self)

    @property
    def additive(self) -> bool:
        return True

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        A, B = (self.rank, weight.shape[1:].numel()), (weight.shape[0], self.rank)

        def drawn(shape: tuple[int, int], std: float) -> Tensor:
            return draw(shape, weight, lambda t, g: t.normal_(std=std, generator=g), generator)

        A1, B1, A2 = drawn(A, 1.0), drawn(B, 0.1), drawn(A, 1.0)
        return {"A1": A1, "B1": B1, "A2": A2, "B2": torch.zeros_like(B1)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        one = factors["B1"] @ factors["A1"]
        two = factors["B2"] @ factors["A2"]
        return add_update(weight, (self.scaling * strength * (one * two)).view(weight.shape))

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)
