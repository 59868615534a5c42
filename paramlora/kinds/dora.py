"""DoRA: direction and magnitude of a tensor, learned separately.

    W' = m ⊙ V / ‖V‖        V = W + λ · s · B A,  m = ‖W‖ + λ · d,  s = alpha / r
       = c ⊙ V              c = m / ‖V‖

A: (r, in), B: (out, r). The norms are taken for each index of one dimension, `dim`. So ‖W‖, ‖V‖, m,
d and c are vectors with one entry per index, and ⊙ multiplies each slice by its entry. λ is the
strength (`pl.scale`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_dim, check_flag, check_rank, low_rank_refusal, scaling_of
from .spec import Factors, LowRank, Rescaled, Spec, Strength, along
from .start import check_init, init_factors


@dataclass(frozen=True)
class DoRA(Spec):
    """Weight-decomposed adaptation, W' = m ⊙ V/‖V‖ with V = W + λ·s·BA and m = ‖W‖ + λ·d.

    A, B and d are learned. d is the difference between the magnitudes m and those of W; it starts
    at zero, as B does. W' is then bitwise W at the start and at strength 0.

    Args:
        rank, alpha, init, rank_stabilized: as in `LoRA`, without the inits that start B from W.
        dim: the dimension of the tensor along which the magnitudes lie. With 0, a Linear or a
            convolution has one magnitude per output, and an Embedding one per row. Use 1 for
            transformers' Conv1D, whose outputs lie along dimension 1, and for an Embedding with
            one magnitude per feature, as in PEFT.
        exact_gradient: whether to differentiate through the norms ‖V‖. By default they are
            constants in the backward pass, as in the paper (section 4.3). A Linear or an Embedding
            then computes its output without W'. With True every layer builds W'.

    Raises:
        ValueError: a field has an invalid value.

    >>> weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    >>> factors = DoRA(rank=1).create(weight)
    >>> DoRA(rank=1).apply(weight, factors | {"d": torch.tensor([5.0, 1.0])})
    tensor([[6., 8.],
            [2., 0.]])

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
    """

    rank: int = 8
    alpha: float | None = None
    init: str | Callable[[Tensor], object] = field(default="kaiming", kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)
    dim: int = field(default=0, kw_only=True)
    exact_gradient: bool = field(default=False, kw_only=True)

    fast = ("B", "d")

    def __post_init__(self) -> None:
        check_rank(self)
        check_init(self.init)
        check_dim(self.dim)
        check_flag(self, "exact_gradient")

    @property
    def scaling(self) -> float:
        return scaling_of(self)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        # The paper learns m itself. It would start as ‖W‖, computed once on one device. On another
        # device, or after a cast, ‖W‖ may come out one rounding away from it. m / ‖V‖ would then be
        # 0.9999999 instead of 1, and W' would not be W. With d, each call computes ‖W‖ for both
        # sides of the fraction. It is exactly 1 if B and d are zero, and always at strength 0.
        factors = init_factors(weight.flatten(1), self.rank, self.init, generator)
        return factors | {"d": factors["A"].new_zeros(weight.shape[self.dim])}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        A, B, s = factors["A"], factors["B"], self.scaling * strength
        d = strength * factors["d"]
        if isinstance(s, Tensor):
            B, s = B * s, 1.0
        W = weight.to(A.dtype)
        if self.exact_gradient:
            V = _add_product(W, A, B, s)
            c = _ratio(*self._norms(W, V, B * s), d)
            return (V * along(c, self.dim, W)).to(weight.dtype)
        V = _add_product(W.detach(), A.detach(), B.detach(), s)
        c = _ratio(*self._norms(W.detach(), V, B.detach() * s), d)
        # For the gradient of c in c ⊙ V, autograd would keep V, a second matrix. Multiplied out,
        # with dim=0, c ⊙ V = c ⊙ W + s · (c ⊙ B) A. It then keeps W, which exists anyway, and B.
        if self.dim == 0:
            B = B * c.view(-1, 1)  # (out, r)
        else:
            A = (A.view(-1, *weight.shape[1:]) * along(c, 1, weight)).view(A.shape)  # (r, in)
        return _add_product(weight * along(c, self.dim, weight), A, B, s).to(weight.dtype)

    def rescaled(
        self, weight: Tensor, factors: Factors, strength: Strength = 1.0
    ) -> Rescaled | None:
        if self.exact_gradient:
            return None
        update = LowRank(factors["A"], factors["B"], self.scaling * strength)
        norm_V, growth = self._norms_without_V(weight, *update)
        # c − 1 = (‖W‖ + λ·d − ‖V‖) / ‖V‖, or 0 for a zero V.
        d = factors["d"] if type(strength) is float and strength == 1 else strength * factors["d"]
        change = (d - growth) / torch.where(norm_V > 0, norm_V, torch.inf)
        return Rescaled(change, self.dim, update)

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)

    def _norms(self, W: Tensor, V: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖W‖ and ‖V‖ for each index of `dim`; B is zero if V equals W."""
        norm_W, norm_V = (torch.linalg.vector_norm(M, dim=self._other_dims(W)) for M in (W, V))
        # V may equal W and still have other strides, since addmm returns a contiguous matrix.
        # vector_norm sums in the order of the strides, so the two norms may differ by a rounding,
        # and their ratio would not be 1. If B is zero, use ‖W‖ for both.
        rounding = torch.where(B.any(), 0, norm_W - norm_V).detach()
        return norm_W, norm_V + rounding

    def _norms_without_V(
        self, W: Tensor, A: Tensor, B: Tensor, s: Strength
    ) -> tuple[Tensor, Tensor]:
        """Return ‖V‖ and ‖V‖ − ‖W‖ as constants, without building V.

        For each row of V = W + s B A, with sums Σ over r:

            ‖V‖² = ‖W‖² + u        u = 2s Σ (W Aᵀ) ∘ B + s² Σ (B A Aᵀ) ∘ B

        ‖V‖ is not computed as the root of this. If B is zero, u is zero, and the root would be
        √(x·x) with x = ‖W‖, which is not exactly x on all machines. This form is exact for u = 0:

            ‖V‖ = ‖W‖ + u / (‖W‖ + √(‖W‖² + u))

        W is read twice and V is not built, which is half of the memory traffic of `_norms`. The
        measured error in float32 is that of `_norms`, 5e-8. For a row that the update nearly
        cancels it is ‖W‖/‖V‖ times as large.
        """
        W, A, B = W.detach(), A.detach(), B.detach()
        norm_W = torch.linalg.vector_norm(W, dim=self._other_dims(W), dtype=A.dtype)
        matrix = W.reshape(W.shape[0], -1)
        if self.dim == 1:  # the rows of Vᵀ = Wᵀ + s Aᵀ Bᵀ
            matrix, A, B = matrix.mT, B.mT, A.mT
        WA = (matrix @ A.mT.to(W.dtype)).to(B.dtype)  # (rows, r)
        # A small layer takes as long for each of these operations as for a product.
        if isinstance(s, Tensor):
            B, s = B * s.detach(), 1.0
        inner = torch.addmm(WA, B, A @ A.mT, beta=2 * s, alpha=s * s)  # (rows, r)
        u = (B * inner).sum(1)  # (rows,)
        if len(u) != len(norm_W):  # with dim=1 each index of a convolution has several rows
            u = u.view(len(norm_W), -1).sum(1)
        total = norm_W + torch.addcmul(u, norm_W, norm_W).clamp_min(0).sqrt()
        growth = u / torch.where(total > 0, total, 1)
        return norm_W + growth, growth

    def _other_dims(self, W: Tensor) -> list[int]:
        return [i for i in range(W.dim()) if i != self.dim]


def _add_product(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return W + s · B A in the shape of W."""
    return torch.addmm(W.reshape(W.shape[0], -1), B, A, alpha=s).view(W.shape)


def _ratio(norm_W: Tensor, norm_V: Tensor, d: Tensor) -> Tensor:
    """Return c = m / ‖V‖, or 1 for a zero V, which has no direction to rescale."""
    nonzero = norm_V > 0
    # Without the inner `where` the backward would multiply 0 by m/0, which is NaN.
    return torch.where(nonzero, (norm_W + d) / torch.where(nonzero, norm_V, 1), 1)
