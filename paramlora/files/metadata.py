"""The metadata entry of an adapter's file: what the tensors are, as JSON."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..kinds.spec import Spec, is_finite
from ..site.factors import Factors
from ..site.find import Site, below
from .safetensors_file import read_tensors

VERSION = 1


ENTRY = "paramlora"


_FILE = {"version": int, "name": str, "sites": dict, "digest": str}


_SITE = {"kind": str, "fields": dict, "strength": (int, float), "shape": list}


def _content(text: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the metadata says, every part of it there and of its type."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its metadata {ENTRY!r} is no JSON ({error}); save the adapter "
            "again"
        ) from error
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this paramlora reads up to {VERSION}; update paramlora"
        )
    _check_parts(content, _FILE, f"its metadata {ENTRY!r}", path)
    for site, entry in content["sites"].items():
        _check_parts(entry, _SITE, f"its metadata for {site!r}", path)
        if not is_finite(entry["strength"]):
            raise CheckpointError(
                f"{path} is damaged: the strength for {site!r} must be a finite number, found "
                f"{entry['strength']!r}; save the adapter again"
            )
    return content


def _check_parts(
    found: Any, parts: dict[str, Any], what: str, path: str | os.PathLike[str]
) -> None:
    """Raise a CheckpointError where `found` is no dict that has these parts of these types."""
    for key, kind in parts.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise CheckpointError(
                f"{path} is damaged: {what} must have {', '.join(map(repr, parts))}, and {key!r} "
                f"is missing or of the wrong type in {found!s:.100}; save the adapter again"
            )


def describe(factors: Factors, site: Site) -> dict[str, Any]:
    values = {f.name: getattr(factors.spec, f.name) for f in dataclasses.fields(factors.spec)}
    return {
        "kind": type(factors.spec).__name__,
        # A callable (an init) has done its work and cannot be saved.
        "fields": {key: value for key, value in values.items() if not callable(value)},
        "strength": float(factors.strength),
        # Of the whole tensor, also for a block, whose place in it the path has.
        "shape": list(below(site.plist, site.stack).shape),
    }


def spec_of(entry: dict[str, Any], site: str, path: str | os.PathLike[str]) -> Spec:
    imported = list(_derived(Spec))  # type: ignore[type-abstract]
    # By their places: a notebook's cell that runs again defines its class again.
    named = {_full_name(kind): kind for kind in imported if kind.__name__ == entry["kind"]}
    if not named:
        known = sorted({kind.__name__ for kind in imported})
        raise CheckpointError(
            f"{path} has an adapter of kind {entry['kind']!r} at {site!r}, and no imported class "
            f"of that name derives from Spec (there are {', '.join(known)}); import it"
        )
    if len(named) > 1:
        raise CheckpointError(
            f"{path} has an adapter of kind {entry['kind']!r} at {site!r}, and there are several "
            f"classes of that name: {', '.join(sorted(named))}; rename your own"
        )
    [kind] = named.values()
    try:
        return kind(**entry["fields"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has settings for {site!r} that {entry['kind']} does not take: {error}"
        ) from error


def _full_name(kind: type[Spec]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _derived(kind: type[Spec]) -> Iterator[type[Spec]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _derived(derived)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an adapter's file, and what it says of them, every part checked.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, or was not written by paramlora.
    """
    tensors, metadata = read_tensors(path)
    if ENTRY not in metadata:
        raise CheckpointError(
            f"{path} was not written by paramlora.save: its metadata has no {ENTRY!r}, only "
            f"{sorted(metadata)}"
        )
    return tensors, _content(metadata[ENTRY], path)
