"""The environment of a run: versions, device and commit, recorded once when the run starts."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .settings import StudyError

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "matplotlib", "safetensors", "tqdm")
# The keys of environment.json that results depend on. A run resumes only if these are unchanged.
RESULT_KEYS = ("torch", "device", "data", "data_digest")


def resolve_device(name: str) -> torch.device:
    """Return the torch device with a name; "auto" is a CUDA GPU if available, else the CPU.

    Raises:
        StudyError: this machine does not have the device.
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
    """Return the versions and the processor, for environment.json.

    Args:
        device: the device that the run uses.
        packages: packages whose versions are recorded in addition to PACKAGES.
    """
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in (*PACKAGES, *packages)},
        "platform": platform.platform(),
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if on_gpu else _processor(),
    }


def commit() -> str | None:
    """Return the hash of the code's git commit, or None outside a git repository.

    The hash ends with "-dirty" if files have changed since the commit.
    """
    try:
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    git = subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True)
    return git.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return str(torch.__version__) if package == "torch" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the CPU's model name if the system reports it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
