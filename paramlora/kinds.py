"""Further kinds of adapters, each complete in one class.

    DoRA    W' = m ⊙ V / ‖V‖,  V = W + λ·s·B A,  m = ‖W‖ + λ·d
    LoHa    W' = W + λ·s·(B₁A₁) ∘ (B₂A₂)
    LoKr    W' = W + λ·s·W₁ ⊗ W₂
    IA3     W' = (1 + λ·(l − 1)) ⊙ W

λ is the strength, s the scale of the adapter. All but IA3 need a tensor of two or more dimensions.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .adapters import (
    Factors,
    LowRank,
    Rescaled,
    Spec,
    Strength,
    add_update,
    check_init,
    check_rank,
    draw,
    factor_dtype,
    low_rank_refusal,
    scaling_of,
    start,
)


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


@dataclass(frozen=True)
class LoKr(Spec):
    """A Kronecker product, W' = W + λ·s·W₁ ⊗ W₂: few parameters, and of any rank.

    W₁ is (p, q) and W₂ (out/p, in/q, …), where p and q are divisors of the tensor's first two
    dimensions. W₂ is a product B₂A₂ of rank r where that is below half of its larger side, and
    else in full, as in LyCORIS. W₂, or A₂, starts at zero, the others Kaiming-uniform.

    Args:
        rank: r of W₂, as above; None for W₂ in full, at a scale of 1.
        alpha: s = alpha/r as in `LoRA`, also where W₂ is in full for its size.
        factor: what p and q are to be. Where it does not divide a dimension, the largest divisor
            below it and below the root; -1 for the largest one below the root.
        decompose_both: W₁ is B₁A₁, too, by the same rule.
        rank_stabilized: that of `LoRA`.

    Source: Edalati et al. 2022, "KronA", arXiv 2212.10650, section 3; Yeh et al. 2023, LyCORIS,
    arXiv 2309.14859, section 3.3.

    >>> {key: tuple(f.shape) for key, f in LoKr(rank=1).create(torch.zeros(12, 10)).items()}
    {'W1': (3, 2), 'B2': (4, 1), 'A2': (1, 5)}
    """

    rank: int | None = 8
    alpha: float | None = None
    factor: int = field(default=-1, kw_only=True)
    decompose_both: bool = field(default=False, kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_rank(self)
        elif self.alpha is not None:
            raise ValueError(f"alpha is over a rank, and there is none; got alpha={self.alpha!r}")
        whole = isinstance(self.factor, int) and not isinstance(self.factor, bool)
        if not whole or (self.factor < 1 and self.factor != -1):
            raise ValueError(
                f"factor must be a whole number of at least 1, or -1, got {self.factor!r}"
            )

    @property
    def scaling(self) -> float:
        return 1.0 if self.rank is None else scaling_of(self)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        p, q = (_divisor(size, self.factor) for size in weight.shape[:2])
        out, rest = weight.shape[0] // p, weight.shape[1] // q

        def drawn(*shape: int) -> Tensor:
            return draw(shape, weight, _kaiming, generator)

        if self.decompose_both and self._is_low(p, q):
            factors = {"B1": drawn(p, self.rank), "A1": drawn(self.rank, q)}  # type: ignore[arg-type]
        else:
            factors = {"W1": drawn(p, q)}
        zeros = next(iter(factors.values())).new_zeros
        if not self._is_low(out, rest):
            return factors | {"W2": zeros(out, rest, *weight.shape[2:])}
        B2 = drawn(out, self.rank)  # type: ignore[arg-type]
        return factors | {"B2": B2, "A2": zeros(B2.shape[1], rest * weight.shape[2:].numel())}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        W1 = factors["W1"] if "W1" in factors else factors["B1"] @ factors["A1"]
        (p, q), (out, rest, *kernel) = W1.shape, weight.shape
        W2 = factors["W2"] if "W2" in factors else factors["B2"] @ factors["A2"]
        W2 = W2.view(out // p, rest // q, *kernel)
        product = torch.kron(W1.view(p, q, *(1 for _ in kernel)), W2)
        return add_update(weight, self.scaling * strength * product)

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)

    def _is_low(self, *sides: int) -> bool:
        return self.rank is not None and self.rank < max(sides) / 2


@dataclass(frozen=True)
class IA3(Spec):
    """A learned factor for each output, or each input: W' = (1 + λ·(l − 1)) ⊙ W; l starts at one.

    Args:
        dim: the dimension of the tensor along which l lies: 0 rescales the outputs of a Linear or
            a convolution, as the paper does with keys and values, 1 its inputs, as it does in the
            feed-forward layer. To rescale an output with its bias, attach to the bias as well.

    Raises:
        ValueError: another dim than 0 or 1.

    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning", arXiv 2205.05638, section 3.3.

    >>> IA3().apply(torch.ones(2, 3), {"l": torch.tensor([1.0, 2.0])}, 0.5)
    tensor([[1.0000, 1.0000, 1.0000],
            [1.5000, 1.5000, 1.5000]])
    """

    dim: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_dim(self.dim)

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        dtype = factor_dtype(weight)
        return {"l": torch.ones(weight.shape[self.dim], dtype=dtype, device=weight.device)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        c = 1 + self.rescaled(weight, factors, strength).change
        return (weight * along(c, self.dim, weight)).to(weight.dtype)

    def rescaled(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Rescaled:
        return Rescaled(strength * (factors["l"] - 1), self.dim, None)

    def refusal(self, weight: Tensor) -> str | None:
        if weight.dim() <= self.dim:
            return f"it has no dimension {self.dim}, only {weight.dim()}"
        return None


def _kaiming(factor: Tensor, generator: torch.Generator | None) -> None:
    torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)


@functools.cache
def _divisor(size: int, factor: int) -> int:
    """Return the divisor of `size` for a Kronecker factor; see `LoKr`."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(m for m in range(most, 0, -1) if size % m == 0)


def check_dim(dim: object) -> None:
    """Raise a ValueError where a dimension is not 0 or 1."""
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim!r}")


def along(values: Tensor, dim: int, weight: Tensor) -> Tensor:
    """Return one value for each index of dimension `dim` of `weight`, to multiply it with."""
    return values.view([-1 if i == dim else 1 for i in range(weight.dim())])
