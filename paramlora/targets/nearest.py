"""What comes closest to a target that matches nothing."""

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.utils import parametrize

from ..errors import some
from ..site.place import Place, is_packed
from .matching import ALL_LINEAR, Matcher, Target, ends_with, is_glob, named

# What a regular expression has and a glob has not.
_REGEX = re.compile(r"^\.\*|[\^$\\()|+{}]")


def nothing_matches(asked: Target, matcher: Matcher) -> str:
    """Describe a target that matches nothing, and name the closest matches."""
    places, modules = matcher.places, matcher.by_path
    name = repr(asked) if isinstance(asked, str) else getattr(asked, "__name__", repr(asked))
    target, index = matcher.split(asked)
    if isinstance(asked, str) and index is not None and (like := matcher.match(asked, places)):
        return (
            f"{target!r}, of which {name} would be a block; for characters of a glob, name the "
            f"tensor as well: {asked + '.' + like[0].tensor!r}"
        )
    ids = matcher.modules(target)
    if inside := _inside(target, ids, modules):
        return f"{name}; {inside}"
    meant = {path: module for path, module in modules.items() if id(module) in ids}
    packed = [path for path, module in (meant or modules).items() if is_packed(module)]
    if packed:
        return f"{name}; packed (quantized) weights cannot be adapted, as those of {some(packed)}"
    if target == ALL_LINEAR and (left_out := matcher.not_linear()):
        reasons = "; ".join(f"{path} is {reason}" for path, (_, reason) in left_out.items())
        return f"{name}; {reasons}"
    if meant:
        own = [place.path for place in places if id(place.module) in ids]
        path = f"*.{target}" if target and isinstance(target, str) else next(iter(meant))
        glob = f"{path}.*".replace("*.*.", "*.").lstrip(".")
        only = f", only {some(own)}: name those with a glob, {glob!r}" if own else ""
        paths = some(path or "the model itself" for path in meant)
        return f"{name}; there is no parameter 'weight' in {paths}{only}"
    with_weight = [place.module for place in places if place.tensor == "weight"]
    types = {parametrize.type_before_parametrizations(module).__name__ for module in with_weight}
    if isinstance(target, str) and target != ALL_LINEAR:
        if target in types:
            return f"{name}; give the class itself, {target} without quotation marks"
        if _REGEX.search(target):
            return f"{name}; {_no_regex(str(asked), places)}"
        return name + _close(target, matcher, str(asked).removeprefix(target))
    return f"{name}; modules with a weight here are {some(sorted(types)) or 'none'}"


def _inside(target: Target, ids: set[int], modules: Mapping[str, nn.Module]) -> str:
    """Say that a target is inside another parametrization; return "" if it is not."""
    for path, module in modules.items():
        before, _, after = f".{path}.".partition(".parametrizations.")
        tensors = [f"{path}.{key}" for key in module._parameters]
        if after and (
            id(module) in ids
            or (isinstance(target, str) and any(named(tensor, target) for tensor in tensors))
        ):
            adapted = f"{before}.{after.partition('.')[0]}".lstrip(".")
            return (
                f"{path!r} is a part of the parametrization of {adapted!r}; adapters go on top of "
                f"that: name {adapted!r}"
            )
    return ""


def _no_regex(target: str, places: list[Place]) -> str:
    """Say what to write instead of a regular expression."""
    hint = (
        "targets are names and globs, not regular expressions: write ['q_proj', 'v_proj'] and not "
        "'.*\\.(q|v)_proj', or pass a callable"
    )
    try:
        pattern = re.compile(target)
    except re.error:
        return hint
    count = sum(p.tensor == "weight" and bool(pattern.fullmatch(p.module_path)) for p in places)
    modules = "1 module" if count == 1 else f"{count} modules"
    return f"{hint}, lambda path, module: re.fullmatch({target!r}, path) ({modules})"


def _close(target: str, matcher: Matcher, index: str) -> str:
    """Return a question that names close patterns, with what each would match."""
    if is_glob(target) and (deeper := matcher.match(f"*.{target}", matcher.places)):
        # Brackets at the end would be an index.
        end = f".{deeper[0].tensor}" if target.endswith("]") and not index else index
        count = "1 tensor" if len(deeper) == 1 else f"{len(deeper)} tensors"
        return f"; did you mean '*.{target}{end}' ({count})?"
    core = target.removeprefix("*.").rpartition("*.")[2]
    size = core.count(".") + 1
    modules = [p.module_path for p in matcher.places if p.module_path and p.tensor == "weight"]
    paths = dict.fromkeys([*modules, *(p.path for p in matcher.places)])
    ends = dict.fromkeys(".".join(path.split(".")[-size:]) for path in paths)
    # q_proj and q_lin are alike to a reader, though not to difflib.
    first = [end for end in ends if "_" in core and end.split("_")[0] == core.split("_")[0]]
    near = difflib.get_close_matches
    close = dict.fromkeys(near(core, first, cutoff=0) + near(core, ends, cutoff=0.5))
    if close:
        shown = ", ".join(_pattern(end, modules, paths) for end in list(close)[:3])
        return f"; did you mean {shown}?"
    known = dict.fromkeys(p.module_path for p in matcher.places if p.module_path) | paths
    return f"; there are {some(known) or 'no parameters'}"


def _pattern(end: str, modules: list[str], paths: Iterable[str]) -> str:
    """Return the only path with this end, or a glob for them, with the number of its matches."""
    found = [path for path in paths if ends_with(path, end)]
    if len(found) == 1:
        return found[0]
    return f"'*.{end}' ({len(found)} {'modules' if found[0] in modules else 'tensors'})"
