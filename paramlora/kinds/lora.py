"""LoRA: W' = W + λ·(alpha/r)·BA, A: (r, in), B: (out, r)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_flag, check_rank, low_rank_refusal, scaling_of
from .spec import Factors, LowRank, Spec, Strength, add_update, factor_dtype
from .start import FROM_WEIGHT, check_init, start


@dataclass(frozen=True)
class LoRA(Spec):
    """A low-rank update, W' = W + λ·(alpha/r)·BA, of any tensor with two or more dimensions.

    The tensor is seen as a matrix (out, in): its first dimension, and all others together. For a
    Linear that is the weight itself, for a convolution (out, in/groups·kernel), for an Embedding
    (num, dim). The update's rank is at most `rank`. With `batch_dims` it is a batch of matrices,
    such as one for each expert, and with `transposed` a matrix is (in, out).

    Args:
        rank: r, at least 1. One above the smaller side of the matrix is allowed, and wasted.
        alpha: the numerator of the scale; None means `rank`, so a scale of 1.
        init: how A starts; B starts at zero, so the update does too. "kaiming" (uniform, a = √5,
            as in the paper's code), "gaussian" (N(0, 1)), "gaussian/sqrt_r" (N(0, 1/r)),
            "orthogonal" (orthonormal rows, or columns where r is above in), or a callable that
            fills A, (r, in), in place, such as those of `torch.nn.init`; it draws where it
            likes, from torch's global generator as a rule. "pissa" and "olora" start from W
            itself: see below.
        rank_stabilized: scale by alpha/√r in place of alpha/r (Kalajdzievski 2023,
            arXiv 2312.03732).
        batch_dims: how many leading dimensions count matrices, each with an update of its own:
            with 1, experts (E, out, in) get A: (E, r, in) and B: (E, out, r).
        transposed: a matrix is stored as (in, out), so that W' = W + λ·s·(BA)ᵀ: as in
            transformers' Conv1D, and where experts are (E, in, out).

    Raises:
        ValueError: a rank below 1, an alpha that is no finite number, an init of no known name,
            or, when it is used, one that does not fill A with finite numbers; a `batch_dims` that
            is no count, a `transposed` that is no bool.

    "pissa" trains the principal part of W, s·BA = Σ over the r largest singular values (Meng et
    al. 2024, arXiv 2404.02948, equations 2 and 3), "olora" s times the first columns of Q and rows
    of R of its QR decomposition (Büyükakyüz 2024, arXiv 2406.01775). Both papers take that part
    out of the stored W. Here W stays, and what is taken out is kept beside as constants A₀, B₀:

        W' = W + λ·s·(BA − B₀A₀) = W + λ·s·[B − B₀, B₀] [A; A − A₀]

    which is trained alike, is exactly W at the start and when switched off, and is again a
    low-rank update of the original W, of rank 2r.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
    arXiv 2106.09685, section 4.1.

    >>> LoRA(rank=4, alpha=8).scaling
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    init: str | Callable[[Tensor], object] = field(default="kaiming", kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)
    batch_dims: int = field(default=0, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_rank(self)
        check_init(self.init, FROM_WEIGHT)
        if type(self.batch_dims) is not int or self.batch_dims < 0:
            raise ValueError(f"batch_dims must be a number from 0, got {self.batch_dims!r}")
        check_flag(self, "transposed")
        if self.init == "pissa" and self.scaling <= 0:
            raise ValueError(f"init='pissa' needs an alpha above 0, got {self.alpha!r}")

    @property
    def scaling(self) -> float:
        """The factor s of the update: alpha/r, or alpha/√r where `rank_stabilized`."""
        return scaling_of(self)

    @property
    def constants(self) -> tuple[str, ...]:
        return ("A0", "B0") if self.init in ("pissa", "olora") else ()

    @property
    def fast(self) -> tuple[str, ...]:
        return ("B",)

    @property
    def additive(self) -> bool:
        return True

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        W = self._matrices(weight)
        if not self.constants:
            return start(W, weight, self.rank, self.init, generator)
        W = W.to(factor_dtype(weight))
        if self.init == "pissa":
            W = W / self.scaling
        A, B = FROM_WEIGHT[self.init](W, self.rank)  # type: ignore[index]
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        A, B, scale = self._terms(factors, strength)
        if isinstance(scale, Tensor):
            return add_update(weight, (scale * (B @ A)).view(weight.shape))
        matrices = weight.reshape(*weight.shape[: self.batch_dims + 1], -1)
        if matrices.dtype != A.dtype:
            matrices = matrices.to(A.dtype)
        # W' in one pass over W: the scale rides in the product.
        if self.batch_dims == 0:
            matrices = torch.addmm(matrices, B, A, alpha=scale)
        else:
            flat = matrices.flatten(0, -3), B.flatten(0, -3), A.flatten(0, -3)
            matrices = torch.baddbmm(*flat, alpha=scale)
        return matrices.to(weight.dtype).view(weight.shape)

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank | None:
        return None if self.batch_dims else self._terms(factors, strength)

    def refusal(self, weight: Tensor) -> str | None:
        if low_rank_refusal(weight):
            return low_rank_refusal(weight)
        if weight.dim() < 2 + self.batch_dims:
            return (
                f"with batch_dims={self.batch_dims} it needs {2 + self.batch_dims} dimensions, it "
                f"has {weight.dim()}"
            )
        most = min(self._matrices(weight).shape[-2:])
        if self.constants and self.rank > most:
            return f"init={self.init!r} at rank {self.rank} needs a matrix of that rank, {most}"
        return None

    def _matrices(self, weight: Tensor) -> Tensor:
        """Return a tensor as matrices (out, in), in its batch dimensions."""
        matrices = weight.reshape(*weight.shape[: self.batch_dims + 1], -1)
        return matrices.mT if self.transposed else matrices

    def _terms(self, factors: Factors, strength: Strength) -> LowRank:
        """Return the update as it is added to the stored rows and columns."""
        A, B, scale = factors["A"], factors["B"], self.scaling * strength
        if "A0" in factors:
            A0, B0 = factors["A0"], factors["B0"]
            A, B = torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)
        update = LowRank(A, B, scale)
        return update.transposed() if self.transposed else update
