"""Places: the tensors of a model that can become sites, and blocks of them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from ..errors import TargetError
from ..kinds.spec import FLOATS, Spec
from ..stack.block import Block, Part
from ..stack.stack import Stack
from ..stack.storage import is_sharded
from .find import (
    base_weight,
    dotted,
    is_transformers_conv1d,
    parametrization_lists,
    stack_of,
    stored_tensors,
)
from .quantized import UnreadWeight, is_wrapper, packed_tensor
from .quantized import refusal as quantized_refusal


class Place(NamedTuple):
    """A tensor that can become a site, or a block of one; a block's path ends with its index."""

    path: str
    module_path: str
    module: nn.Module
    tensor: str
    block: Block | None = None

    @property
    def whole(self) -> Tensor:
        """The base's W: the stored tensor, or the result of the parametrizations below a stack.

        Of a quantized layer, an `UnreadWeight`.
        """
        plist = parametrization_lists(self.module).get(self.tensor)
        if plist is not None:
            return base_weight(plist, stack_of(plist))
        packed = packed_tensor(self.module) if self.tensor == "weight" else None
        if packed is None:
            return self.stored
        return UnreadWeight.of(packed, (self.module.out_features, self.module.in_features))  # type: ignore[arg-type]

    @property
    def value(self) -> Tensor:
        """The weight that an adapter here gets: W, or the block of it."""
        return self.whole if self.block is None else self.block.cut(self.whole)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The range in each dimension; empty for the whole tensor."""
        return [] if self.block is None else self.block.ranges

    def at(self, index: Sequence[Part]) -> "Place":
        """Return the place of a block of this tensor.

        Raises:
            TargetError: the index does not fit the tensor.
        """
        shape = self.whole.shape
        try:
            block = Block.of(index, shape)
        except ValueError as error:
            raise TargetError(
                f"cannot take a block of {self.path!r}, which has shape {tuple(shape)}: {error}"
            ) from error
        return self._replace(path=f"{self.path}{block or ''}", block=block)

    def meets(self, other: "Place") -> bool:
        """Return whether two places of the same tensor have an element in common."""
        whole = self.block is None or other.block is None
        return whole or self.block.overlaps(other.block)  # type: ignore[union-attr, arg-type]

    def claimed(self, other: "Place") -> bool:
        """Return whether an adapter at `other`, a place of the same tensor, excludes one here.

        Raises:
            TargetError: both are different blocks, and they overlap.
        """
        if self.block is None or other.block is None or self.block == other.block:
            return True
        if self.meets(other):
            raise TargetError(
                f"{other.path!r} and {self.path!r} overlap; give one adapter blocks that do not, "
                "or attach another adapter under a name of its own"
            )
        return False

    @property
    def stored(self) -> Tensor:
        """The stored tensor: the parameter itself, or the first one below parametrizations."""
        plist = parametrization_lists(self.module).get(self.tensor)
        if plist is not None:
            return stored_tensors(plist)[0]
        stored = self.module._parameters.get(self.tensor)
        packed = packed_tensor(self.module) if stored is None else None
        return getattr(self.module, self.tensor) if packed is None else packed

    @property
    def stack(self) -> Stack | None:
        """The stack that is at the tensor already."""
        return stack_of(parametrization_lists(self.module).get(self.tensor))


def places_in(modules: Iterable[tuple[str, nn.Module]]) -> list[Place]:
    """Return every parameter of these modules of a base, parametrized ones included, in order."""
    found = []
    for path, module in modules:
        # The parameters of other parametrizations cannot be adapted.
        if "parametrizations" in path.split("."):
            continue
        packed = packed_tensor(module)
        own = {name: p for name, p in module._parameters.items() if p is not None}
        names = list(own)
        if packed is not None and "weight" not in own:  # it is under another name
            names = ["weight", *(name for name in own if own[name] is not packed)]
        names += [
            name
            for name, plist in parametrization_lists(module).items()
            if name not in names and isinstance(stored_tensors(plist)[0], nn.Parameter)
        ]
        found += [Place(dotted(path, name), path, module, name) for name in names]
    return found


def first_overlap(places: Iterable[Place]) -> tuple[Place, Place] | None:
    """Return the first two places that share elements of a tensor, or None."""
    by_tensor: dict[int, list[Place]] = {}
    for place in places:
        others = by_tensor.setdefault(id(place.stored), [])
        for other in others:
            if place.meets(other):
                return other, place
        others.append(place)
    return None


def check_shapes(everywhere: Iterable[Place]) -> None:
    """Raise a TargetError if a parameter is lazy: it cannot be frozen or counted yet."""
    for place in everywhere:
        if nn.parameter.is_lazy(place.stored):
            raise TargetError(
                f"{place.path!r} is lazy and has no shape yet; run one batch through the model "
                "first, and attach then"
            )


def check(place: Place, spec: Spec) -> None:
    """Raise a TargetError if `spec` cannot adapt the tensor at `place`."""
    reason = _refusal(place, spec)
    if reason is not None:
        raise TargetError(
            f"cannot adapt {place.path!r} with {type(spec).__name__}: {reason} (leave it out "
            "with narrower targets or with exclude=)"
        )


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is a quantized module of torch, whose `weight` is a method."""
    if "weight" in parametrization_lists(module):
        return False  # reading it would advance the power iteration of spectral_norm
    weight = getattr(module, "weight", None)
    return callable(weight) and not isinstance(weight, nn.Module)


