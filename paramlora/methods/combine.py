"""A new adapter that is the weighted sum of others.

    ΔW = Σᵢ wᵢ · sᵢ · Bᵢ Aᵢ         wᵢ: the weight of adapter i, sᵢ: its scale times its strength

    cat       A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁, B₂, …]      B A = ΔW, of rank Σ rᵢ
    svd       the best approximation of rank r to ΔW        B A ≈ ΔW
    linear    A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ           B A = ΔW + products Bᵢ Aⱼ of i ≠ j
    ties      of full-size updates, see sparse_sums.py
    dare      of full-size updates, see sparse_sums.py

"linear" sums the factors instead of the updates, and so keeps the rank. The product of its sums
contains more than ΔW: (B₁ + B₂)(A₁ + A₂) = B₁A₁ + B₂A₂ + B₁A₂ + B₂A₁.
"""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.lora import LoRA
from ..kinds.spec import is_finite
from ..layers.install import PlannedSite, check_name, check_tied
from ..site.find import is_swapped
from ..site.names import check_names
from ..site.place import Place, first_overlap
from ..site.survey import Survey
from ..stack.factors import Factors
from ..verbs.add import Activate, add, check_activate
from ..verbs.summary import Summary
from .low_rank_sums import Term, distance, exact_sum, linear_sum, truncate, updates_of
from .sparse_sums import How, sparse_sum

