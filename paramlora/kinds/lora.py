"""LoRA: a low-rank update.

    W' = W + λ · s · B A                    s = alpha / r
    W' = W + λ · s · (B A − B₀ A₀)          with init="pissa", "milora", "olora", "corda", "null"
    y  = x Wᵀ + λ · s · D(x) Aᵀ Bᵀ          in training with dropout: D zeroes elements of x

A: (r, in), B: (out, r). A₀ and B₀ are A and B at the start. λ is the strength (`pl.scale`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_dropout, check_flag, check_rank, low_rank_refusal, rank_limit, scaling_of
from .spec import Factors, LowRank, Spec, Strength, add_update, factor_dtype
from .start import check_init, init_factors, truncated_svd

_FROM_WEIGHT = ("pissa", "milora", "olora")
_FROM_DATA = ("corda", "null")


@dataclass(frozen=True)
class LoRA(Spec):
    """A low-rank update, W' = W + λ·(alpha/r)·BA, of a tensor with two or more dimensions.

    The tensor is viewed as a matrix (out, in): its first dimension, and all others together. That
    is the weight itself for a Linear, (out, in/groups·kernel) for a convolution and (num, dim) for
    an Embedding. `batch_dims` and `transposed` choose another view.

    Args:
        rank: r, at least 1. A rank above the smaller side of the matrix adds parameters and gains
            nothing.
        alpha: the numerator of the scale; None means alpha = r, so that s = 1.
        init: the initialisation of A. B starts at zero, unless A and B start from W.

            - "kaiming": uniform with a = √5, as in the paper's code.
            - "gaussian": N(0, 1).
            - "gaussian/sqrt_r": N(0, 1/r).
            - "uniform/sqrt_r": uniform in ±1/√r, which "kaiming" gives for an A stored as (in, r).
            - "orthogonal": orthonormal rows, or orthonormal columns if r exceeds in.
            - A callable that fills A, (r, in), in place, such as a function of `torch.nn.init`. It
              does not receive the generator of `attach`.
            - "pissa": A and B start as the principal part of W, s·BA = Σ σᵢuᵢvᵢᵀ over the r largest
              singular values.
            - "milora": the minor part of W instead, with the r smallest singular values.
            - "olora": A and B start as the first r rows of R and columns of Q, where W = QR.
            - "corda", "null": for `paramlora.corda` and `paramlora.lora_null`, which start A and B
              from data. Until then A is that of "kaiming", and B is zero.
        rank_stabilized: scale by alpha/√r instead of alpha/r.
        batch_dims: the number of leading dimensions that index separate matrices, each with its
            own update. With 1, experts of shape (E, out, in) get A: (E, r, in) and B: (E, out, r).
        transposed: whether a matrix is stored as (in, out), so that W' = W + λ·s·(BA)ᵀ. This is how
            transformers' Conv1D and some experts store it.
        dropout: in training mode, the probability with which each element of the update's input is
            zeroed; the others are divided by 1 − dropout, as `nn.Dropout` does. It is supported at
            the weights of Linear, quantized layers and transformers' Conv1D. At an Embedding, whose
            input are indices, it has no effect, as in PEFT. The base's part of the output is
            without dropout, and so is W' (`layer.weight`, `merge`).

    Raises:
        ValueError: a field has an invalid value. If `init` is a callable that leaves A unfilled,
            the error comes from `create`.

    >>> spec = LoRA(rank=4, alpha=8)
    >>> spec.scaling
    2.0
    >>> {key: tuple(factor.shape) for key, factor in spec.create(torch.zeros(6, 5)).items()}
    {'A': (4, 5), 'B': (6, 4)}

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
    arXiv 2106.09685, section 4.1. "pissa": Meng et al. 2024, arXiv 2404.02948, equations 2 and 3.
    "milora": Wang et al. 2024, arXiv 2406.09044.
    "olora": Büyükakyüz 2024, arXiv 2406.01775. rank_stabilized: Kalajdzievski 2023,
    arXiv 2312.03732.
    """

    rank: int = 8
    alpha: float | None = None
    init: str | Callable[[Tensor], object] = field(default="kaiming", kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)
    batch_dims: int = field(default=0, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)

    fast = ("B",)
    additive = True

    def __post_init__(self) -> None:
        check_rank(self)
        check_init(self.init, (*_FROM_WEIGHT, *_FROM_DATA))
        if type(self.batch_dims) is not int or self.batch_dims < 0:
            raise ValueError(
                f"batch_dims must be a whole number of at least 0, got {self.batch_dims!r}"
            )
        check_flag(self, "transposed")
        check_dropout(self)
        if self.init in ("pissa", "milora", *_FROM_DATA) and self.scaling <= 0:
            raise ValueError(f"init={self.init!r} needs an alpha above 0, got {self.alpha!r}")

    @property
    def scaling(self) -> float:
        """The factor s of the update: alpha/r, or alpha/√r if `rank_stabilized`."""
        return scaling_of(self)

    @property
    def constants(self) -> tuple[str, ...]:
        return ("A0", "B0") if self.init in (*_FROM_WEIGHT, *_FROM_DATA) else ()

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        W = self._matrices(weight)
        if self.init in _FROM_DATA:
            A, B = init_factors(W, self.rank, "kaiming", generator).values()
            return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}
        if self.init not in _FROM_WEIGHT:
            return init_factors(W, self.rank, self.init, generator)
        # The papers subtract s·BA from the stored weight, and train BA on what is left. Here the
        # stored weight keeps its bits: the starting values stay beside it as constants A0 and B0,
        # and `_update` subtracts B0 A0 from BA. Gradients and training are those of the papers.
        W = W.to(factor_dtype(weight))
        if self.init in ("pissa", "milora"):
            A, B, _ = truncated_svd(W / self.scaling, self.rank, smallest=self.init == "milora")
        else:
            Q, R = torch.linalg.qr(W)
            A, B = R[..., : self.rank, :].contiguous(), Q[..., : self.rank].contiguous()
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        A, B, scale = self._update(factors, strength)
        if isinstance(scale, Tensor):
            return add_update(weight, (scale * (B @ A)).view(weight.shape))
        W = weight.reshape(*weight.shape[: self.batch_dims + 1], -1)
        if W.dtype != A.dtype:
            W = W.to(A.dtype)
        # addmm adds the scaled product to W in one pass, without a tensor for BA.
        if self.batch_dims == 0:
            W = torch.addmm(W, B, A, alpha=scale)  # (out, in)
        else:
            batches = W.flatten(0, -3), B.flatten(0, -3), A.flatten(0, -3)
            W = torch.baddbmm(*batches, alpha=scale)  # (E, out, in)
        return W.to(weight.dtype).view(weight.shape)

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank | None:
        return None if self.batch_dims else self._update(factors, strength)

    def refusal(self, weight: Tensor) -> str | None:
        if weight.dim() < 2:
            return low_rank_refusal(weight)
        if weight.dim() < 2 + self.batch_dims:
            return (
                f"with batch_dims={self.batch_dims} it needs {2 + self.batch_dims} dimensions, it "
                f"has {weight.dim()}"
            )
        if self.constants:
            return rank_limit(f"init={self.init!r}", self.rank, self._matrices(weight))
        return None

    def _matrices(self, weight: Tensor) -> Tensor:
        """Return a tensor as matrices, (…, out, in), one per index of its batch dimensions."""
        matrices = weight.reshape(*weight.shape[: self.batch_dims + 1], -1)
        return matrices.mT if self.transposed else matrices

    def _update(self, factors: Factors, strength: Strength) -> LowRank:
        """Return the update of the matrices as they are stored, which may be (in, out)."""
        A, B, scale = factors["A"], factors["B"], self.scaling * strength
        if "A0" in factors:
            # Return B A − B0 A0 as one product of rank 2r. The obvious form is [B, −B0] [A; A0].
            # At the start A = A0 and B = B0, and its two halves cancel only up to rounding: a fused
            # multiply-add adds the exact b·a to a rounded −b·a. Entries of W' would then differ
            # from those of W by 1e-7 of their size. In the form below each half contains a factor
            # that is exactly zero at the start, so the update is exactly zero.
            #     [B − B0, B0] [A; A − A0] = (B − B0) A + B0 (A − A0) = B A − B0 A0
            A0, B0 = factors["A0"], factors["B0"]
            A = torch.cat([A, A - A0], dim=-2)  # (…, 2r, in)
            B = torch.cat([B - B0, B0], dim=-1)  # (…, out, 2r)
        update = LowRank(A, B, scale)
        return update.transposed() if self.transposed else update
