"""What a single target matches.

A target is

- a module type, `nn.Linear`;
- a name, `q_proj`: each module or tensor whose path is that name or ends with a dot and the name;
- a glob over dotted paths of modules or tensors, `encoder.*.bias`, in which `*` crosses dots;
- a name or a glob with a trailing index, `c_attn.weight[:, :768]`: that block of each tensor;
- a callable `(path, module) -> bool`;
- "all-linear": see `Matcher.linear`.

A module means its `weight`, or all parameters of it and of the modules inside it (`whole`).
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property

from torch import nn

from ..errors import TargetError
from ..site.find import is_linear
from ..site.place import Place
from ..site.survey import Survey
from ..stack.block import Part, split

Target = type[nn.Module] | str | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target]

ALL_LINEAR = "all-linear"


class Matcher:
    """Finds what targets match in a model; a shared module is found under each of its paths.

    Args:
        survey: a survey of the model.
        places: all tensors that a target may mean.
    """

    def __init__(self, survey: Survey, places: list[Place]) -> None:
        self.survey, self.places = survey, places

    @cached_property
    def by_path(self) -> dict[str, nn.Module]:
        """The modules by path, shared ones under each path."""
        modules = {id(module): module for _, module in self.survey.modules}
        return {path: modules[key] for key, paths in self.survey.paths.items() for path in paths}

    def split(self, target: Target) -> tuple[Target, tuple[Part, ...] | None]:
        """Split a target into a glob and a trailing index, or None if it has none or is a path."""
        if not isinstance(target, str) or any(
            ends_with(path, target) for p in self.places for path in (p.path, p.module_path)
        ):
            return target, None
        try:
            return split(target)
        except ValueError as error:
            raise TargetError(f"target {target!r}: {error}") from error

    def match(self, target: Target, places: list[Place], *, whole: bool = False) -> list[Place]:
        """Return the places that a target matches.

        Args:
            target: the target, without an index.
            places: the places to choose from.
            whole: whether a module means all parameters of it and of the modules inside it.

        Raises:
            TypeError: the target has none of the known forms.
        """
        modules = self.modules(target)
        tensor = target if isinstance(target, str) and target != ALL_LINEAR else None
        within = [path for path, module in self.by_path.items() if whole and id(module) in modules]
        inside = tuple(f"{path}." if path else "" for path in within)
        return [
            place
            for place in places
            if (place.tensor == "weight" and id(place.module) in modules)
            or any(
                path.startswith(inside) or (tensor is not None and named(path, tensor))
                for path in self.survey.paths_of(place)
            )
        ]

    def modules(self, target: Target) -> set[int]:
        """Return the ids of the modules that a target matches."""
        if isinstance(target, str) and target == ALL_LINEAR:
            return {id(module) for module in self.linear}
        return {id(module) for path, module in self.by_path.items() if _means(target, path, module)}

    @cached_property
    def linear(self) -> list[nn.Module]:
        """The linear layers, without those that `not_linear` lists."""
        left_out = {id(place.module) for place, _ in self.not_linear().values()}
        return [m for _, m in self.survey.modules if is_linear(m) and id(m) not in left_out]

    def not_linear(self) -> dict[str, tuple[Place, str]]:
        """Return the matrices that "all-linear" leaves out, each with the reason, by path."""
        outputs = _output_embeddings(self.survey)
        found = {}
        for place in self.survey.places:
            reason = None
            if place.tensor == "in_proj_weight" and isinstance(place.module, nn.MultiheadAttention):
                reason = "in no linear layer; name it to adapt it"
            elif place.tensor == "weight" and is_linear(place.module):
                holders = self.survey.holders[id(place.stored)]
                if any(isinstance(holder.module, nn.Embedding) for holder in holders):
                    reason = "shared with an embedding; name it to adapt it"
                elif id(place.module) in outputs:
                    reason = "of the output embeddings; name it to adapt it"
            if reason is not None:
                found[place.path] = place, reason
        return found


def is_glob(target: Target) -> bool:
    """Return whether a target is a string with wildcards."""
    return isinstance(target, str) and any(character in target for character in "*?[")


def named(path: str, pattern: str) -> bool:
    """Return whether a name or a glob matches a path.

    >>> named("h.0.q_proj", "q_proj"), named("h.0.q_proj", "proj"), named("fc1", "*.fc1")
    (True, False, True)
    """
    # "*.fc1" also matches an fc1 at the top. A path always matches itself, even with "[" in it.
    return (
        ends_with(path, pattern)
        or fnmatchcase(path, pattern)
        or (pattern[:2] == "*." and fnmatchcase("." + path, pattern))
    )


def ends_with(path: str, name: str) -> bool:
    """Return whether a path is a name, or ends with a dot and the name."""
    return path == name or path.endswith("." + name)


def _means(target: Target, path: str, module: nn.Module) -> bool:
    """Return whether a target matches a module, with or without a weight."""
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"a target type is a module type such as nn.Linear, got {target!r}")
        return isinstance(module, target)
    if isinstance(target, str):
        return named(path, target)
    # Modules are callable, too, but not with a path.
    if callable(target) and not isinstance(target, nn.Module):
        return bool(target(path, module))
    raise TypeError(
        "a target is a module type, a name or a glob over paths, or a callable (path, module) -> "
        f"bool, got {target!r}"
    )


def _output_embeddings(survey: Survey) -> set[int]:
    """Return the ids of the modules that transformers models name as their output embeddings."""
    found = set()
    for _, module in survey.modules:
        ask = getattr(module, "get_output_embeddings", None)
        if callable(ask):
            try:
                found.add(id(ask()))
            except NotImplementedError:  # of a transformers model without them
                continue
    return found
