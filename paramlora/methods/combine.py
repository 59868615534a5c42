"""Adapters made of others: a weighted sum of several.

ΔW = Σᵢ wᵢ · λᵢ · sᵢ · Bᵢ Aᵢ
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.lora import LoRA
from ..kinds.spec import LowRank, is_finite
from ..layers.install import Planned, check_name, check_tied, install
from ..site.factors import Factors
from ..site.find import is_swapped
from ..site.place import Place
from ..site.survey import Survey, places, select, sites_of
from ..verbs.summary import Summary, summary

# The fields of a LoRA that a combined one has for itself.
_SIZE = ("rank", "alpha", "init", "rank_stabilized")
_METHODS = ("cat", "linear", "svd")


class _Term(NamedTuple):
    """One adapter at one site, with its weight in the sum."""

    weight: float
    factors: Factors


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    method: str = "cat",
    rank: int | None = None,
) -> Summary:
    """Attach a new adapter that is a weighted sum of others, each at the strength that it has.

    It is an ordinary adapter, switched on as `attach` does it. The others stay as they are: switch
    them off or detach them, or the model has their updates twice. A `Delta` is summed exactly by
    each method, and a site that only some of the adapters have is summed over those.

    Args:
        model: a module with the adapters.
        weights: the adapters by name, each with its weight, of either sign.
        name: the new adapter's name.
        method: "cat", the exact sum, of a rank that is the sum of the ranks; "svd", the best
            approximation to that sum of rank `rank`; or "linear", the sums of the factors, each by
            √|w·s|, which is the product of sums and no sum of products, but keeps the rank.
        rank: that of "svd", at most; the largest of the adapters' ranks where it is left out.

    Returns:
        The model's summary.

    Raises:
        AdapterNameError: no adapter of that name, or the new name is taken or cannot be one.
        TargetError: a site whose kinds cannot be summed, or blocks of one tensor that overlap.
        ValueError: no weights, one that is no finite number, no such method, a rank that is none,
            or different ranks where "linear" needs one.

    The methods are those of PEFT's `add_weighted_adapter`.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=1), name="a")
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="b")
    >>> pl.combine(model, {"a": 0.7, "b": 0.3}, name="ab").sites[-1].rank
    3
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights map adapters to numbers, {{'a': 0.7, 'b': 0.3}}; got {weights!r}")
    _check_arguments(weights, method, rank)
    select(model, list(weights))
    check_name(Survey(model), name)
    here = {place.path: place for place in places(model)}
    terms: dict[str, list[_Term]] = {}
    chosen: dict[str, Place] = {}
    for adapter, weight in weights.items():
        for site in sites_of(model, adapter):
            for path, factors in site.parts(adapter).items():
                terms.setdefault(path, []).append(_Term(float(weight), factors))
                chosen[path] = here[site.path]._replace(path=path, block=factors.block)
    _check_apart(list(chosen.values()))
    check_tied(Survey(model), list(chosen.values()))
    planned = [
        Planned(chosen[path], _combined(chosen[path], its_terms, method, rank))
        for path, its_terms in terms.items()
    ]
    order = {place.path: i for i, place in enumerate(here.values())}
    planned.sort(key=lambda plan: (order[_whole(plan.place)], plan.place.ranges))
    install(Survey(model), planned, name, freeze=True)
    return summary(model)


def _whole(place: Place) -> str:
    return place.path.removesuffix(str(place.block)) if place.block else place.path


