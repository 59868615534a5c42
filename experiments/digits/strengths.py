"""A digit network's logits at many strengths of an adapter, for much less than a pass for each.

    W' = W + λ · s · B A        A: (r, in), B: (out, r)

Replaces `pl.scale` and a pass over all images for every λ, whose logits it gives to rounding; the
passes stay the reference that tests compare with, and what the study proves its claims by. At λ = 0
the logits are the base's own. With nothing between the layers the network is one linear map, and no
hidden unit is computed. With ReLUs between them x W₁ᵀ and x A₁ᵀ, most of the arithmetic, are the
same for all λ. What it costs: it knows the network's layers, and its adapter must be a LoRA.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import DigitNet


class Update(NamedTuple):
    """What an adapter adds to a layer's weight at λ = 1: s · B A."""

    A: Tensor
    B: Tensor
    scale: float


def updates(factors: Mapping[str, Tensor], scale: float) -> dict[str, Update]:
    """Return the update of each layer, by its path, from a LoRA's factors as the model names them.

    >>> A, B = torch.ones(1, 3), torch.ones(2, 1)
    >>> of = "linear1.parametrizations.weight.0.factors.digits"
    >>> list(updates({f"{of}.A": A, f"{of}.B": B}, 0.5))
    ['linear1']
    """
    tensors = {name: factor.detach() for name, factor in factors.items()}
    return {
        name.split(".parametrizations.")[0]: Update(A, tensors[name[:-1] + "B"], scale)
        for name, A in tensors.items()
        if name.endswith(".A")
    }


class Strengths:
    """The answers of a base to some inputs, with any adapter at any strength.

    Args:
        base: the network, without adapters.
        inputs: float32 (n, 784).
        base_logits: the base's own, (n, classes).
    """

    def __init__(self, base: nn.Module, inputs: Tensor, base_logits: Tensor) -> None:
        assert isinstance(base, DigitNet)
        self.base, self.inputs, self.base_logits = base, inputs, base_logits
        self.layers: dict[str, nn.Linear] = dict(base.named_children())  # type: ignore[arg-type]

    @torch.no_grad()
    def logits(self, its: Mapping[str, Update], strengths: Sequence[float]) -> Tensor:
        """Return the logits at each strength, (strengths, n, classes).

        `its`: the updates by the layer's path; a layer without one stays the base's.
        """
        λ = self.inputs.new_tensor(strengths)
        logits = self._by_layer(its, λ) if self.base.inner_relu else self._at_once(its, λ)
        if self.base.relu_logits:
            logits = logits.relu_()
        logits[λ == 0] = self.base_logits
        return logits

    def _at_once(self, its: Mapping[str, Update], strengths: Tensor) -> Tensor:
        """Return the logits of a network that is one linear map x Mᵀ + c, for every λ together.

        M = W₃'W₂'W₁' = Σ C R, where neither W₃W₂W₁ nor A₁, A₂W₁, A₃W₂W₁, the R, depend on λ: all
        images are read once, to 10 + 3r numbers each, and every λ is a sum of these.
        """
        count, λ = len(strengths), strengths.view(-1, 1, 1)
        eye = torch.eye(self.base_logits.shape[1], dtype=λ.dtype, device=λ.device)
        M = eye.expand(count, -1, -1)
        c, C, R = M.new_zeros(M.shape[:2]), [M], [eye]
        for name, layer in reversed(self.layers.items()):
            c = c + M @ layer.bias
            R = [rows @ layer.weight for rows in R]
            next_M = M @ layer.weight
            if name in its:
                A, B, scale = its[name]
                C.append(λ * scale * (M @ B))
                R.append(A)
                next_M = next_M + C[-1] @ A
            M = next_M
        read = self.inputs @ torch.cat(R).t()
        rows = F.linear(read, torch.cat(C, 2).flatten(0, 1), c.flatten())
        return rows.view(-1, *c.shape).transpose(0, 1)

    def _by_layer(self, its: Mapping[str, Update], strengths: Tensor) -> Tensor:
        """Return the logits of a network with ReLUs between its layers, one λ after the other."""
        (first, _), *rest = self.layers.items()
        read = self.inputs @ its[first].A.t() if first in its else None
        found = []
        for λ in strengths.tolist():
            h = self._first
            if read is not None:
                h = torch.addmm(h, read, its[first].B.t(), alpha=λ * its[first].scale)
            for name, layer in rest:
                W = layer.weight
                if name in its:
                    W = torch.addmm(W, its[name].B, its[name].A, alpha=λ * its[name].scale)
                h = F.linear(h.relu(), W, layer.bias)
            found.append(h)
        return torch.stack(found)

    @cached_property
    def _first(self) -> Tensor:
        """What the base's first layer gives, before its ReLU: the same for every adapter."""
        return next(iter(self.layers.values()))(self.inputs)


def chosen(its: Mapping[str, Update], sites: Iterable[str]) -> dict[str, Update]:
    """Return the updates at some sites alone, such as `linear1.weight`."""
    paths = {site.rpartition(".")[0] for site in sites}
    return {path: update for path, update in its.items() if path in paths}
