"""HiRA: a high-rank update, the product of the weight and a low-rank matrix by elements.

    W' = W + λ · W ∘ (B A)        A: (r, in), B: (out, r)

λ is the strength (`pl.scale`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_whole_number, low_rank_refusal
from .spec import Factors, Spec, Strength, add_update
from .start import check_init, init_factors


@dataclass(frozen=True)
class HiRA(Spec):
    """Hadamard high-rank adaptation, W' = W + λ·W ∘ (BA), of a tensor seen as (out, in).

    The update has up to r times the rank of W. Elements of W that are zero stay zero.

    Args:
        rank: r, at least 1.
        init: the initialisation of A, as in `LoRA`, without those that start B from W. B starts at
            zero.

    Raises:
        ValueError: a field has an invalid value.

    >>> factors = {"A": torch.tensor([[1.0, 2.0]]), "B": torch.tensor([[3.0], [0.0]])}
    >>> HiRA(rank=1).apply(torch.tensor([[1.0, 10.0], [5.0, 5.0]]), factors)
    tensor([[ 4., 70.],
            [ 5.,  5.]])

    Source: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large
    Language Models", ICLR 2025, equation 3.
    """

    rank: int = 8
    init: str | Callable[[Tensor], object] = field(default="kaiming", kw_only=True)

    fast = ("B",)

    def __post_init__(self) -> None:
        check_whole_number(self, "rank", 1)
        check_init(self.init)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return init_factors(weight.flatten(1), self.rank, self.init, generator)

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        change = strength * (factors["B"] @ factors["A"])  # (out, in)
        return add_update(weight, weight * change.view(weight.shape))

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)
