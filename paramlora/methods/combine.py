"""A new adapter that is the weighted sum of others.

    ΔW = Σᵢ wᵢ · sᵢ · Bᵢ Aᵢ         wᵢ: the weight of adapter i, sᵢ: its scale times its strength

    cat       A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁, B₂, …]      B A = ΔW, of rank Σ rᵢ
    svd       the best approximation of rank r to ΔW        B A ≈ ΔW
    linear    A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ           B A = ΔW + products Bᵢ Aⱼ of i ≠ j

"linear" sums the factors instead of the updates, and so keeps the rank. The product of its sums
contains more than ΔW: (B₁ + B₂)(A₁ + A₂) = B₁A₁ + B₂A₂ + B₁A₂ + B₂A₁.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.lora import LoRA
from ..kinds.spec import LowRank, is_finite
from ..kinds.start import truncated_svd
from ..layers.install import PlannedSite, check_name, check_tied
from ..site.find import dotted, is_swapped
from ..site.names import check_names
from ..site.place import Place, first_overlap
from ..site.survey import Survey
from ..stack.factors import Factors
from ..verbs.add import Activate, add, check_activate
from ..verbs.summary import Summary

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
    activate: Activate = "no",
) -> Summary:
    """Attach a new adapter that is the weighted sum of others, each at its current strength.

    The new adapter is an ordinary one. By default it is switched off, and the others stay as they
    are: `activate(model, name)` uses it in their place. A site that only some of the adapters have
    gets the sum over those. Every method sums `Delta`s exactly.

    Args:
        model: a module with the adapters.
        weights: the weight of each adapter, by name. A weight may be negative.
        name: the new adapter's name.
        method: how low-rank updates are summed.

            - "cat": exactly; the rank is the sum of the ranks.
            - "svd": the best approximation of rank `rank` to that sum.
            - "linear": A and B are summed separately, each weighted by √|w·s|. The rank stays, but
              the product of the sums is not the sum of the products.
        rank: the rank of "svd"; None means the largest rank of the adapters at a site.
        activate: "only", "also" or "no", as in `attach`. With "also" the model contains the updates
            of active adapters twice.

    Returns:
        The model's summary.

    Raises:
        AdapterNameError: an adapter does not exist, or the new name is taken or invalid.
        StateError: `activate` is "only" and another adapter is merged.
        TargetError: the kinds at a site cannot be summed, or blocks of one tensor overlap.
        ValueError: there are no weights, a weight is not a finite number, `method`, `rank` or
            `activate` is invalid, or "linear" is used for different ranks.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> _ = pl.attach(model, pl.LoRA(rank=1), name="a")
    >>> _ = pl.attach(model, pl.LoRA(rank=2), name="b")
    >>> pl.combine(model, {"a": 0.7, "b": 0.3}, name="ab").sites[-1].rank
    3

    The methods are those of PEFT's `add_weighted_adapter`.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must map adapter names to numbers, as {{'a': 0.7, 'b': 0.3}}; got {weights!r}"
        )
    _check_arguments(weights, method, rank)
    survey = Survey(model)
    check_names(survey.stacks, weights)
    check_name(survey, name)
    check_activate(survey, name, activate)
    tensors = {place.path: place for place in survey.places}
    terms: dict[str, list[_Term]] = {}
    chosen: dict[str, Place] = {}
    for adapter, weight in weights.items():
        for site in survey.sites_of(adapter):
            for path, factors in site.parts(adapter).items():
                terms.setdefault(path, []).append(_Term(float(weight), factors))
                chosen[path] = tensors[site.path]._replace(path=path, block=factors.block)
    _check_overlaps(chosen.values())
    check_tied(survey, chosen.values())
    planned = [
        PlannedSite(place, _sum(place, terms[path], method, rank)) for path, place in chosen.items()
    ]
    # In the order of the model, as by `attach`, and not in the order of the weights.
    order = {path: i for i, path in enumerate(tensors)}

    def position(plan: PlannedSite) -> tuple[int, list[tuple[int, int]]]:
        place = plan.place
        return order[dotted(place.module_path, place.tensor)], place.ranges

    return add(survey, sorted(planned, key=position), name, activate)


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
            raise ValueError(f"rank= is for method='svd' only; {method!r} determines its own rank")
        LoRA(rank)  # raises if the rank is invalid


def _check_overlaps(chosen: Iterable[Place]) -> None:
    """Raise a TargetError if two different places share elements of a tensor."""
    overlap = first_overlap(chosen)
    if overlap is not None:
        raise TargetError(
            f"cannot combine: {overlap[0].path!r} and {overlap[1].path!r} share elements, and one "
            "adapter cannot have both"
        )


