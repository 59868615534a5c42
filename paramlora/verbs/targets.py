"""Find the tensors that targets match.

A target is a module type, a glob over dotted paths, or a callable `(path, module) -> bool`. A glob
matches tensors by their paths. A target that matches a module stands for its `weight`. A glob with
a trailing index, such as `*.c_attn.weight[:, :768]`, stands for that block of each matching tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import TargetError, nearest, some
from ..kinds.spec import Spec
from ..site.block import Part, split
from ..site.find import dotted
from ..site.place import Place, check, check_shapes, is_packed
from ..site.survey import Survey

Target = type[nn.Module] | str | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target]


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


def resolve(
    survey: Survey,
    spec: Spec | Mapping[Target, Spec],
    targets: Targets | None,
    exclude: Targets,
) -> Resolved:
    """Return the tensors that the targets match, each with its spec, checked, in model order.

    In a mapping, the first target that matches a tensor, or a block of it, decides its spec.

    Raises:
        TargetError: a target matches no tensor, or one that cannot be adapted.
        TypeError: a spec is not an instance of `Spec`, or a target has none of the known forms.
    """
    check_shapes(survey.places)
    computed = _computed(survey)
    candidates = [*survey.places, *computed]
    excluded = _excluded(survey, exclude, candidates)
    # By the id of the tensor, because a tied tensor has several paths.
    claims: dict[int, list[tuple[Place, Spec]]] = {}
    left_out: dict[str, tuple[Place, str]] = {}
    for asked, wanted in _pairs(spec, targets):
        target, index = _split(asked, candidates)
        _refuse_computed(_match(target, computed), excluded)
        matches = _match(target, survey.places)
        if not matches:
            raise TargetError(f"no tensor matches {_nothing(asked, survey)}")
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
    found = [pair for pairs in claims.values() for pair in pairs]
    if not found:
        raise TargetError(f"every tensor that matches is excluded by exclude={exclude!r}")
    order = {(id(place.module), place.tensor): i for i, place in enumerate(survey.places)}
    found.sort(key=lambda pair: (order[id(pair[0].module), pair[0].tensor], pair[0].ranges))
    for place, wanted in found:
        check(place, wanted)
    return Resolved(found, left_out)


def _excluded(survey: Survey, exclude: Targets, candidates: list[Place]) -> dict[str, Place]:
    """Return the places that `exclude` matches, by path."""
    excluded: dict[str, Place] = {}
    for asked in _listed(exclude):
        target, index = _split(asked, candidates)
        matches = [p if index is None else p.at(index) for p in _match(target, candidates)]
        if isinstance(target, str) and not matches:
            raise TargetError(f"exclude= matches nothing: no {_nothing(asked, survey)}")
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


def _pairs(
    spec: Spec | Mapping[Target, Spec], targets: Targets | None
) -> list[tuple[Target, Spec]]:
    if isinstance(spec, Mapping):
        if targets is not None:
            raise TypeError("with a mapping from target to spec, leave targets out")
        pairs = list(spec.items())
    else:
        if isinstance(targets, Spec):
            raise TypeError(
                f"the spec comes before the targets: attach(model, {targets!r}, {spec!r})"
            )
        pairs = [(target, spec) for target in _listed(nn.Linear if targets is None else targets)]
    for _, one in pairs:
        if not isinstance(one, Spec):
            raise TypeError(f"a spec is an instance such as LoRA(rank=8), got {one!r}")
    if not pairs:
        raise TargetError("no targets given; name at least one, such as nn.Linear or '*.fc1'")
    return pairs


def _listed(targets: Targets) -> list[Target]:
    if isinstance(targets, str) or callable(targets) or not isinstance(targets, Iterable):
        return [targets]
    return list(targets)


def _split(target: Target, everywhere: list[Place]) -> tuple[Target, tuple[Part, ...] | None]:
    """Split a target into a glob and a trailing index, or None if it has none or is a path."""
    if not isinstance(target, str) or any(target in (p.path, p.module_path) for p in everywhere):
        return target, None
    try:
        return split(target)
    except ValueError as error:
        raise TargetError(f"target {target!r}: {error}") from error


def _match(target: Target, everywhere: list[Place]) -> list[Place]:
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"a target type is a module type such as nn.Linear, got {target!r}")
        return [
            place
            for place in everywhere
            if place.tensor == "weight"
            and issubclass(parametrize.type_before_parametrizations(place.module), target)
        ]
    if isinstance(target, str):
        return [
            place
            for place in everywhere
            if _glob(place.path, target)
            or (place.tensor == "weight" and _glob(place.module_path, target))
        ]
    # Modules are callable, too, but not with a path.
    if callable(target) and not isinstance(target, nn.Module):
        return [
            place
            for place in everywhere
            if place.tensor == "weight" and target(place.module_path, place.module)
        ]
    raise TypeError(
        "a target is a module type, a glob over paths, or a callable (path, module) -> bool, got "
        f"{target!r}"
    )


def _glob(path: str, pattern: str) -> bool:
    # "*.fc1" also matches an fc1 at the top. A path always matches itself, even with "[" in it.
    return (
        fnmatchcase(path, pattern)
        or path == pattern
        or (pattern[:2] == "*." and fnmatchcase("." + path, pattern))
    )


def _nothing(asked: Target, survey: Survey) -> str:
    """Describe a target that matches nothing, and name the closest matches."""
    everywhere = survey.places
    name = repr(asked) if isinstance(asked, str) else getattr(asked, "__name__", repr(asked))
    target, index = _split(asked, everywhere)
    if isinstance(asked, str) and index is not None and (like := _match(asked, everywhere)):
        return (
            f"{target!r}, of which {name} would be a block; for characters of a glob, name the "
            f"tensor as well: {asked + '.' + like[0].tensor!r}"
        )
    meant = {path: module for path, module in survey.modules if _means(target, path, module)}
    packed = [path for path, module in meant.items() or survey.modules if is_packed(module)]
    if packed:
        return f"{name}; packed (quantized) weights cannot be adapted, as those of {some(packed)}"
    if meant:
        own = [place.path for place in everywhere if place.module in meant.values()]
        only = f", only {some(own)}: name those with a glob" if own else ""
        return f"{name}; there is no parameter 'weight' in {some(meant)}{only}"
    if isinstance(target, str):
        modules = [place.module_path for place in everywhere if place.module_path]
        paths = dict.fromkeys([*modules, *(place.path for place in everywhere)])
        return name + (nearest(target, paths) or f"; there are {some(paths) or 'no parameters'}")
    with_weight = [place.module for place in everywhere if place.tensor == "weight"]
    types = {parametrize.type_before_parametrizations(module).__name__ for module in with_weight}
    return f"{name}; modules with a weight here are {some(sorted(types)) or 'none'}"


def _means(target: Target, path: str, module: nn.Module) -> bool:
    """Return whether a type or a glob matches a module, with or without a weight."""
    if isinstance(target, type):
        return issubclass(parametrize.type_before_parametrizations(module), target)
    return isinstance(target, str) and _glob(path, target)
