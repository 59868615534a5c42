"""The compiled twin of `lowrank`'s forward and backward: optional, built once for each torch.

    python -m paramlora.build           # half a minute; needs a C++ compiler and ninja

From then on it is found and used by every process, with nothing to switch on; without it the same
is computed in Python. It makes one node of the autograd graph of the operations of a Linear with a
low-rank update, which are what an adapter costs where layers are small (docs/performance.md), and
takes a file of some hundred kilobytes in the cache folder of torch's extensions
(TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions). PARAMLORA_NATIVE=0 leaves it out.
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
# Not linked with OpenMP: torch's own runtime, which is loaded for all, takes the loops. Two of them
# would have two pools of threads wait for each other.
FLAGS = ["-O3", "-fopenmp", "-Wno-psabi"]


def path() -> Path:
    """Return where the built file is, or would be: one for each torch, Python and source."""
    about = (torch.__version__, sys.implementation.cache_tag, platform.machine(), *FLAGS)
    digest = hashlib.sha256("\n".join(about).encode() + SOURCE.read_bytes()).hexdigest()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "paramlora" / f"{NAME}-{digest[:16]}.so"


@functools.cache
def module() -> ModuleType | None:
    """Return the built twin, None where there is none for this torch or it is switched off."""
    if os.environ.get("PARAMLORA_NATIVE") == "0":
        return None
    try:
        file = path()
    except (OSError, RuntimeError):  # no source beside this file, or no home to have a cache in
        return None
    # Unlike Path.exists, it says no to a folder that must not be looked into.
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
            "run python -m paramlora.build",
            stacklevel=2,
        )
        return None
    return built