def _sum(place: Place, terms: list[_Term], method: str, rank: int | None) -> Factors:
    """Return the new adapter's factors at one place, from those of the adapters there."""
    block = terms[0].factors.block
    if all(isinstance(term.factors.spec, Delta) for term in terms):
        D = sum(
            term.weight * float(term.factors.strength) * term.factors.get_parameter("D").detach()
            for term in terms
        )
        return Factors(Delta(), {"D": D}, block)  # type: ignore[dict-item]
    layout, updates = _updates(place.path, [term.factors for term in terms])
    scales = [term.weight * float(u.scale) for term, u in zip(terms, updates, strict=True)]
    As, Bs = [update.A for update in updates], [update.B for update in updates]
    if method == "linear":
        # PEFT's lora_A of an Embedding or a Conv1D is our B, transposed.
        sign_in_B = is_swapped(place.module) and not layout.get("transposed")
        A, B = _linear(place.path, scales, As, Bs, sign_in_B)
    else:
        A = torch.cat([scale * A for scale, A in zip(scales, As, strict=True)], dim=-2)
        B = torch.cat(Bs, dim=-1)
    if method == "svd":
        A, B = _truncate(A, B, rank or max(A.shape[-2] for A in As))
    return Factors(LoRA(A.shape[-2], **layout), {"A": A, "B": B}, block)


def _updates(path: str, parts: list[Factors]) -> tuple[dict[str, Any], list[LowRank]]:
    """Return the adapters' updates, and the layout that all of them have.

    If all are plain LoRAs of one layout, the updates are their own factors and the sum is a LoRA of
    that layout. Otherwise they are updates of the tensor as a matrix, which most kinds support.
    """
    layouts = [_layout(part) for part in parts]
    if layouts[0] is not None and all(layout == layouts[0] for layout in layouts):
        factors = [(p.get_parameter("A"), p.get_parameter("B"), p.scale) for p in parts]
        return layouts[0], [LowRank(*own) for own in factors]
    found = [part.spec.low_rank(part.tensors, part.strength) for part in parts]
    updates = [update for update in found if update is not None]
    if len(updates) < len(found):
        kinds = ", ".join(dict.fromkeys(type(part.spec).__name__ for part in parts))
        raise TargetError(
            f"cannot combine at {path!r}: the adapters there are of kind {kinds}; only low-rank "
            "updates of one layout can be summed, or Deltas with Deltas"
        )
    return {}, updates


def _layout(part: Factors) -> dict[str, Any] | None:
    """Return a LoRA's settings for viewing its tensor as matrices, or None for other kinds.

    A LoRA with constants counts as another kind.
    """
    spec = part.spec
    if type(spec) is not LoRA or spec.constants:
        return None
    return {"batch_dims": spec.batch_dims, "transposed": spec.transposed}


def _linear(
    path: str, scales: list[float], As: list[Tensor], Bs: list[Tensor], sign_in_B: bool
) -> tuple[Tensor, Tensor]:
    """Return Σ ±√|scale| A and Σ √|scale| B.

    The sign of a negative scale goes to one of the factors. The choice changes the products Bᵢ Aⱼ
    of different adapters. PEFT gives the sign to lora_A.
    """
    ranks = [A.shape[-2] for A in As]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"method='linear' needs equal ranks, and those at {path!r} are "
            f"{', '.join(map(str, ranks))}; use 'cat' or 'svd'"
        )
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    for_A, for_B = (roots, signed) if sign_in_B else (signed, roots)
    A = sum(root * A for root, A in zip(for_A, As, strict=True))
    B = sum(root * B for root, B in zip(for_B, Bs, strict=True))
    return A, B  # type: ignore[return-value]


def _truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of B A at a rank, without building B A.

    With B = Q R and Aᵀ = S P, where Q and S have orthonormal columns,

        B A = Q (R Pᵀ) Sᵀ

    so the singular values of B A are those of R Pᵀ, which has only as many rows and columns as A
    has rows. Truncating this small matrix truncates B A.
    """
    Q, R = torch.linalg.qr(B)  # (…, out, r), (…, r, r)
    S, P = torch.linalg.qr(A.mT)  # (…, in, r), (…, r, r)
    A, B, _ = truncated_svd(R @ P.mT, rank)
    return A @ S.mT, Q @ B  # (…, rank, in), (…, out, rank)
