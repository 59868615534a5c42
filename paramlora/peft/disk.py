"""The two files of a PEFT folder on disk."""

import os
import shutil
from pathlib import Path

from ..errors import CheckpointError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def check_place(path: Path) -> None:
    """Raise where a folder cannot be put at `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        others = sorted({entry.name for entry in path.iterdir()} - {CONFIG, TENSORS})
        if others:
            raise FileExistsError(
                f"cannot write {path}: the folder there also has {', '.join(others[:3])}, which "
                "replacing it would lose; name another"
            )
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"cannot write {path}: there is a file of that name")


def swap(new: Path, path: Path) -> None:
    """Move a folder to its place, and one that is there away."""
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


def check_files(path: Path) -> None:
    """Raise where a folder does not have the two files."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; name one that PEFT's save_pretrained wrote")
    if not (path / TENSORS).is_file() and (path / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{path} has its tensors in adapter_model.bin, a pickle, which can run any code and is "
            "not opened; load it in PEFT and save it anew, as .safetensors"
        )
    for file in (CONFIG, TENSORS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path} has no {file}; name a folder that PEFT wrote")
