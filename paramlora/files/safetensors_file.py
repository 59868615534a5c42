"""An adapter's `.safetensors` file: written whole or not at all, and read with suspicion.

Its one metadata entry, `paramlora`, says as JSON what the tensors are; see `checkpoint`.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..kinds.spec import is_finite

VERSION = 1
ENTRY = "paramlora"
_FILE = {"version": int, "name": str, "sites": dict, "digest": str}
_SITE = {"kind": str, "fields": dict, "strength": (int, float), "shape": list}


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new, whole."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` file, and its metadata."""
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; name the .safetensors file in it")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no .safetensors file ({error}); save the adapter again"
        ) from error


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
