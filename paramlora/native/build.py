"""`python -m paramlora.native.build`: compile `native.cpp` for the installed torch, once."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import load


def build(verbose: bool = False) -> Path:
    """Compile the native extension for the installed torch unless it exists; return its path.

    Raises:
        RuntimeError: the compiler or ninja is missing, the compiler fails, or other users can
            write to the folder.
    """
    target = load.path()
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if problem := load.untrusted(target if target.exists() else target.parent):
        raise RuntimeError(f"the native extension is not built: {problem}")
    if not target.exists():
        # Built in a temporary folder and then moved, so that interrupted or simultaneous builds
        # leave no incomplete file.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _compile(scratch, verbose)
            built = Path(scratch) / f"{load.NAME}.so"
            built.chmod(0o755)  # a umask of 002 would let the group write to it
            os.replace(built, target)
    load.module.cache_clear()
    return target


def _compile(folder: str, verbose: bool) -> None:
    # Find the ninja that pip installed beside this interpreter, even if the environment is not
    # activated.
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        from torch.utils import cpp_extension

        cpp_extension.load(
            load.NAME,
            [str(load.SOURCE)],
            extra_cflags=load.FLAGS,
            build_directory=folder,
            verbose=verbose,
            is_python_module=False,
        )
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            "the native extension cannot be built: it needs a C++ compiler, Python's headers, "
            "ninja and setuptools (pip install ninja setuptools); paramlora works without it: "
            f"{error}"
        ) from error
    finally:
        os.environ["PATH"] = before


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as problem:
        sys.exit(str(problem))
