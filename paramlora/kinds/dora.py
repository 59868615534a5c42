"""Kinds of adapters that rescale a tensor.

    DoRA    W' = m ⊙ V / ‖V‖,  V = W + λ·s·B A,  m = ‖W‖ + λ·d
    IA3     W' = (1 + λ·(l − 1)) ⊙ W

λ is the strength, s the scale of the adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_dim, check_flag, check_rank, low_rank_refusal, scaling_of
from .spec import Factors, LowRank, Rescaled, Spec, Strength, along
from .start import check_init, start


@dataclass(frozen=True)
class DoRA(Spec):
    """Weight-decomposed adaptation, W' = m ⊙ V/‖V‖ with V = W + λ·s·BA: direction and magnitude.

    The norms are those of the rows of W, seen as in `LoRA`: one for each output of a Linear or a
    convolution. Learned are A, B and d, by which the magnitudes differ from those of the base,
    m = ‖W‖ + λ·d; so W' is bitwise W at the start and at strength 0, wherever the norms are
    computed.

    Args:
        rank, alpha, init, rank_stabilized: those of `LoRA`.
        dim: the dimension of the tensor along which the magnitudes lie. 1 is for tensors whose
            outputs lie along dimension 1: transformers' Conv1D, and an Embedding, where it means
            one magnitude for each feature, as in PEFT (0: one for each row).
        exact_gradient: differentiate through the norms, on the dense W'. The paper treats them as
            constants in the backward (section 4.3), which costs less: a Linear or an Embedding
            then does without W'.

    Raises:
        ValueError: as `LoRA`, and for another dim than 0 or 1.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    >>> weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    >>> factors = DoRA(rank=1).create(weight)
    >>> DoRA(rank=1).apply(weight, factors | {"d": torch.tensor([5.0, 1.0])})
    tensor([[6., 8.],
            [2., 0.]])
    """

    rank: int = 8
    alpha: float | None = None
    init: str | Callable[[Tensor], object] = field(default="kaiming", kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)
    dim: int = field(default=0, kw_only=True)
    exact_gradient: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_rank(self)
        check_init(self.init)
        check_dim(self.dim)
        check_flag(self, "exact_gradient")

    @property
    def scaling(self) -> float:
        return scaling_of(self)

    @property
    def fast(self) -> tuple[str, ...]:
        return ("B", "d")

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        factors = start(weight.flatten(1), weight, self.rank, self.init, generator)
        return factors | {"d": factors["A"].new_zeros(weight.shape[self.dim])}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        A, B, s = factors["A"], factors["B"], self.scaling * strength
        if isinstance(s, Tensor):
            B, s = B * s, 1.0
        W = weight.to(A.dtype)
        if self.exact_gradient:
            V = _added(W, A, B, s)
            c = _ratio(*self._norms(W, V, B * s), strength * factors["d"])
            return (V * along(c, self.dim, W)).to(weight.dtype)
        V = _added(W.detach(), A.detach(), B.detach(), s)
        norms = self._norms(W.detach(), V, B.detach() * s)
        c = along(_ratio(*norms, strength * factors["d"]), self.dim, weight)
        # c ⊙ V, distributed: autograd then keeps W itself, and no V.
        if self.dim == 0:
            B = B * c.view(-1, 1)
        else:
            A = (A.view(-1, *weight.shape[1:]) * c).view(A.shape)
        return _added(weight * c, A, B, s).to(weight.dtype)

    def rescaled(
        self, weight: Tensor, factors: Factors, strength: Strength = 1.0
    ) -> Rescaled | None:
        if self.exact_gradient:
            return None
        update = LowRank(factors["A"], factors["B"], self.scaling * strength)
        norms = self._norms_without_V(weight, *update)
        return Rescaled(_ratio(*norms, strength * factors["d"]) - 1, self.dim, update)

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)

    def _norms(self, W: Tensor, V: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖W‖ and ‖V‖ for each index of `dim`."""
        before, after = (torch.linalg.vector_norm(M, dim=self._others(W)) for M in (W, V))
        # Where V is W, their norms may still differ by a rounding, for sums run by the strides.
        rounding = torch.where(B.any(), 0, before - after).detach()
        return before, after + rounding

    def _norms_without_V(
        self, W: Tensor, A: Tensor, B: Tensor, s: Strength
    ) -> tuple[Tensor, Tensor]:
        """Return the same as constants, for half the traffic.

            ‖V‖² = ‖W‖² + u,  u = 2s Σ (W Aᵀ) ∘ B + s² Σ (B A Aᵀ) ∘ B         sums over r
            ‖V‖ = ‖W‖ + u / (‖W‖ + √(‖W‖² + u))

        Where B is zero so is u, and ‖V‖ is ‖W‖, which √(x·x) = x does not give on all machines.
        Measured in float32, the error is that of `_norms`, 5e-8, but ‖W‖/‖V‖ times as large where
        the update all but cancels a row.
        """
        W, A, B = W.detach(), A.detach(), B.detach()
        s = s.detach() if isinstance(s, Tensor) else s
        before = torch.linalg.vector_norm(W, dim=self._others(W), dtype=A.dtype)
        matrix = W.reshape(W.shape[0], -1)
        if self.dim == 1:
            matrix, A, B = matrix.mT, B.mT, A.mT
        cross = (matrix @ A.mT.to(W.dtype)).to(B.dtype)
        u = (B * (2 * s * cross + s * s * (B @ (A @ A.mT)))).sum(1).view(len(before), -1).sum(1)
        total = before + (before * before + u).clamp_min(0).sqrt()
        return before, before + u / torch.where(total > 0, total, 1)

    def _others(self, W: Tensor) -> list[int]:
        return [i for i in range(W.dim()) if i != self.dim]


def _added(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return W + s · B A in the shape of W."""
    return torch.addmm(W.reshape(W.shape[0], -1), B, A, alpha=s).view(W.shape)


def _ratio(before: Tensor, after: Tensor, d: Tensor) -> Tensor:
    """Return m / ‖V‖, and 1 where V is zero and has no direction to give a magnitude to."""
    there = after > 0
    return torch.where(there, (before + d) / torch.where(there, after, 1), 1)
