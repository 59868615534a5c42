"""MiSS: one learned matrix that all shards of the inputs share.

    W'[o, i] = W[o, i] + λ · D[i mod r, o]        D: (r, out)
    W' = W + λ · Dᵀ E                             E: (r, in), E[k, i] = 1 if i mod r = k, else 0

So the inputs are cut into shards of r, and each shard gets the same update. λ is the strength
(`pl.scale`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import check_whole_number, low_rank_refusal
from .spec import Factors, LowRank, Rescaled, Spec, Strength, add_update, factor_dtype


@dataclass(frozen=True)
class MiSS(Spec):
    """Matrix shard sharing, W' = W + λ·Dᵀ[…, i mod r], of a tensor seen as (out, in).

    Only D is learned, r·out numbers. It starts at zero.

    Args:
        rank: r, the size of a shard, from 1 to the number of inputs. The last shard may be smaller.

    Raises:
        ValueError: a field has an invalid value.

    >>> MiSS(rank=2).apply(torch.zeros(1, 5), {"D": torch.tensor([[1.0], [2.0]])})
    tensor([[1., 2., 1., 2., 1.]])

    Source: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient
    Shard-Sharing Structure", arXiv 2409.15371.
    """

    rank: int = 8

    additive = True

    def __post_init__(self) -> None:
        check_whole_number(self, "rank", 1)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = (self.rank, weight.shape[0])
        return {"D": torch.zeros(shape, dtype=factor_dtype(weight), device=weight.device)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        inputs = weight.shape[1:].numel()
        D = (strength * factors["D"]).T  # (out, r)
        update = D.repeat(1, -(-inputs // self.rank))[:, :inputs]  # (out, in)
        return add_update(weight, update.reshape(weight.shape))

    def rescaled(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Rescaled:
        D = factors["D"]
        places = torch.arange(weight.shape[1:].numel(), device=D.device) % self.rank
        E = places == torch.arange(self.rank, device=D.device).unsqueeze(1)  # (r, in)
        return Rescaled(None, 0, LowRank(E.to(D.dtype), D.T, strength))

    def refusal(self, weight: Tensor) -> str | None:
        inputs = weight.shape[1:].numel()
        if weight.dim() > 1 and self.rank > inputs:
            return f"it needs a rank of at most {inputs}, the inputs of the matrix; got {self.rank}"
        return low_rank_refusal(weight)
