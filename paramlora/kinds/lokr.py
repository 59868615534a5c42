"""LoKr: a Kronecker product as update.

    W' = W + λ · s · W₁ ⊗ W₂        W₁: (p, q), W₂: (out/p, in/q), s = alpha / r

λ is the strength (`pl.scale`). W₂ = B₂ A₂ if r is small compared with its size, and
W₁ = B₁ A₁ on request.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fields import check_flag, check_rank, low_rank_refusal, scaling_of
from .spec import Factors, Spec, Strength, add_update
from .start import draw, kaiming


@dataclass(frozen=True)
class LoKr(Spec):
    """A Kronecker product, W' = W + λ·s·W₁ ⊗ W₂, which has few parameters and may be of any rank.

    W₁ is (p, q) and W₂ is (out/p, in/q, …), where p and q divide the tensor's first two dimensions.
    W₂ is a product B₂A₂ of rank r if r is less than half of W₂'s larger side. Otherwise it is one
    full factor, as in LyCORIS. A₂, or a full W₂, starts at zero. The others are Kaiming-uniform.
    Every layer with a LoKr builds W'.

    Args:
        rank: r, at least 1. None makes W₂ a full factor and s = 1.
        alpha: s = alpha/r as in `LoRA`, also if W₂ is a full factor because of its size.
        factor: the requested size of p and q, at least 1, or -1 for the largest possible size.
            Neither exceeds the square root of its dimension. If `factor` divides the dimension but
            exceeds the root, it is replaced by dimension/factor. If it does not divide the
            dimension, it is replaced by the next smaller divisor.
        decompose_both: make W₁ a product B₁A₁, too, if r is less than half of its larger side.
        rank_stabilized: as in `LoRA`.

    Raises:
        ValueError: a field has an invalid value, or alpha is given without a rank.

    >>> {key: tuple(f.shape) for key, f in LoKr(rank=1).create(torch.zeros(12, 10)).items()}
    {'W1': (3, 2), 'B2': (4, 1), 'A2': (1, 5)}

    Source: Edalati et al. 2022, "KronA", arXiv 2212.10650, section 3; Yeh et al. 2023, LyCORIS,
    arXiv 2309.14859, section 3.3.
    """

    rank: int | None = 8
    alpha: float | None = None
    factor: int = field(default=-1, kw_only=True)
    decompose_both: bool = field(default=False, kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)

    additive = True

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_rank(self)
        elif self.alpha is not None:
            raise ValueError(
                f"alpha is divided by the rank, so rank=None allows no alpha; got {self.alpha!r}"
            )
        check_flag(self, "rank_stabilized")
        check_flag(self, "decompose_both")
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
        rows, columns, kernel = weight.shape[0] // p, weight.shape[1] // q, weight.shape[2:]

        def random(*shape: int) -> Tensor:
            return draw(shape, weight, kaiming, generator)

        if self.decompose_both and self._is_factored(p, q):
            factors = {"B1": random(p, self.rank), "A1": random(self.rank, q)}  # type: ignore[arg-type]
        else:
            factors = {"W1": random(p, q)}
        zeros = next(iter(factors.values())).new_zeros
        if not self._is_factored(rows, columns):
            return factors | {"W2": zeros(rows, columns, *kernel)}
        B2 = random(rows, self.rank)  # type: ignore[arg-type]
        return factors | {"B2": B2, "A2": zeros(B2.shape[1], columns * kernel.numel())}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        W1 = factors["W1"] if "W1" in factors else factors["B1"] @ factors["A1"]  # (p, q)
        W2 = factors["W2"] if "W2" in factors else factors["B2"] @ factors["A2"]
        (p, q), (out, into, *kernel) = W1.shape, weight.shape
        W1 = W1.view(p, q, *(1 for _ in kernel))
        W2 = W2.view(out // p, into // q, *kernel)
        product = torch.kron(W1, W2)  # (out, in, *kernel)
        return add_update(weight, self.scaling * strength * product)

    def refusal(self, weight: Tensor) -> str | None:
        return low_rank_refusal(weight)

    def _is_factored(self, rows: int, columns: int) -> bool:
        """Return whether a matrix of this size is a product of two factors of rank r."""
        return self.rank is not None and self.rank < max(rows, columns) / 2


@functools.cache
def _divisor(size: int, factor: int) -> int:
    """Return the size of W₁ along a dimension of `size` elements.

    It is a divisor d of `size` with d ≤ √size, so that W₁ is the smaller of the two matrices:

        _divisor(12, -1) = 3        12 = 3 · 4, and √12 = 3.5
        _divisor(12, 4) = 3         4 divides 12 but exceeds √12, so W₂ gets the 4
        _divisor(10, 4) = 2         4 does not divide 10; 2 is the next divisor below √10
        _divisor(7, 4) = 1          a prime has no other divisor below its root
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(d for d in range(most, 0, -1) if size % d == 0)
