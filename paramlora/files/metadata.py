"""The metadata of an adapter's file: JSON that describes the tensors.

    {"version": 1, "name": "digits", "digest": "9f86d081…",
     "sites": {"fc1.weight": {"kind": "LoRA", "fields": {"rank": 2, "alpha": null, …},
                              "strength": 1.0, "shape": [256, 784]}},
     "base": {"fc1.weight": "float32 5e884898da280471", …}}

`kind` is the class name of a spec and `fields` are its arguments. `shape` is that of the base's
tensor, by which `load` notices another model. The factors are tensors of the file; see Note
[keys of factors] in `state.py`. `base` has the dtype and checksum of each tensor of the base.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..kinds.spec import Spec, is_finite
from ..site.find import Site, base_weight
from ..site.survey import Part
from ..stack.factors import Factors
from .digest import digest
from .safetensors_file import FilePath, damaged, read_tensors

VERSION = 1
ENTRY = "paramlora"
_FILE = {"version": int, "name": str, "sites": dict, "digest": str}
_SITE = {"kind": str, "fields": dict, "strength": (int, float), "shape": list}


def describe(parts: Iterable[Part], name: str) -> dict[str, Any]:
    """Return the metadata of an adapter with these parts, without the digest."""
    sites = {part.path: _describe_site(part.factors, part.site) for part in parts}
    return {"version": VERSION, "name": name, "sites": sites}


def digest_of(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    """Return the digest of a file: of its tensors, and of its metadata without the digest.

    `save` takes the digest of the dict that it writes as JSON, `load` that of the dict that it has
    read. Both dicts give the same JSON text, because parsing keeps the order of keys, and floats
    are written with all their digits.

    Raises:
        TypeError: JSON cannot express a value.
    """
    without = {key: value for key, value in content.items() if key != "digest"}
    return digest(tensors.items(), json.dumps(without))


def read(path: FilePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an adapter's file, and its metadata with all parts and types checked.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged, or was not written by paramlora.
    """
    tensors, metadata = read_tensors(path)
    if ENTRY not in metadata:
        raise CheckpointError(
            f"{path} was not written by paramlora.save: its metadata has no {ENTRY!r}, only "
            f"{sorted(metadata)}; load_peft reads PEFT's folders, load_diffusers files of diffusers"
        )
    return tensors, _parse(metadata[ENTRY], path)


def read_whole(path: FilePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `read` returns, once the digest of the file is checked as well.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged, or was not written by paramlora.
    """
    tensors, content = read(path)
    if digest_of(tensors, content) != content["digest"]:
        raise damaged(path, "its content does not match its digest")
    return tensors, content


def spec_of(entry: Mapping[str, Any], site: str, path: FilePath) -> Spec:
    """Return the spec that a site's metadata describes.

    Raises:
        CheckpointError: its class is not imported, is ambiguous, or rejects the fields.
    """
    kind = _kind_of(entry, site, path)
    try:
        return kind(**entry["fields"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has settings for {site!r} that {entry['kind']} does not accept: {error}"
        ) from error


def _describe_site(factors: Factors, site: Site) -> dict[str, Any]:
    spec = factors.spec
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {
        "kind": type(spec).__name__,
        # A callable `init` cannot be saved, and is not needed: the factors have their values.
        "fields": {key: value for key, value in values.items() if not callable(value)},
        "strength": float(factors.strength),
        # The shape of the whole tensor, also for a block: the path has the block's index.
        "shape": list(base_weight(site.plist, site.stack).shape),
    }


def _parse(text: str, path: FilePath) -> dict[str, Any]:
    """Return the metadata in a JSON text, or raise a CheckpointError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its metadata {ENTRY!r} is not JSON ({error})") from error
    # The version is checked first, because a later version may have other parts.
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{path} has format version {version!s:.20}, and this paramlora reads versions up to "
            f"{VERSION}; update paramlora"
        )
    _check_parts(content, _FILE, f"its metadata {ENTRY!r}", path)
    if "base" in content:  # older files have none
        _check_parts(content, {"base": dict}, f"its metadata {ENTRY!r}", path)
        for key in content["base"]:
            _check_parts(content["base"], {key: str}, f"'base' in its metadata {ENTRY!r}", path)
    if type(version) is bool or content["version"] < 1:
        raise damaged(path, f"its format version must be at least 1, found {version!s:.20}")
    for site, entry in content["sites"].items():
        _check_parts(entry, _SITE, f"its metadata for {site!r}", path)
        strength = entry["strength"]
        if not is_finite(strength):
            problem = f"the strength for {site!r} must be a finite number, found {strength!s:.50}"
            raise damaged(path, problem)
    return content


def _check_parts(found: Any, parts: Mapping[str, Any], what: str, path: FilePath) -> None:
    """Raise a CheckpointError if `found` is not a dict with these keys and types of values."""
    for key, kind in parts.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise damaged(
                path,
                f"{what} must have {', '.join(map(repr, parts))}, and {key!r} is missing or of the "
                f"wrong type in {found!s:.100}",
            )


def _kind_of(entry: Mapping[str, Any], site: str, path: FilePath) -> type[Spec]:
    """Return the class of a site's kind. It must be imported: loading a file imports no code."""
    imported = list(_derived(Spec))  # type: ignore[type-abstract]
    # By full name: a notebook's cell that runs twice defines its class twice, and the last counts.
    same = [kind for kind in imported if kind.__name__ == entry["kind"]]
    named = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in same}
    if len(named) == 1:
        return same[-1]
    known = ", ".join(sorted({kind.__name__ for kind in imported}))
    problem = f"no imported class of that name derives from Spec (there are {known}); import it"
    if named:
        several = ", ".join(sorted(named))
        problem = f"there are several classes of that name: {several}; rename your own"
    raise CheckpointError(
        f"{path} has an adapter of kind {entry['kind']!r} at {site!r}, and {problem}"
    )


def _derived(kind: type[Spec]) -> Iterator[type[Spec]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _derived(derived)
