"""The interface of a kind: its factors for a tensor, and the adapted tensor W'.

    W' = apply(W, factors, λ)        W' = W at λ = 0, and at the factors that `create` returns

A spec is a small frozen dataclass that the user writes, such as `LoRA(rank=4)`. Its method
`create` makes the factors for a tensor, and `apply` computes the adapted tensor from them. λ is the
strength, which the user sets with `pl.scale`. Specs work on tensors only. They never see a module,
a name or a file.

Each kind is one final class that derives from `Spec`. There is no registry: attaching, switching,
merging and saving call the methods below. docs/kinds.md has a complete example of a new kind.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .arguments import SignatureOfInit, check_fields

_S = TypeVar("_S", bound="Spec")
Factors = Mapping[str, Tensor]
Strength = float | Tensor

_Maker = Callable[["Spec", Tensor, str, torch.Generator | None], nn.Module]
_MAKERS: list[_Maker] = []


def makes_parametrizations(make: _Maker) -> _Maker:
    """Register the function behind `Spec.parametrization`, which kinds cannot import.

    A kind knows tensors only, and a parametrization is a module with names and states.
    """
    _MAKERS.append(make)
    return make


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LowRank(NamedTuple):
    """A low-rank update in factored form, ΔW = scale · B A.

    Args:
        A: (r, in).
        B: (out, r).
        scale: s and the strength together, a number or a tensor without dimensions.

    >>> update = LowRank(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0], [4.0]]), scale=0.5)
    >>> update.scale * (update.B @ update.A)
    tensor([[1.5000, 3.0000],
            [2.0000, 4.0000]])
    """

    A: Tensor
    B: Tensor
    scale: Strength

    def transposed(self) -> "LowRank":
        """Return the update of the transposed weight, ΔWᵀ = scale · Aᵀ Bᵀ."""
        return LowRank(self.B.mT, self.A.mT, self.scale)


class Rescaled(NamedTuple):
    """A tensor that is rescaled along one dimension, W' = (1 + change) ⊙ (W + update).

    The 1 is not part of `change`, because half precision would round their sum: in bfloat16
    1 + 0.001 is 1, while 0.001 by itself has eight significant bits.

    Args:
        change: (W.shape[dim],), the relative change of each slice of W along `dim`; None if W is
            only updated. A kind returns that form if the factors of `update` depend on W's shape.
        dim: 0 or 1.
        update: a low-rank update that is added before W is rescaled, or None.

    >>> term = Rescaled(change=torch.tensor([0.0, 1.0]), dim=0, update=None)
    >>> (1 + term.change).unsqueeze(1) * torch.ones(2, 3)
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    """

    change: Tensor | None
    dim: int
    update: LowRank | None


@dataclass(frozen=True)
class Spec(ABC):
    """The base class of all kinds of adapters.

    To add a kind, derive a frozen dataclass and define `create` and `apply`. The other members are
    optional. The fields of the dataclass are saved with the adapter, so they must be numbers,
    strings, booleans or None. The class's name identifies the kind in files and in summaries.

    >>> @dataclass(frozen=True)
    ... class Offset(Spec):
    ...     'One learned number t that is added to all elements, W + λ·t.'
    ...
    ...     def create(self, weight, generator=None):
    ...         return {"t": torch.zeros((), dtype=factor_dtype(weight), device=weight.device)}
    ...
    ...     def apply(self, weight, factors, strength=1.0):
    ...         return add_update(weight, strength * factors["t"])
    >>> Offset().apply(torch.ones(2), {"t": torch.tensor(3.0)}, strength=0.5)
    tensor([2.5000, 2.5000])
    """

    __signature__: ClassVar[SignatureOfInit] = SignatureOfInit()

    def __new__(cls: type[_S], *args: Any, **kwargs: Any) -> _S:
        check_fields(cls, kwargs)
        return super().__new__(cls)

    def parametrization(
        self, weight: Tensor, name: str = "default", generator: torch.Generator | None = None
    ) -> nn.Module:
        """Return an adapter to register by torch's own function; all verbs work on it.

        The base is not frozen, as `attach` does. `parametrizations.weight[0].enabled = False`
        switches the adapter off.

        Args:
            weight: the tensor that the parametrization is for.
            name: the adapter's name.
            generator: the source of random numbers; None means torch's global one.

        >>> from torch.nn.utils import parametrize
        >>> import paramlora as pl
        >>> layer = nn.Linear(4, 3)
        >>> update = pl.LoRA(rank=2, alpha=1).parametrization(layer.weight)
        >>> _ = parametrize.register_parametrization(layer, "weight", update)
        >>> layer.parametrizations.weight[0].enabled = False
        """
        return _MAKERS[-1](self, weight, name, generator)

    @property
    def rank(self) -> int | None:
        """The rank that a summary shows; None if the kind has no rank."""
        return None

    @property
    def scaling(self) -> float:
        """The factor s of the update, in addition to the strength; 1 if the kind has none."""
        return 1.0

    @property
    def additive(self) -> bool:
        """Whether W' − W is independent of W. Additive adapters can be applied in any order."""
        return False

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of factors that are saved and moved with the others but never trained."""
        return ()

    @property
    def fast(self) -> tuple[str, ...]:
        """The names of factors with the higher rate in `parameter_groups`, such as LoRA's B."""
        return ()

    @property
    def dropout(self) -> float:
        """The probability with which elements of the update's input are zeroed in training.

        It needs the form `low_rank`, and acts in the forward of a Linear or transformers' Conv1D.
        """
        return 0.0

    @abstractmethod
    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return new factors for `weight`, by name.

        They must not change the tensor: `apply(weight, create(weight))` equals `weight` bitwise.
        Use `draw` for random factors, so that a seed gives the same factors on every device.

        Args:
            weight: the tensor to adapt, of any shape. `load` passes one on the meta device.
            generator: the source of random numbers; None means torch's global one.

        Returns:
            Factors on the device of `weight`, in `factor_dtype(weight)`.
        """

    @abstractmethod
    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        """Return the adapted tensor W'.

        The result must depend on the arguments alone, because layers call `apply` a second time in
        the backward pass instead of keeping W'.

        Args:
            weight: W, the tensor to adapt.
            factors: the tensors that `create` returned, trained since.
            strength: λ. At 0 the result equals `weight` bitwise.

        Returns:
            A tensor of the shape, dtype and device of `weight`.
        """

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank | None:
        """Return the update of a matrix as a `LowRank`, or None if the kind has no such form.

        A Linear or an Embedding then computes its output without building W'. A quantized layer can
        have only kinds with this form, whose `create` does not read the weight's values.
        """
        return None

    def rescaled(
        self, weight: Tensor, factors: Factors, strength: Strength = 1.0
    ) -> Rescaled | None:
        """Return W' as a `Rescaled`, or None if the kind has no such form.

        A Linear or an Embedding then computes its output without building W'.
        """
        return None

    def refusal(self, weight: Tensor) -> str | None:
        """Return why this kind cannot adapt `weight`, or None if it can.

        The text follows "cannot adapt 'fc.weight' with LoRA: " in the error that `attach` raises.
        """
        return None


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype for the factors of a tensor: its own, but float32 for half precision.

    A bfloat16 number has eight significant bits, so an optimizer's step below 1/512 of a factor
    would be rounded away. Factors are cast to the weight's dtype when they are used.

    Args:
        weight: the tensor to adapt.

    >>> factor_dtype(torch.zeros(2, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.promote_types(weight.dtype, torch.float32)


def add_update(weight: Tensor, update: Tensor) -> Tensor:
    """Return W + ΔW in the dtype of W, rounded once.

    Args:
        weight: W.
        update: ΔW, of a shape that broadcasts to that of W, in any floating dtype.

    >>> add_update(torch.ones(2, dtype=torch.bfloat16), torch.tensor([0.25, 0.5]))
    tensor([1.2500, 1.5000], dtype=torch.bfloat16)
    """
    return (weight + update).to(weight.dtype)


def along(values: Tensor, dim: int, weight: Tensor) -> Tensor:
    """Return `values`, one per index of dimension `dim`, in a shape that broadcasts to `weight`."""
    return values.view([-1 if i == dim else 1 for i in range(weight.dim())])


def is_finite(value: object) -> bool:
    """Return whether a value is a finite real number; a bool does not count as a number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False
