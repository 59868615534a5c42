"""LoHa: the elementwise product of two low-rank updates.

    W' = W + λ · s · (B₁ A₁) ∘ (B₂ A₂)        s = alpha / r

A₁, A₂: (r, in), B₁, B₂: (out, r). λ is the strength (`pl.scale`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_rank, low_rank_refusal, scaling_of
from .spec import Factors, Spec, Strength, add_update
from .start import draw


@dataclass(frozen=True)
class LoHa(Spec):
    """A Hadamard product of two low-rank updates, W' = W + λ·s·(B₁A₁) ∘ (B₂A₂), of rank up to r².

    The tensor is viewed as a matrix as in `LoRA`. B₂ starts at zero. The others are Gaussian, with
    standard deviation 1 for A₁ and A₂ and 0.1 for B₁, as in LyCORIS. Every layer with a LoHa builds
    W', since the elementwise product has no factors of rank r.

    Args:
        rank: r, the rank of each of the two products, at least 1.
        alpha, rank_stabilized: as in `LoRA`.

    Raises:
        ValueError: a field has an invalid value.

    >>> {key: tuple(f.shape) for key, f in LoHa(rank=2).create(torch.zeros(5, 4)).items()}
    {'A1': (2, 4), 'B1': (5, 2), 'A2': (2, 4), 'B2': (5, 2)}

    Source: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient
    Federated Learning", arXiv 2108.06098, section 2.2, without its 3-D form for convolutions.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = field(default=False, kw_only=True)

    additive = True

    def __post_init__(self) -> None:
        check_rank(self)

    @property
    def scaling(self) -> float:
        return scaling_of(self)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        A, B = (self.rank, weight.shape[1:].numel()), (weight.shape[0], self.rank)

        def gaussian(shape: tuple[int, int], std: float) -> Tensor:
            return draw(shape, weight, lambda t, g: t.normal_(std=std, generator=g), generator)

        A1, B1, A2 = gaussian(A, 1.0), gaussian(B, 0.1), gaussian(A, 1.0)
        return {"A1": A1, "B1": B1, "A2": A2, "B2": torch.zeros_like(B1)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        first = factors["B1"] @ factors["A1"]  # (out, in)
        second = factors["B2"] @ factors["A2"]  # (out, in)
        return add_update(weight, (self.scaling * strength * (first * second)).view(weight.shape))

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)