_METHODS = ("cat", "linear", "svd", "ties", "dare")
_DENSE = ("ties", "dare")


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
    activate: Activate = "no",
) -> Summary:
    """Attach a new adapter that is the weighted sum of others, each at its current strength.

    The new adapter is an ordinary one. By default it is switched off, and the others stay as they
    are: `activate(model, name)` uses it in their place. A site that only some of the adapters have
    gets the sum over those. "cat", "svd" and "linear" sum `Delta`s exactly.

    As after `attach` and `load`, the new factors are trainable, also while they are switched off.
    `freeze(model, name)` fixes a copy such as the reference of a policy.

    Warns if a weight is negative, the method is "linear" and its result is not the sum. The message
    says how far it is from it.

    Args:
        model: a module with the adapters.
        weights: the weight of each adapter, by name. A weight may be negative.
        name: the new adapter's name.
        method: how low-rank updates are summed.

            - "cat": exactly; the rank is the sum of the ranks.
            - "svd": the best approximation of rank `rank` to that sum.
            - "linear": A and B are summed separately, each weighted by √|w·s|. The rank stays, but
              the product of the sums is not the sum of the products.
            - "ties": of each update keeps the largest elements, and averages those that agree with
              the sign of their sum. Any kind whose update is independent of W can be summed.
            - "dare": keeps elements of each update at random, divided by `density`, and sums them.
        rank: the rank of "svd"; None means the largest rank of the adapters at a site. "ties" and
            "dare" give a `Delta`, or a LoRA of this rank, the best approximation of it.
        density: the share of the elements that "ties" and "dare" keep, above 0 and at most 1.
        generator: the source of random numbers of "dare"; None means torch's global one.
        activate: "only", "also" or "no", as in `attach`. With "also" the model contains the updates
            of active adapters twice.

    Returns:
        The model's summary.

    Raises:
        AdapterNameError: an adapter does not exist, or the new name is taken or invalid.
        StateError: `activate` is "only" and another adapter is merged.
        TargetError: the kinds at a site cannot be summed, or blocks of one tensor overlap.
        ValueError: there are no weights, a weight is not a finite number, `method`, `rank`,
            `density` or `activate` is invalid, or "linear" is used for different ranks.

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
    how = How(method, rank, density, generator)
    _check_arguments(weights, how)
    survey = Survey(model)
    check_names(survey.stacks, weights)
    check_name(survey, name)
    check_activate(survey, name, activate)
    tensors = {place.path: place for place in survey.places}
    terms: dict[str, list[Term]] = {}
    chosen: dict[str, Place] = {}
    for adapter, weight in weights.items():
        for site in survey.sites_of(adapter):
            for path, factors in site.parts(adapter).items():
                terms.setdefault(path, []).append(Term(float(weight), factors))
                chosen[path] = tensors[site.path]._replace(path=path, block=factors.block)
    overlap = first_overlap(chosen.values())
    if overlap is not None:
        raise TargetError(
            f"cannot combine: {overlap[0].path!r} and {overlap[1].path!r} share elements, and one "
            "adapter cannot have both"
        )
    check_tied(survey, chosen.values())
    planned = [PlannedSite(place, _sum(place, terms[path], how)) for path, place in chosen.items()]
    if method == "linear" and min(weights.values()) < 0:
        _warn_if_far(planned, terms)
    # Blocks in the order of their tensor, as by `attach`, and not in the order of the weights.
    planned.sort(key=lambda plan: plan.place.ranges)
    return add(survey, planned, name, activate)


def _check_arguments(weights: Mapping[str, float], how: How) -> None:
    method, rank, density, _ = how
    if not weights:
        raise ValueError("no weights: name at least one adapter, such as {'a': 0.7, 'b': 0.3}")
    for adapter, weight in weights.items():
        if not is_finite(weight):
            raise ValueError(f"the weight of {adapter!r} must be a finite number, got {weight!r}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if rank is not None:
        if method in ("cat", "linear"):
            raise ValueError(
                f"rank= is for 'svd', 'ties' and 'dare' only; {method!r} determines its own rank"
            )
        LoRA(rank)  # raises if the rank is invalid
    if method not in _DENSE and density is not None:
        raise ValueError(f"density= is for 'ties' and 'dare' only; {method!r} keeps all")
    if method in _DENSE and not (is_finite(density) and 0 < density <= 1):  # type: ignore[operator]
        raise ValueError(
            f"method={method!r} needs density=, the share of elements to keep, above 0 and at most "
            f"1; got {density!r}"
        )


def _sum(place: Place, terms: list[Term], how: How) -> Factors:
    """Return the new adapter's factors at one place, from those of the adapters there."""
    block = place.block
    if how.method in _DENSE:
        return sparse_sum(place, terms, how)
    if all(isinstance(term.factors.spec, Delta) for term in terms):
        D = sum(
            term.weight * float(term.factors.strength) * term.factors.get_parameter("D").detach()
            for term in terms
        )
        return Factors(Delta(), {"D": D}, block)  # type: ignore[dict-item]
    layout, updates = updates_of(place.path, terms)
    if how.method == "linear":
        # PEFT's lora_A of an Embedding or a Conv1D is our B, transposed.
        sign_in_B = is_swapped(place.module) and not layout.get("transposed")
        A, B = linear_sum(place.path, updates, sign_in_B)
    else:
        A, B = exact_sum(updates)
    if how.method == "svd":
        A, B = truncate(A, B, how.rank or max(update.A.shape[-2] for update in updates))
    return Factors(LoRA(A.shape[-2], **layout), {"A": A, "B": B}, block)


def _warn_if_far(planned: Iterable[PlannedSite], terms: Mapping[str, list[Term]]) -> None:
    """Warn if the product of linear sums is not the sum of the products, and say how far it is."""
    worst, path = 0.0, ""
    for plan in planned:
        place, factors = plan.place, plan.factors
        if isinstance(factors.spec, LoRA):
            _, updates = updates_of(place.path, terms[place.path])
            far = distance(factors.get_parameter("A"), factors.get_parameter("B"), updates)
            worst, path = max((worst, path), (far, place.path))
    if worst > 1e-4:
        warnings.warn(
            "method='linear' sums factors, and with a negative weight the result can be far from "
            f"the weighted sum of the updates: here its distance is {worst:.0%} of their norm at "
            f"{path!r}; use method='cat' or 'svd' to subtract",
            UserWarning,
            stacklevel=4,
        )
