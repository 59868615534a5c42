"""Read `.safetensors` files, and write any file atomically."""

import os
import uuid
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file such that `path` holds either the old content or the new, never a part.

    Writing to `path` itself would destroy the old content first, and a crash or a full disk would
    then leave a truncated file. So the content goes to a temporary file, which `os.replace` renames
    in one step.

    - The temporary file is in the same folder, because a rename to another file system copies.
    - Its name is random, so that two processes that save to one path do not share it.
    - `fsync` comes before the rename. Otherwise the file system may record the rename first, and a
      power failure leaves an empty file.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` file by key, and its metadata; nothing is unpickled.

    The tensors are views of the file, which stays mapped into memory. Copy a tensor to keep it.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged or has another format.
    """
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
            f"{path} is damaged or not a .safetensors file ({error}); save the adapter again"
        ) from error
