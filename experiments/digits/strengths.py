"""A digit network's logits at many strengths of an adapter, faster than one pass per strength.

    W' = W + λ · s · B A        A: (r, in), B: (out, r)

This file replaces `pl.scale` and one pass over all images per λ. Its logits equal those of the
passes up to rounding. The passes remain the reference in the tests and in the study's checks. At
λ = 0 the logits are bit-for-bit the base's.

Without an activation the network is one linear map, and no hidden unit is computed. With ReLUs,
x W₁ᵀ and x A₁ᵀ, which are most of the arithmetic, are computed once for all λ. The cost is that the
code depends on the layers of `DigitNet` and works for LoRA only.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import DigitNet


class Update(NamedTuple):
    """The update s · B A of a layer's weight at λ = 1; A: (r, in), B: (out, r), scale: s."""

    A: Tensor
    B: Tensor
    scale: float


def updates(factors: Mapping[str, Tensor], scale: float) -> dict[str, Update]:
    """Return the update of each layer by path, from the factors of a LoRA by parameter name.

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
    """The logits of a base with any LoRA adapter at any strength, for fixed inputs.

    Args:
        base: the network, without adapters.
        inputs: float32 (n, 784).
        base_logits: the base's logits, (n, classes).
    """

    def __init__(self, base: nn.Module, inputs: Tensor, base_logits: Tensor) -> None:
        assert isinstance(base, DigitNet)
        self.base, self.inputs, self.base_logits = base, inputs, base_logits
        self.layers: dict[str, nn.Linear] = dict(base.named_children())  # type: ignore[arg-type]

    @torch.no_grad()
    def logits(self, updates: Mapping[str, Update], strengths: Sequence[float]) -> Tensor:
        """Return the logits at each strength, (strengths, n, classes).

        Args:
            updates: the updates by layer path. Layers without an update keep the base's weight.
            strengths: the values of λ.
        """
        λ = self.inputs.new_tensor(strengths)
        logits = self._by_layer(updates, λ) if self.base.inner_relu else self._at_once(updates, λ)
        if self.base.relu_logits:
            logits = logits.relu_()
        logits[λ == 0] = self.base_logits
        return logits

    def _at_once(self, updates: Mapping[str, Update], strengths: Tensor) -> Tensor:
        """Return the logits for all λ at once, if the network is one linear map x Mᵀ + c.

        Multiplied out, M = W₃'W₂'W₁' = Σ C R. The matrices R are W₃W₂W₁ (10, 784) and A₁, A₂W₁,
        A₃W₂W₁ (r, 784). They do not depend on λ. Only the coefficients C do, (10, r) for each
        layer. One product reduces each image to 10 + 3r numbers, and the logits at each λ are
        linear in these. A pass per λ would multiply all images by all layers again.
        """
        count, λ = len(strengths), strengths.view(-1, 1, 1)
        eye = torch.eye(self.base_logits.shape[1], dtype=λ.dtype, device=λ.device)
        M = eye.expand(count, -1, -1)  # (λ, 10, 10), below (λ, 10, in of the layer)
        c, C, R = M.new_zeros(M.shape[:2]), [M], [eye]
        for name, layer in reversed(self.layers.items()):
            c = c + M @ layer.bias
            R = [rows @ layer.weight for rows in R]
            next_M = M @ layer.weight
            if name in updates:
                A, B, scale = updates[name]
                C.append(λ * scale * (M @ B))
                R.append(A)
                next_M = next_M + C[-1] @ A
            M = next_M
        read = self.inputs @ torch.cat(R).t()  # (n, 10 + 3r)
        rows = F.linear(read, torch.cat(C, 2).flatten(0, 1), c.flatten())
        return rows.view(-1, *c.shape).transpose(0, 1)

    def _by_layer(self, updates: Mapping[str, Update], strengths: Tensor) -> Tensor:
        """Return the logits of a network with ReLUs between its layers, one λ after another."""
        (first, _), *rest = self.layers.items()
        read = self.inputs @ updates[first].A.t() if first in updates else None
        found = []
        for λ in strengths.tolist():
            h = self._first
            if read is not None:
                h = torch.addmm(h, read, updates[first].B.t(), alpha=λ * updates[first].scale)
            for name, layer in rest:
                W = layer.weight
                if name in updates:
                    W = torch.addmm(
                        W, updates[name].B, updates[name].A, alpha=λ * updates[name].scale
                    )
                h = F.linear(h.relu(), W, layer.bias)
            found.append(h)
        return torch.stack(found)

    @cached_property
    def _first(self) -> Tensor:
        """The output of the base's first layer before its ReLU, (n, hidden)."""
        return next(iter(self.layers.values()))(self.inputs)


def chosen(updates: Mapping[str, Update], sites: Iterable[str]) -> dict[str, Update]:
    """Return only the updates at these sites, such as `linear1.weight`."""
    paths = {site.rpartition(".")[0] for site in sites}
    return {path: update for path, update in updates.items() if path in paths}
