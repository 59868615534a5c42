"""Load the native extension: forward and backward of `lowrank` in C++, built once per torch.

    python -m paramlora.native.build           # half a minute; needs a C++ compiler and ninja

After that every process finds and uses it. Without it, Python computes the same. For a Linear with
a low-rank update, the extension adds one node to the autograd graph, and Python adds seven. In
small layers these nodes are most of an adapter's cost (docs/performance.md). The file has some
hundred kilobytes. It is in the cache folder of torch's extensions, TORCH_EXTENSIONS_DIR or
~/.cache/torch_extensions. PARAMLORA_NATIVE=0 disables the extension. It is loaded only from a file
and a folder that nobody but this user and root can write to; see `untrusted`.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import stat
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

NAME = "paramlora_native"
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-O2"]


def path() -> Path:
    """Return the path of the built file, which depends on torch, Python and the source."""
    about = (torch.__version__, sys.implementation.cache_tag, platform.machine(), *FLAGS)
    digest = hashlib.sha256("\n".join(about).encode() + SOURCE.read_bytes()).hexdigest()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "paramlora" / f"{NAME}-{digest[:16]}.so"


def untrusted(path: Path) -> str:
    """Return why code must not be loaded from a file, or written to a folder; "" if it may.

    Loading an extension runs its code. So the file, and the folder that it is in, must belong to
    this user or to root, and nobody else may write to them. Where the system does not tell this,
    as on Windows, no path is trusted.
    """
    if not hasattr(os, "geteuid"):
        return "this system does not tell who can write to it"
    for place in (path.resolve(), path.resolve().parent) if path.is_file() else (path.resolve(),):
        found = os.stat(place)
        if found.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user (id {found.st_uid}); delete it"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"other users can write to {place}; check it, then chmod go-w {place}"
    return ""


@functools.cache
def module() -> ModuleType | None:
    """Return the native extension; None if it is switched off, not built, or not trusted."""
    file = _built()
    if isinstance(file, str):
        return None
    problem = untrusted(file)
    if not problem:
        spec = importlib.util.spec_from_file_location(NAME, file)
        assert spec is not None
        assert spec.loader is not None
        try:
            built = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(built)
            return built
        except ImportError as error:
            problem = f"{error}; delete it and run python -m paramlora.native.build"
    warnings.warn(
        f"{file} cannot be loaded, so adapters are computed in Python: {problem}", stacklevel=2
    )
    return None


def _built() -> Path | str:
    """Return the path of the built file, or why there is none to load."""
    if os.environ.get("PARAMLORA_NATIVE") == "0":
        return "switched off by PARAMLORA_NATIVE=0"
    try:
        file = path()
    except (OSError, RuntimeError) as error:  # the source is missing, or there is no home folder
        return f"not built: {error}"
    # Unlike Path.exists, this returns False if the folder is not readable.
    return file if os.path.exists(file) else "not built: python -m paramlora.native.build"


def state() -> str:
    """Return whether the extension is loaded and from where, or why it is not."""
    file = _built()
    if isinstance(file, str):
        return file
    if module() is not None:
        return f"loaded from {file}"
    return f"cannot be loaded from {file}: {untrusted(file) or 'it is damaged'}"
