"""The adapters of a run: their files, and whether these are whole."""

from pathlib import Path

from torch import nn

import paramlora as pl
from paramlora.files.metadata import read_whole

from .settings import StudyError


def adapter_path(folder: Path, name: str) -> Path:
    """Return the path of an adapter's file in the folder of a run."""
    return folder / "adapters" / f"{name}.safetensors"


def unusable(path: Path) -> str:
    """Return why an adapter's file cannot be used, or "" if it is whole.

    Raises:
        OSError: the file cannot be read, although it exists.
    """
    try:
        read_whole(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except pl.CheckpointError as error:
        return str(error).partition("; save the adapter again")[0]
    return ""


def load_adapter(model: nn.Module, folder: Path, adapter: str, name: str | None = None) -> None:
    """Attach an adapter of the run in `folder`, as `pl.load` does.

    Raises:
        StudyError: its file is missing or damaged.
    """
    path = adapter_path(folder, adapter)
    if why := unusable(path):
        raise StudyError(f"{why}: run the command of the run again, which trains it again")
    pl.load(model, path, name=name)