def _refusal(place: Place, spec: Spec) -> str | None:
    plist = parametrization_lists(place.module).get(place.tensor)
    if plist is not None and parametrization_lists(plist):
        # torch's list counts their ModuleDict as one of its steps, and would skip a new one.
        return "a tensor that its parametrization stores is parametrized in turn"
    weight = place.value
    if weight.is_quantized or weight.dtype not in FLOATS:
        return (
            f"its dtype is {weight.dtype}; only floating tensors of 16 to 64 bits can be adapted, "
            "not integer, complex or packed ones"
        )
    if is_sharded(place.module, weight):
        return "it is sharded over processes; attach first, and call fully_shard after that"
    if isinstance(weight, UnreadWeight):
        return quantized_refusal(spec, weight, place.module)
    if is_wrapper(weight):
        return f"it is packed ({type(weight).__name__}), and not the weight of a linear layer"
    if weight.layout is not torch.strided:
        return f"its layout is {weight.layout}; adapters need a strided (dense) tensor"
    if weight.numel() == 0:
        return f"it has no elements, its shape is {tuple(weight.shape)}"
    return spec.refusal(weight) or (dropout_refusal(place) if spec.dropout else None)


def dropout_refusal(place: Place) -> str | None:
    """Return why an adapter at a place cannot have dropout, or None if it can.

    Dropout is no change of a weight. Layers that build W' compute without it, and so does an
    attention, which reads the weight of its `out_proj` and never calls it.
    """
    if isinstance(place.whole, UnreadWeight):
        return None
    cls: Any = parametrize.type_before_parametrizations(place.module)
    own = issubclass(cls, nn.Linear) and cls.forward is not nn.Linear.forward
    known = issubclass(cls, nn.Linear | nn.Embedding) or is_transformers_conv1d(cls)
    if own or not known or cls is NonDynamicallyQuantizableLinear:
        return (
            "dropout needs a layer that computes the update from its input, which are Linear, "
            f"transformers' Conv1D and quantized layers, and not {cls.__name__}"
            f"{' with a forward of its own' if own else ''}; use dropout=0 here"
        )
    steps = parametrization_lists(place.module).get(place.tensor, ())
    if len(steps) > (place.stack is not None):
        return "dropout needs a tensor without other parametrizations; use dropout=0 here"
    return None
