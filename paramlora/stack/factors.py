"""The factors of one adapter at one tensor, or at blocks of it, as modules of a stack."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds.spec import Factors as Tensors
from ..kinds.spec import LowRank, Rescaled, Spec, Strength
from .block import Block

# Instead of a strength: the one for torch.compile. A string, which the compiler can compare.
TRACED: Any = "traced"


class Factors(nn.Module):
    """The factors of one adapter at one site, with the spec that applies them.

    Methods that take a `strength` compute with the adapter's own one if it is None.

    Args:
        spec: the kind of adapter, with its settings.
        tensors: the factors by name; those in `spec.constants` become buffers, the others
            parameters.
        block: the part of the tensor that they change; None for all of it.

    Attributes:
        strength: the adapter's own strength, which `scale` sets.
        traced_strength: the strength for torch.compile, open blocks included (`Stack.reflect`).
    """

    def __init__(
        self, spec: Spec, tensors: Mapping[str, Tensor], block: Block | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.block = block
        self.strength: Strength = 1.0
        self.traced_strength: Strength = 1.0
        for key, tensor in tensors.items():
            tensor = trainable(tensor)
            if key in spec.constants:
                self.register_buffer(key, tensor)
            else:
                self.register_parameter(key, nn.Parameter(tensor))

    def set_strength(self, strength: Strength) -> None:
        # nn.Module.__setattr__ would register a strength that is an nn.Parameter as a factor.
        vars(self).update(strength=strength, traced_strength=strength)

    def trace_strength(self, strength: Strength | None) -> None:
        """Set the strength for torch.compile: that of an open block, or else the own one."""
        vars(self)["traced_strength"] = self.strength if strength is None else strength

    def forward(self, weight: Tensor, strength: Strength | None = None) -> Tensor:
        return apply_factors(self.spec, self.block, weight, self.tensors, self.at(strength))

    def low_rank(self, strength: Strength | None = None) -> LowRank | None:
        strength = self.strength if strength is None else self.at(strength)
        term = self.spec.low_rank(self.tensors, strength)
        return term if term is None or self.block is None else self.block.widen(term)

    def at(self, strength: Strength | None) -> Strength:
        """Return a strength, or the adapter's own one for None."""
        if strength is None:
            return self.strength
        return self.traced_strength if strength is TRACED else strength

    @property
    def scale(self) -> Strength:
        """The factor of the update: the adapter's own strength times the spec's scaling."""
        return self.strength * self.spec.scaling

    def rescaled(self, weight: Tensor, strength: Strength | None = None) -> Rescaled | None:
        if self.block is not None:
            return None
        return self.spec.rescaled(weight, self.tensors, self.at(strength))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The factors by name, constants last."""
        if self._buffers:
            return {**self._parameters, **self._buffers}  # type: ignore[dict-item]
        return self._parameters  # type: ignore[return-value]


def trainable(tensor: Tensor) -> Tensor:
    """Return a tensor, or its copy if it was made in inference mode: autograd refuses those."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


class Blocks(nn.Module):
    """The factors of one adapter at several blocks of a tensor that do not overlap."""

    def forward(self, weight: Tensor, strength: Strength | None) -> Tensor:
        for factors in self.parts:
            weight = factors(weight, strength)
        return weight

    def low_rank(self, strength: Strength | None = None) -> LowRank | None:
        terms = []
        for factors in self.parts:
            term = factors.low_rank(strength)
            if term is None:
                return None
            terms.append(term)
        scales = [term.scale for term in terms]
        Bs = [term.B for term in terms]
        if all(type(scale) is float and scale == scales[0] for scale in scales):
            scale = scales[0]
        else:
            Bs, scale = [B * scale for B, scale in zip(Bs, scales, strict=True)], 1.0
        return LowRank(torch.cat([term.A for term in terms]), torch.cat(Bs, dim=1), scale)

    @property
    def parts(self) -> list[Factors]:
        return list(self._modules.values())  # type: ignore[arg-type]


def apply_factors(
    spec: Spec, block: Block | None, weight: Tensor, tensors: Tensors, strength: Strength
) -> Tensor:
    """Return `weight` after a spec has changed a block of it (None: all of it)."""
    if block is None:
        return spec.apply(weight, tensors, strength)
    return block.put(weight, spec.apply(block.cut(weight), tensors, strength))
