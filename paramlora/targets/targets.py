"""From targets, as the user writes them, to the tensors that get an adapter.

What a single target matches is in `matching.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils import parametrize

from ..errors import TargetError
from ..kinds.delta import Delta
from ..kinds.spec import Spec
from ..site.find import dotted
from ..site.place import Place, check, check_shapes
from ..site.survey import Survey
from .matching import ALL_LINEAR, Matcher, Target, Targets, is_glob
from .nearest import nothing_matches

Specs = Spec | Mapping[Any, Spec]  # from a Target, which need not be of one type


def _computed(survey: Survey) -> list[Place]:
    """Return the tensors that a hook computes from parameters of a similar name."""
    return [
        Place(dotted(path, name), path, module, name)
        for path, module in survey.modules
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
        and (f"{name}_v" in module._parameters or f"{name}_orig" in module._parameters)
    ]


class Resolved(NamedTuple):
    """The matching tensors with their specs, and the tensors left out with the reasons."""

    found: list[tuple[Place, Spec]]
    left_out: dict[str, tuple[Place, str]]


def resolve(survey: Survey, spec: Specs, targets: Targets | None, exclude: Targets) -> Resolved:
    """Return the tensors that the targets match, each with its spec, checked, in model order.

    In a mapping, the first target that matches a tensor, or a block of it, decides its spec.

    Raises:
        TargetError: a target matches no tensor, or one that cannot be adapted.
        TypeError: a spec is not an instance of `Spec`, or a target has none of the known forms.
    """
    check_shapes(survey.places)
    if isinstance(survey.modules[0][1], parametrize.ParametrizationList):
        raise TargetError(
            "cannot attach to a list of parametrizations: attach to the layer that has it, on top "
            "of them"
        )
    computed = _computed(survey)
    matcher = Matcher(survey, [*survey.places, *computed])
    excluded = _excluded(matcher, exclude)
    # By the id of the tensor, because a tied tensor has several paths.
    claims: dict[int, list[tuple[Place, Spec]]] = {}
    left_out: dict[str, tuple[Place, str]] = {}
    skipped: dict[str, tuple[Place, str]] = {}
    for asked, wanted in _pairs(spec, targets):
        target, index = matcher.split(asked)
        whole = isinstance(wanted, Delta) and index is None
        _refuse_computed(matcher.match(target, computed, whole=whole), excluded)
        matches = matcher.match(target, survey.places, whole=whole)
        if not matches:
            raise TargetError(f"no tensor matches {nothing_matches(asked, matcher)}")
        if is_glob(target):
            matches, few = _enough_dimensions(matches, wanted, excluded)
            skipped |= few
        for place in matches:
            if index is not None and place.path not in excluded:
                place = place.at(index)
            earlier = claims.setdefault(id(place.stored), [])
            if _is_excluded(place, excluded):
                left_out[place.path] = place, "left out by exclude="
            elif not any(place.claimed(other) for other, _ in earlier):
                earlier.append((place, wanted))
            elif all(place.block != other.block for other, _ in earlier):
                left_out[place.path] = place, "decided by an earlier target"
        if target == ALL_LINEAR:
            skipped |= matcher.not_linear()
    found = [pair for pairs in claims.values() for pair in pairs]
    if not found:
        raise TargetError(f"every tensor that matches is excluded by exclude={exclude!r}")
    left_out |= {path: pair for path, pair in skipped.items() if not claims.get(id(pair[0].stored))}
    order = {(id(place.module), place.tensor): i for i, place in enumerate(survey.places)}
    found.sort(key=lambda pair: (order[id(pair[0].module), pair[0].tensor], pair[0].ranges))
    for place, wanted in found:
        for tied in survey.holders[id(place.stored)]:
            path = f"{tied.path}{place.block or ''}"
            check(tied._replace(path=path, block=place.block), wanted)
    return Resolved(found, left_out)


def _enough_dimensions(
    matches: list[Place], spec: Spec, excluded: Mapping[str, Place]
) -> tuple[list[Place], dict[str, tuple[Place, str]]]:
    """Return the places that have enough dimensions for a spec, and the others with the reason.

    A glob such as `*.mlp.*` matches biases as well, which a low-rank update cannot have. If it
    matches nothing else, they all stay, and the check of the places raises.
    """
    candidates = [place for place in matches if place.path not in excluded]
    few = {
        place.path: (place, f"with too few dimensions for {type(spec).__name__}")
        for place in candidates
        if place.stored.dim() < 2 and spec.refusal(place.value) is not None
    }
    if len(few) == len(candidates):
        return matches, {}
    return [place for place in matches if place.path not in few], few


def _excluded(matcher: Matcher, exclude: Targets) -> dict[str, Place]:
    """Return the places that `exclude` matches, by path; a module means all its parameters."""
    excluded: dict[str, Place] = {}
    for asked in _listed(exclude):
        target, index = matcher.split(asked)
        found = matcher.match(target, matcher.places, whole=index is None)
        matches = found if index is None else [place.at(index) for place in found]
        if isinstance(target, str) and not matches:
            raise TargetError(f"exclude= matches nothing: no {nothing_matches(asked, matcher)}")
        excluded |= {place.path: place for place in matches}
    return excluded


def _refuse_computed(matches: list[Place], excluded: Mapping[str, Place]) -> None:
    for place in matches:
        if place.path not in excluded:
            raise TargetError(
                f"cannot adapt {place.path!r}: a hook computes it, as the old weight_norm and "
                "spectral_norm and pruning do; use those of torch.nn.utils.parametrizations, or "
                "leave it out with narrower targets or with exclude="
            )


def _is_excluded(place: Place, excluded: Mapping[str, Place]) -> bool:
    """Return whether a place, a whole tensor or a block, is excluded.

    Raises:
        TargetError: a block is excluded that the place contains or overlaps.
    """
    for other in excluded.values():
        if other.block is None or other.stored is not place.stored or place.path in excluded:
            continue
        if place.meets(other):
            raise TargetError(
                f"cannot leave {other.path!r} out of {place.path!r}: exclude= takes whole tensors, "
                "or a block that a target names; name the other blocks as targets"
            )
    return place.path in excluded


def _pairs(spec: Specs, targets: Targets | None) -> list[tuple[Target, Spec]]:
    if isinstance(spec, Mapping) and targets is not None:
        raise TypeError("with a mapping from target to spec, leave targets out")
    if isinstance(targets, Spec):
        raise TypeError(f"the spec comes before the targets: attach(model, {targets!r}, {spec!r})")
    if isinstance(spec, Mapping):
        pairs = list(spec.items())
    else:
        pairs = [(target, spec) for target in _listed(ALL_LINEAR if targets is None else targets)]
    for _, one in pairs:
        if not isinstance(one, Spec):
            raise TypeError(f"a spec is an instance such as LoRA(rank=8), got {one!r}")
    if not pairs:
        raise TargetError("no targets given; name at least one, such as nn.Linear or 'fc1'")
    return pairs


def _listed(targets: Targets) -> list[Target]:
    if isinstance(targets, str) or callable(targets) or not isinstance(targets, Iterable):
        return [targets]
    return list(targets)
