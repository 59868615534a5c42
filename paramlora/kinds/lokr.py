"""LoKr: W' = W + λ·s·(C ⊗ BA), a Kronecker product."""

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
        check_flag(self, "decompose_both")
        whole = isinstance(self.factor, int) and not isinstance(self.factor, bool)
        if not whole or (self.factor < 1 and self.factor != -1):
            raise ValueError(
                f"factor must be a whole number of at least 1, or -1, got {self.factor!r}"
            )

    @property
    def scaling(self) -> float:
        return 1.0 if self.rank is None else scaling_of(self)

    @property
    def additive(self) -> bool:
        return True

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        p, q = (_divisor(size, self.factor) for size in weight.shape[:2])
        out, rest = weight.shape[0] // p, weight.shape[1] // q

        def drawn(*shape: int) -> Tensor:
            return draw(shape, weight, kaiming, generator)

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


@functools.cache
def _divisor(size: int, factor: int) -> int:
    """Return the divisor of `size` for a Kronecker factor; see `LoKr`."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(m for m in range(most, 0, -1) if size % m == 0)
