"""Targets: what the user writes, to the tensors that it means.

A target is a module type (its `weight`), a glob over dotted paths (of modules, meaning their
`weight`, or of tensors), or a callable `(path, module) -> bool` (again the `weight`). A glob with
a trailing index, `*.c_attn.weight[:, :768]`, means that block of each tensor.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import FLOATS, Spec
from .block import Block, Part, split
from .errors import TargetError
from .sharded import is_sharded
from .stack import Stack, below, dotted, lists, stack_of, stored, walk

Target = type[nn.Module] | str | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target]


class Place(NamedTuple):
    """A tensor that can become a site, or a block of one, whose index ends the path then."""

    path: str
    module_path: str
    module: nn.Module
    tensor: str
    block: Block | None = None

    @property
    def whole(self) -> Tensor:
        """The base's tensor, W: what is stored, or what parametrizations below a stack give."""
        plist = lists(self.module).get(self.tensor)
        return self.stored if plist is None else below(plist, stack_of(plist))

    @property
    def value(self) -> Tensor:
        """What an adapter here sees as its weight: W, or the block of it."""
        return self.whole if self.block is None else self.block.cut(self.whole)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What it takes of each dimension; empty for the whole tensor."""
        return [] if self.block is None else self.block.ranges

    def at(self, index: Sequence[Part]) -> "Place":
        """Return the place of a block of this tensor.

        Raises:
            TargetError: the tensor has no such block.
        """
        shape = self.whole.shape
        try:
            block = Block.of(index, shape)
        except ValueError as error:
            raise TargetError(
                f"cannot take a block of {self.path!r}, which has shape {tuple(shape)}: {error}"
            ) from error
        return self._replace(path=f"{self.path}{block or ''}", block=block)

    def meets(self, other: "Place") -> bool:
        """Return whether this has an element in common with another place of the same tensor."""
        whole = self.block is None or other.block is None
        return whole or self.block.overlaps(other.block)  # type: ignore[union-attr, arg-type]

    def claimed(self, other: "Place") -> bool:
        """Return whether an adapter at `other`, of the same tensor, leaves none of it for this.

        Raises:
            TargetError: both are blocks, and one is a part of the other or they overlap.
        """
        if self.block is None or other.block is None or self.block == other.block:
            return True
        if self.meets(other):
            raise TargetError(
                f"{other.path!r} and {self.path!r} overlap; give one adapter blocks that do not, "
                "or attach another adapter under a name of its own"
            )
        return False

    @property
    def stored(self) -> Tensor:
        """What is stored for it: the tensor itself, or the first that parametrizations store."""
        plist = lists(self.module).get(self.tensor)
        return getattr(self.module, self.tensor) if plist is None else stored(plist)[0]

    @property
    def stack(self) -> Stack | None:
        """The stack that is there already."""
        return stack_of(lists(self.module).get(self.tensor))


def places(model: nn.Module) -> list[Place]:
    """Return every parameter of the base of a model, parametrized ones included, in order."""
    found = []
    for path, module in walk(model):
        # What parametrizations of others consist of is not the model's to adapt.
        if "parametrizations" in path.split("."):
            continue
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        plists = lists(module).items()
        names += [name for name, plist in plists if isinstance(stored(plist)[0], nn.Parameter)]
        found += [Place(dotted(path, name), path, module, name) for name in names]
    return found


def _computed(model: nn.Module) -> list[Place]:
    """Return the tensors that a hook computes from parameters of a like name."""
    return [
        Place(dotted(path, name), path, module, name)
        for path, module in walk(model)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
        and (f"{name}_v" in module._parameters or f"{name}_orig" in module._parameters)
    ]


def resolve(
    model: nn.Module,
    spec: Spec | Mapping[Target, Spec],
    targets: Targets | None,
    exclude: Targets,
) -> list[tuple[Place, Spec]]:
    """Return the tensors that the targets mean, each with its spec, checked, in model order.

    In a mapping the first target that matches a tensor decides its spec.

    Raises:
        TargetError: a target that matches no tensor, or one that cannot be adapted.
        TypeError: a spec or a target that is none.
    """
    everywhere = places(model)
    check_shapes(everywhere)
    computed = _computed(model)
    all_places = [*everywhere, *computed]
    excluded: dict[str, Place] = {}
    for asked in _listed(exclude):
        target, index = _split(asked, all_places)
        left_out = [p if index is None else p.at(index) for p in _match(target, all_places)]
        if isinstance(target, str) and not left_out:
            raise TargetError(f"exclude= matches nothing: no {_nothing(asked, model, everywhere)}")
        excluded |= {place.path: place for place in left_out}
    # By tensor, not by path: tied ones are one.
    claims: dict[int, list[tuple[Place, Spec]]] = {}
    for asked, its_spec in _pairs(spec, targets):
        target, index = _split(asked, all_places)
        for place in _match(target, computed):
            if place.path not in excluded:
                raise TargetError(
                    f"cannot adapt {place.path!r}: a hook computes it, as the old weight_norm and "
                    "spectral_norm and pruning do; use those of torch.nn.utils.parametrizations, "
                    "or leave it out with narrower targets or with exclude="
                )
        matches = _match(target, everywhere)
        if not matches:
            raise TargetError(f"no tensor matches {_nothing(asked, model, everywhere)}")
        for place in matches:
            if place.path not in excluded:
                place = place if index is None else place.at(index)
                own = claims.setdefault(id(place.stored), [])
                if not _is_out(place, excluded) and not any(place.claimed(by) for by, _ in own):
                    own.append((place, its_spec))
    found = [pair for own in claims.values() for pair in own]
    if not found:
        raise TargetError(f"every tensor that matches is excluded by exclude={exclude!r}")
    order = {(id(place.module), place.tensor): i for i, place in enumerate(everywhere)}
    found.sort(key=lambda pair: (order[id(pair[0].module), pair[0].tensor], pair[0].ranges))
    for place, its_spec in found:
        check(place, its_spec)
    return found


def _is_out(place: Place, excluded: Mapping[str, Place]) -> bool:
    """Return whether a place is excluded, which may be a block that is.

    Raises:
        TargetError: a block is excluded, and the place is more or another part of its tensor.
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


