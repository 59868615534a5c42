"""Read `.safetensors` files, and write any file atomically."""

import contextlib
import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..stack.storage import check_real, whole

FilePath = str | os.PathLike[str]


def write_atomically(path: FilePath, content: bytes) -> None:
    """Write a file such that `path` holds either the old content or the new, never a part.

    Writing to `path` itself would destroy the old content first, and a crash or a full disk would
    then leave a truncated file. So the content goes to a temporary file, which `os.replace` renames
    in one step.

    - The temporary file is in the same folder, because a rename to another file system copies.
    - Its name is random, so that two processes that save to one path do not share it, and has the
      process. The next save to `path` removes what a process that was killed has left.
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
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    remove_leftovers(path)


def temporary_path(path: Path) -> Path:
    """Return a new hidden path beside `path`, with the machine and the process that write it."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left beside `path`, once it is written."""
    with contextlib.suppress(OSError):  # they are left for the next save then
        for left in leftovers(path):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def leftovers(path: Path) -> list[Path]:
    """Return what processes of this machine that do not run any more have left beside `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{_machine()}-(\d+)-[0-9a-f]{{8}}\.(tmp|old)")
    found = [(name.fullmatch(entry.name), entry) for entry in path.parent.iterdir()]
    return sorted(entry for match, entry in found if match and not _runs(int(match[1])))


def _machine() -> str:
    # Another machine that shares the folder numbers its processes in its own way.
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _runs(process: int) -> bool:
    """Return whether a process of this machine runs; True where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError, OverflowError) as error:
        return isinstance(error, PermissionError)  # it belongs to another user
    return True


def read_tensors(path: FilePath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a `.safetensors` file by key, and its metadata; nothing is unpickled.

    The tensors are views of the file, which stays mapped into memory. Copy a tensor to keep it.

    Raises:
        OSError: the file does not exist or cannot be read.
        CheckpointError: the file is damaged or has another format.
    """
    if os.path.isdir(path):
        raise CheckpointError(
            f"{path} is a folder; name the .safetensors file in it, or use load_peft for PEFT's"
        )
    # safetensors reports a file that may not be read as missing.
    open(path, "rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a .safetensors file ({error}); save the adapter again"
        ) from error


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, because safetensors refuses tensors that share memory.

    Raises:
        StateError: a tensor is on the meta device.
    """
    copies = {}
    for key, tensor in tensors.items():
        check_real(key, tensor)
        copies[key] = whole(tensor.detach()).to("cpu", copy=True).contiguous()
    return copies


def damaged(path: FilePath, problem: str) -> CheckpointError:
    """Return the error for an adapter's file with a content that `save` does not write."""
    return CheckpointError(f"{path} is damaged: {problem}; save the adapter again")
