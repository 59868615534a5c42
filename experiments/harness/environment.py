"""What a run ran on: versions, device, commit. Taken down once, when it begins."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .settings import StudyError

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "matplotlib", "safetensors", "tqdm")
# Results depend on these too, besides the settings: a run goes on only if they are the same.
RESULT_KEYS = ("torch", "device", "data", "data_digest")


def resolve_device(name: str) -> torch.device:
    """Return the torch device that a name stands for; "auto" is a GPU where there is one.

    Raises:
        StudyError: a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"--device {name} cannot be used here: {reason}") from None
    return device


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return versions, those of `packages` too, and the processor: a part of environment.json."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in (*PACKAGES, *packages)},
        "platform": platform.platform(),
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if on_gpu else _processor(),
    }


def commit() -> str | None:
    """Return the commit that the code is at, "-dirty" added where it was changed since, or None."""
    try:
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return str(torch.__version__) if package == "torch" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the CPU's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