def _check_arguments(weights: Mapping[str, float], method: str, rank: int | None) -> None:
    if not weights:
        raise ValueError("no weights: name at least one adapter, such as {'a': 0.7, 'b': 0.3}")
    for adapter, weight in weights.items():
        if not is_finite(weight):
            raise ValueError(f"the weight of {adapter!r} must be a finite number, got {weight!r}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if rank is not None:
        if method != "svd":
            raise ValueError(f"rank= is for method='svd'; {method!r} has a rank of its own")
        LoRA(rank)  # which says what a rank is


def _check_apart(chosen: list[Place]) -> None:
    """Raise a TargetError where two places, in part the same, would be of one adapter."""
    by_tensor: dict[int, list[Place]] = {}
    for place in chosen:
        others = by_tensor.setdefault(id(place.stored), [])
        for other in others:
            if place.meets(other):
                raise TargetError(
                    f"cannot combine: {other.path!r} and {place.path!r} share elements, and one "
                    "adapter cannot have both"
                )
        others.append(place)


def _combined(place: Place, terms: list[_Term], method: str, rank: int | None) -> Factors:
    """Return the factors at one site; its terms are those of the adapters that have it."""
    block = terms[0].factors.block
    specs = [term.factors.spec for term in terms]
    if all(isinstance(spec, Delta) for spec in specs):
        total = sum(_scaled(term) for term in terms)
        return Factors(Delta(), {"D": total}, block)  # type: ignore[dict-item]
    layout, updates = _updates(place.path, [term.factors for term in terms])
    scales = [term.weight * float(u.scale) for term, u in zip(terms, updates, strict=True)]
    As, Bs = [update.A for update in updates], [update.B for update in updates]
    if method == "linear":
        signed_B = is_swapped(place.module) and not layout.get("transposed")
        A, B = _linear(place.path, scales, As, Bs, signed_B)
    else:
        A = torch.cat([s * A for s, A in zip(scales, As, strict=True)], dim=-2)
        B = torch.cat(Bs, dim=-1)
    if method == "svd":
        A, B = _truncated(A, B, rank or max(A.shape[-2] for A in As))
    return Factors(LoRA(A.shape[-2], **layout), {"A": A, "B": B}, block)


def _scaled(term: _Term) -> Tensor:
    return term.weight * float(term.factors.strength) * term.factors.get_parameter("D").detach()


def _updates(path: str, parts: list[Factors]) -> tuple[dict[str, Any], list[LowRank]]:
    """Return the fields that say how a LoRA lies in its tensor, and the updates that lie so."""
    layouts = [_layout(part) for part in parts]
    if layouts[0] is not None and all(layout == layouts[0] for layout in layouts):
        own = [LowRank(p.get_parameter("A"), p.get_parameter("B"), p.scale) for p in parts]
        return layouts[0], own
    terms = [part.spec.low_rank(part.tensors, part.strength) for part in parts]
    updates = [term for term in terms if term is not None]
    if len(updates) < len(terms):
        kinds = ", ".join(dict.fromkeys(type(part.spec).__name__ for part in parts))
        raise TargetError(
            f"cannot combine at {path!r}: the adapters there are of kind {kinds}; only low-rank "
            "updates can be summed, or Deltas, each with their like"
        )
    return {}, updates


def _layout(part: Factors) -> dict[str, Any] | None:
    """Return the fields of a LoRA beside those of its size and start, None for another kind."""
    if type(part.spec) is not LoRA or part.tensors.keys() != {"A", "B"}:
        return None
    values = {field.name: getattr(part.spec, field.name) for field in fields(part.spec)}
    return {key: value for key, value in values.items() if key not in _SIZE}


def _linear(
    path: str, scales: list[float], As: list[Tensor], Bs: list[Tensor], signed_B: bool
) -> tuple[Tensor, Tensor]:
    """Return the sums of A and of B; the sign of a scale goes to what PEFT calls A there."""
    ranks = [A.shape[-2] for A in As]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"method='linear' needs one rank, at {path!r} there are {', '.join(map(str, ranks))}; "
            "use 'cat' or 'svd'"
        )
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    for_A, for_B = (roots, signed) if signed_B else (signed, roots)
    A = sum(root * A for root, A in zip(for_A, As, strict=True))
    B = sum(root * B for root, B in zip(for_B, Bs, strict=True))
    return A, B  # type: ignore[return-value]


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation to B A of a rank, without B A itself.

    B A = Q (R Pᵀ) Sᵀ for B = Q R and Aᵀ = S P: the decomposition is that of a small matrix.
    """
    Q, R = torch.linalg.qr(B)
    S, P = torch.linalg.qr(A.mT)
    A, B, _ = decomposed(R @ P.mT, rank)
    return A @ S.mT, Q @ B


def decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B of the best approximation of a rank, and all singular values."""
    U, values, V = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[..., :rank].sqrt()
    return roots.unsqueeze(-1) * V[..., :rank, :], U[..., :rank] * roots.unsqueeze(-2), values
