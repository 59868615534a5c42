"""Load the native extension: forward and backward of `lowrank` in C++, built once per torch.

    python -m paramlora.native.build           # half a minute; needs a C++ compiler and ninja

After that every process finds and uses it. Without it, Python computes the same. For a Linear with
a low-rank update, the extension adds one node to the autograd graph, and Python adds seven. In
small layers these nodes are most of an adapter's cost (docs/performance.md). The file has some
hundred kilobytes. It is in the cache folder of torch's extensions, TORCH_EXTENSIONS_DIR or
~/.cache/torch_extensions. PARAMLORA_NATIVE=0 disables the extension.
"""

import functools
import hashlib
import importlib.util
import os
import platform
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


@functools.cache
def module() -> ModuleType | None:
    """Return the native extension; None if it is not built for this torch or switched off."""
    if os.environ.get("PARAMLORA_NATIVE") == "0":
        return None
    try:
        file = path()
    except (OSError, RuntimeError):  # the source is missing, or there is no home folder
        return None
    # Unlike Path.exists, this returns False if the folder is not readable.
    if not os.path.exists(file):
        return None
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    try:
        built = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(built)
    except ImportError as error:
        warnings.warn(
            f"{file} cannot be loaded, so adapters are computed in Python: {error}; delete it and "
            "run python -m paramlora.native.build",
            stacklevel=2,
        )
        return None
    return built
