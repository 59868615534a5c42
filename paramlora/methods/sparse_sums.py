"""Sums of full-size updates of which some elements are left out: TIES and DARE.

    ties    keep the largest elements of each ΔWᵢ; at each element, average the wᵢ ΔWᵢ whose sign is
            that of the sum of all ΔWᵢ
    dare    keep each element of each ΔWᵢ with probability p, divided by p; sum the wᵢ ΔWᵢ

p is the density. Both equal PEFT's `ties` and `dare_linear` on full-size updates.

Sources: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv
2306.01708, section 4; Yu et al. 2023, "Language Models are Super Mario: Absorbing Abilities from
Homologous Models as a Free Lunch", arXiv 2311.03099, section 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.lora import LoRA
from ..kinds.spec import factor_dtype
from ..kinds.start import truncated_svd
from ..site.place import Place
from ..stack.factors import Factors
from .low_rank_sums import Term


class How(NamedTuple):
    """The arguments of `combine` that say how updates are summed."""

    method: str
    rank: int | None
    density: float | None
    generator: torch.Generator | None


def sparse_sum(place: Place, terms: list[Term], how: How) -> Factors:
    """Return the factors of "ties" and "dare": a Delta, or a LoRA if a rank is given."""
    updates = [_full_update(place, term.factors) for term in terms]
    weights = [term.weight for term in terms]
    density = float(how.density)  # type: ignore[arg-type]
    if how.method == "ties":
        D = ties(updates, weights, density)
    else:
        D = dare(updates, weights, density, how.generator)
    if how.rank is None or D.dim() < 2:
        return Factors(Delta(), {"D": D}, place.block)
    A, B, _ = truncated_svd(D.flatten(1), how.rank)
    return Factors(LoRA(A.shape[0]), {"A": A, "B": B}, place.block)


def ties(updates: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return the sum of TIES.

    >>> ties([torch.tensor([3.0, 0.1, -4.0]), torch.tensor([5.0, 0.2, 1.5])], [1.0, 1.0], 0.7)
    tensor([ 4.,  0., -4.])
    """
    trimmed = torch.stack([_largest(update, density) for update in updates])  # (n, …)
    elected = torch.where(trimmed.sum(0) >= 0, 1, -1)
    agrees = trimmed.sign() == elected
    scales = trimmed.new_tensor(weights).view(-1, *[1] * updates[0].dim())
    return (scales * trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def dare(
    updates: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the sum of DARE; the numbers are drawn on the generator's device, by default the CPU.

    >>> dare([torch.ones(2), torch.ones(2)], [0.5, -2.0], 1.0, None)
    tensor([-1.5000, -1.5000])
    """
    total = torch.zeros_like(updates[0])
    device = "cpu" if generator is None else generator.device
    for update, weight in zip(updates, weights, strict=True):
        drawn = torch.rand(update.shape, generator=generator, device=device)
        total += weight / density * update * (drawn < density).to(update.device)
    return total


def _largest(update: Tensor, density: float) -> Tensor:
    """Return an update with only its largest elements, a share `density` of them, at least one."""
    flat = update.flatten()
    kept = flat.abs().topk(max(1, int(density * len(flat)))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(update.shape)


def _full_update(place: Place, factors: Factors) -> Tensor:
    """Return ΔW of an adapter at a place, which must be independent of W."""
    if not factors.spec.additive:
        raise TargetError(
            f"cannot combine at {place.path!r}: the update of kind {type(factors.spec).__name__} "
            "depends on the weight, so it cannot be summed with others"
        )
    zero = torch.zeros_like(place.value, dtype=factor_dtype(place.value), requires_grad=False)
    return factors.spec.apply(zero, factors.tensors, factors.strength)
