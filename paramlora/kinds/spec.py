"""The mathematics of adapters: what is learned at a tensor, and how it changes that tensor.

    W' = W + λ · s · B A        A: (r, in), B: (out, r), s = alpha / r

A spec is what the user writes: a small frozen dataclass that says which factors a tensor gets
(`create`) and how they change it (`apply`). It knows tensors only: not a module, a name or a file.
λ, the strength, is the user's dial (`pl.scale`); s belongs to the adapter.

Each kind is complete in one class. A kind of your own is a frozen dataclass that derives from
`Spec` and defines `create` and `apply`; attaching, toggling, merging and saving then work for it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]
Strength = float | Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LowRank(NamedTuple):
    """An update in factored form: `scale · B A`, A: (r, in), B: (out, r)."""

    A: Tensor
    B: Tensor
    scale: Strength

    def transposed(self) -> "LowRank":
        """Return the update of the transposed weight."""
        return LowRank(self.B.mT, self.A.mT, self.scale)


class Rescaled(NamedTuple):
    """A tensor rescaled along one dimension: W' = (1 + change) ⊙ (W + update).

    `change` has one entry for each index of dimension `dim`, 0 or 1, of W. It is kept apart from
    the 1, so that half precision rounds it by itself.
    """

    change: Tensor
    dim: int
    update: LowRank | None


@dataclass(frozen=True)
class Spec(ABC):
    """What to learn at a tensor. Derive a frozen dataclass from it to make a new kind of adapter.

    The dataclass's fields are saved with the adapter (numbers, strings, booleans and None are),
    and its class name is the kind that a file and a summary show.
    """

    @property
    def rank(self) -> int | None:
        """The rank that a summary shows; None for a kind that has none."""
        return None

    @property
    def scaling(self) -> float:
        """The factor s that multiplies the update beside the strength; 1 for a kind without."""
        return 1.0

    @property
    def additive(self) -> bool:
        """Whether what is added to a tensor does not depend on the tensor: such kinds commute."""
        return False

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of the factors that are never trained: saved and moved with the others."""
        return ()

    @property
    def fast(self) -> tuple[str, ...]:
        """The names of the factors that `parameter_groups` trains at the higher rate: LoRA's B."""
        return ()

    @abstractmethod
    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return new factors for `weight`, by name, on its device, in `factor_dtype(weight)`.

        They must leave `weight` as it is: `apply(weight, create(weight))` equals `weight` bitwise.
        Random ones are drawn by `draw`, so that a seed gives the same factors on every device.
        """

    @abstractmethod
    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        """Return the adapted tensor, of the shape, dtype and device of `weight`.

        `strength` is λ: at 0 the result equals `weight`, at 1 it is the trained adapter's. The same
        arguments must give the same result: layers call it again in the backward.
        """

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank | None:
        """Return the update as factors, or None where it has no such form.

        A kind that has one is computed without W' in a layer whose forward can do so.
        """
        return None

    def rescaled(
        self, weight: Tensor, factors: Factors, strength: Strength = 1.0
    ) -> Rescaled | None:
        """Return W' as `weight`, perhaps with a low-rank update, rescaled along a dimension.

        None where it has no such form. Like `low_rank` it lets layers do without W'.
        """
        return None

    def refusal(self, weight: Tensor) -> str | None:
        """Return why this kind cannot adapt `weight`, or None where it can."""
        return None


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype for factors of `weight`: its own, but float32 for a half-precision one.

    Factors in bfloat16 lose most of an optimizer's small steps; they are cast where they are used.
    """
    return torch.promote_types(weight.dtype, torch.float32)


def add_update(weight: Tensor, update: Tensor) -> Tensor:
    """Return `weight + update` in the weight's dtype, rounded once."""
    return (weight + update).to(weight.dtype)


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def along(values: Tensor, dim: int, weight: Tensor) -> Tensor:
    """Return one value for each index of dimension `dim` of `weight`, to multiply it with."""
    return values.view([-1 if i == dim else 1 for i in range(weight.dim())])
