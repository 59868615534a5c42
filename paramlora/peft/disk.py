"""Check for the two files of a PEFT folder, and write both atomically."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialized
from torch import Tensor

from ..errors import CheckpointError, some
from ..files.safetensors_file import leftovers, remove_leftovers, temporary_path, write_atomically

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def check_destination(path: Path) -> None:
    """Raise an error if a folder cannot be written to `path` without losing other files.

    Raises:
        FileExistsError: `path` is a folder with other files, or not a folder.
        FileNotFoundError: the folder around it does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        others = sorted(
            entry.name + "/" * entry.is_dir()
            for entry in path.iterdir()
            if entry.name not in (CONFIG, TENSORS) or entry.is_dir()
        )
        if others:
            raise FileExistsError(
                f"cannot write {path}: the folder exists and also has {', '.join(others[:3])}, "
                "which would be lost; choose another path"
            )
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"cannot write {path}: a file of that name exists")


def write_folder(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files to a temporary folder, and move that to `path`.

    The two files belong together: new tensors beside an old config would load as another adapter.
    So neither appears in `path` before both are complete.
    """
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        write_atomically(temporary / TENSORS, serialized(tensors, {"format": "pt"}))
        write_atomically(temporary / CONFIG, json.dumps(config, indent=2).encode())
        _replace(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    remove_leftovers(path)


def check_files(path: Path) -> None:
    """Raise an error if `path` is not a folder with the two files.

    Raises:
        CheckpointError: the tensors are in a pickle.
        FileNotFoundError: the folder or one of the files does not exist.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path / CONFIG)  # a PermissionError, which `is_dir` hides from Python 3.14 on
    if not path.is_dir():
        left = leftovers(path.absolute()) if path.absolute().parent.is_dir() else []
        hint = f"; a save that was killed has left {some(p.name for p in left)}" if left else ""
        raise FileNotFoundError(
            f"{path} is not a folder; pass one that PEFT's save_pretrained wrote, or use load for "
            f"a file of paramlora.save{hint}"
        )
    if not (path / TENSORS).is_file() and (path / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{path} has its tensors in adapter_model.bin, a pickle, which could run any code and "
            "is not opened; load it in PEFT and save it again, as .safetensors"
        )
    for file in (CONFIG, TENSORS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path} has no {file}; pass a folder that PEFT wrote")


def _replace(path: Path, new: Path) -> None:
    """Move the folder `new` to `path`, and replace an existing folder.

    A rename cannot replace a folder that has files. So the old folder is renamed first, and renamed
    back if the new one cannot take its place. A crash in between leaves both under hidden names.
    """
    old = new.with_suffix(".old")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
