"""The best low-rank approximation of a full fine-tune.

    W_tuned − W_base ≈ B A        A: (r, in), B: (out, r)

B A is the truncated singular value decomposition of the difference. No other matrix of rank r is
closer to it in the Frobenius norm (Eckart and Young).
"""

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError
from ..kinds.delta import Delta
from ..kinds.lora import LoRA
from ..kinds.spec import Spec, factor_dtype
from ..kinds.start import truncated_svd
from ..layers.install import PlannedSite, check_name, check_tied
from ..site.place import Place, check, check_shapes
from ..site.survey import Survey
from ..stack.factors import Factors
from ..verbs.add import add, check_activate
from ..wrappers import inner


@torch.no_grad()
def extract(
    model: nn.Module, base: nn.Module, rank: int = 8, *, name: str = "default"
) -> dict[str, float]:
    """Attach an adapter to `base` that approximates `model` as closely as the rank allows.

    A tensor with two or more dimensions that differs gets a `LoRA`, the best approximation of that
    rank to the difference. Any other tensor that differs gets a `Delta`, which is exact up to
    rounding. As by `attach`, the adapter is then the only active one of `base`.

    Args:
        model: the base after a full fine-tune; it is not changed.
        base: the model before the fine-tune, with the same parameters.
        rank: r, at least 1. A smaller matrix gets the rank of its smaller side.
        name: the adapter's name on `base`.

    Returns:
        The relative error by tensor, ‖ΔW − BA‖ / ‖ΔW‖ in the Frobenius norm; 0 for a `Delta`. A
        buffer that differs is listed with 1, since an adapter cannot change buffers.

    Raises:
        ValueError: the rank is invalid.
        AdapterNameError: the name is taken or invalid.
        StateError: `model` has adapters, or an adapter of `base` is merged.
        TargetError: the models differ in names or shapes of parameters, no parameter differs, or
            a tensor that differs cannot be adapted.

    >>> base, tuned = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> lost = extract(tuned, base, rank=3)
    >>> torch.testing.assert_close(base.weight, tuned.weight)
    """
    rank = LoRA(rank).rank  # raises if the rank is invalid
    survey, tuned = Survey(base), Survey(model)
    if tuned.names:
        raise StateError("the model to extract from has adapters; bake or detach them first")
    check_name(survey, name)
    check_activate(survey, name, "only")
    changes = _changes(tuned, survey)
    lost = dict.fromkeys(_changed_buffers(model, base), 1.0)
    planned = []
    for place, change in changes:
        spec, tensors, lost[place.path] = _approximate(change, rank)
        check(place, spec)
        planned.append(PlannedSite(place, Factors(spec, tensors)))
    check_tied(survey, [place for place, _ in changes])
    add(survey, planned, name, "only")
    return lost


def _approximate(change: Tensor, rank: int) -> tuple[Spec, dict[str, Tensor], float]:
    """Return a spec and its factors for a change of a tensor, and their relative error."""
    if change.dim() < 2:
        return Delta(), {"D": change}, 0.0
    A, B, values = truncated_svd(change.flatten(1), rank)
    return LoRA(len(A)), {"A": A, "B": B}, float(values[rank:].norm() / values.norm())


def _changes(tuned: Survey, base: Survey) -> list[tuple[Place, Tensor]]:
    """Return the places of the base whose tensors differ, with the difference; tied ones once."""
    tuned_places = {place.path: place for place in tuned.places}
    base_places = {place.path: place for place in base.places}
    check_shapes([*tuned_places.values(), *base_places.values()])
    before = {path: place.value.shape for path, place in base_places.items()}
    after = {path: place.value.shape for path, place in tuned_places.items()}
    unlike = sorted({path for path, _ in before.items() ^ after.items()})
    if unlike:
        raise TargetError(
            f"model is not a fine-tune of base: {', '.join(unlike[:5])} are missing from one of "
            "them or differ in shape"
        )
    first_place: dict[int, Place] = {}
    changes = []
    for path, place in base_places.items():
        W = place.value.detach()
        W_tuned = tuned_places[path].value.detach().to(W.device)
        first = first_place.setdefault(id(place.stored), place)
        if first is not place:
            if not torch.equal(tuned_places[first.path].value, W_tuned):
                raise TargetError(
                    f"{first.path!r} and {path!r} are tied in the base but differ in the fine-tune"
                )
        elif not torch.equal(W_tuned, W):
            dtype = factor_dtype(W)
            changes.append((place, W_tuned.to(dtype) - W.to(dtype)))
    if not changes:
        raise TargetError("the models have the same parameters: there is nothing to extract")
    return changes


def _changed_buffers(model: nn.Module, base: nn.Module) -> list[str]:
    model, base = inner(model), inner(base)
    before = dict(base.named_buffers())
    return [
        path
        for path, buffer in model.named_buffers()
        if path in before and not torch.equal(buffer.to(before[path].device), before[path])
    ]