def check(place: Place, spec: Spec) -> None:
    """Raise a TargetError where `spec` cannot adapt the tensor at `place`."""
    reason = _refusal(place, spec)
    if reason is not None:
        raise TargetError(
            f"cannot adapt {place.path!r} with {type(spec).__name__}: {reason} (leave it out "
            "with narrower targets or with exclude=)"
        )


def check_shapes(everywhere: Iterable[Place]) -> None:
    """Raise a TargetError where a parameter, adapted or not, cannot be frozen or counted yet."""
    for place in everywhere:
        if nn.parameter.is_lazy(place.stored):
            raise TargetError(
                f"{place.path!r} is lazy and has no shape yet; run one batch through the model "
                "first, and attach then"
            )


def nearest(path: str, paths: Iterable[str]) -> str:
    """Return a question that names the paths most like `path`, empty where none is."""
    close = difflib.get_close_matches(path, list(paths), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _pairs(
    spec: Spec | Mapping[Target, Spec], targets: Targets | None
) -> list[tuple[Target, Spec]]:
    if isinstance(spec, Mapping):
        if targets is not None:
            raise TypeError("with a mapping from target to spec, leave targets out")
        pairs = list(spec.items())
    else:
        pairs = [(one, spec) for one in _listed(nn.Linear if targets is None else targets)]
    for _, its_spec in pairs:
        if not isinstance(its_spec, Spec):
            raise TypeError(f"a spec is an instance such as LoRA(rank=8), got {its_spec!r}")
    if not pairs:
        raise TargetError("no targets given; name at least one, such as nn.Linear or '*.fc1'")
    return pairs


def _listed(targets: Targets) -> list[Target]:
    if isinstance(targets, str) or callable(targets) or not isinstance(targets, Iterable):
        return [targets]
    return list(targets)


def _split(target: Target, everywhere: list[Place]) -> tuple[Target, tuple[Part, ...] | None]:
    """Return a target without its trailing index, and that; a path that there is has none."""
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
    # A module can be called too, but not with a path.
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
    # "*.fc1" means an fc1 anywhere, at the top level too; and a path, whatever is in it, itself.
    return (
        fnmatchcase(path, pattern)
        or path == pattern
        or (pattern[:2] == "*." and fnmatchcase("." + path, pattern))
    )


def _nothing(asked: Target, model: nn.Module, everywhere: list[Place]) -> str:
    """Return a target that matches nothing, and what there is in its place."""
    name = repr(asked) if isinstance(asked, str) else getattr(asked, "__name__", repr(asked))
    target, index = _split(asked, everywhere)
    if isinstance(asked, str) and index is not None and (like := _match(asked, everywhere)):
        return (
            f"{target!r}, of which {name} would be a block; for characters of a glob, name the "
            f"tensor as well: {asked + '.' + like[0].tensor!r}"
        )
    meant = {path: module for path, module in walk(model) if _means(target, path, module)}
    packed = [path for path, module in meant.items() or walk(model) if _is_packed(module)]
    if packed:
        return f"{name}; packed (quantized) weights cannot be adapted, as those of {_some(packed)}"
    if meant:
        own = [place.path for place in everywhere if place.module in meant.values()]
        only = f", only {_some(own)}: name those with a glob" if own else ""
        return f"{name}; there is no parameter 'weight' in {_some(meant)}{only}"
    if isinstance(target, str):
        modules = [place.module_path for place in everywhere if place.module_path]
        paths = dict.fromkeys([*modules, *(place.path for place in everywhere)])
        return name + (nearest(target, paths) or f"; there are {_some(paths) or 'no parameters'}")
    with_weight = [place.module for place in everywhere if place.tensor == "weight"]
    types = {parametrize.type_before_parametrizations(module).__name__ for module in with_weight}
    return f"{name}; modules with a weight here are {_some(sorted(types)) or 'none'}"


def _is_packed(module: nn.Module) -> bool:
    # Quantized modules of torch have a method of that name.
    weight = getattr(module, "weight", None)
    return callable(weight) and not isinstance(weight, nn.Module)


def _means(target: Target, path: str, module: nn.Module) -> bool:
    """Return whether a type or a glob means a module, whatever tensors that has."""
    if isinstance(target, type):
        return issubclass(parametrize.type_before_parametrizations(module), target)
    return isinstance(target, str) and _glob(path, target)


def _some(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 9))
    return ", ".join(first[:8]) + (", …" if len(first) > 8 else "")


def _refusal(place: Place, spec: Spec) -> str | None:
    weight = place.value
    if weight.is_quantized or weight.dtype not in FLOATS:
        return (
            f"its dtype is {weight.dtype}; only floating tensors of 16 to 64 bits can be adapted, "
            "none that is integer, complex or packed"
        )
    if is_sharded(place.module, weight):
        return "it is sharded over processes; attach first, and call fully_shard after that"
    if weight.layout is not torch.strided:
        return f"its layout is {weight.layout}; adapters need a strided (dense) tensor"
    return spec.refusal(weight)
