"""Data sets as tensors: handwritten digits, MNIST's or the smaller ones inside scikit-learn.

The only file that imports torchvision, and only to download: archives that are on disk are read
here, in a third of a second. A subset of a data set is a mask or an index, never a second copy.
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
from dataclasses import dataclass
from functools import cached_property
from os import environ
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness.environment import commit, machine
from ..harness.settings import StudyError

# The MD5 sums that torchvision checks too (torchvision.datasets.MNIST.resources).
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
PATIENCE = 5.0  # seconds that a mirror has to answer, and a download to go on after a pause


@dataclass(frozen=True)
class Split:
    """Images with their labels: uint8 (n, 28, 28), 0 to 255, and int64 (n,), 0 to 9."""

    images: Tensor
    labels: Tensor

    def inputs(self, mean: float, std: float) -> Tensor:
        """Return what a network sees: float32 (n, 784), pixels in 0 to 1 less `mean`, by `std`.

        Bitwise what torchvision's `ToTensor` and `Normalize(mean, std)` make of the images.
        """
        pixels = self.images.flatten(1).float().div_(255)
        # As float32 tensors, as Normalize has them: a Python number would divide differently.
        pixels.sub_(torch.tensor(mean, device=pixels.device))
        return pixels.div_(torch.tensor(std, device=pixels.device))

    def rows(self, rows: Tensor) -> "Split":
        """Return some of the images, by index."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set in two splits, its `name`, and in words where it comes from and `why`."""

    name: str
    why: str
    train: Split
    test: Split

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all images and labels, in hexadecimal digits."""
        total = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.cpu().numpy().tobytes())
        return total.hexdigest()


def hold_out(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows that stay and the rows held out, both ascending, `count` held out a class.

    For a validation split of training images: drawn by `generator`, the same number of each class.

    Args:
        labels: int64 (n,).
        count: rows held out of each class, at least 0 and fewer than the class has.
        generator: where the choice comes from, on the CPU.

    Raises:
        StudyError: a class that has not more than `count` rows.

    >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> stay, held = hold_out(labels, 1, torch.Generator().manual_seed(0))
    >>> labels[stay].tolist(), labels[held].tolist()
    ([0, 0, 1, 1], [0, 1])
    """
    held = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1).cpu()
        if len(rows) <= count:
            raise StudyError(f"class {label} has {len(rows)} examples: {count} cannot be held out")
        held.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[torch.cat(held)] = True
    rows = torch.arange(len(labels))
    return rows[~out].to(labels.device), rows[out].to(labels.device)


@dataclass(frozen=True)
class Source:
    """A data set of MNIST's format: the name that torchvision has for it, and its archives' sums.

    `variable`: the environment variable that names a folder with the archives.
    """

    name: str
    archives: Mapping[str, str]
    variable: str


MNIST_SOURCE = Source("MNIST", ARCHIVES, "PARAMLORA_MNIST")
FASHION_SOURCE = Source("FashionMNIST", FASHION_ARCHIVES, "PARAMLORA_FASHION")


def load_data(kind: str, data_dir: str = "data") -> Data:
    """Return the data set `kind`: "mnist", "fashion", "digits" or "auto", on the CPU.

    MNIST is looked for in `data_dir`, in the folder that the environment variable PARAMLORA_MNIST
    names and, failing both, at torchvision's mirrors, each tried once for a few seconds.
    Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) likewise, with PARAMLORA_FASHION.
    "auto" takes the digits inside scikit-learn where there is no MNIST, and `why` says so.

    Raises:
        StudyError: "mnist" or "fashion" is not to be had, or an archive on disk is damaged.
    """
    if kind == "digits":
        return _sklearn_digits("as asked")
    try:
        return _mnist(data_dir, FASHION_SOURCE if kind == "fashion" else MNIST_SOURCE)
    except _MissingError as missing:
        if kind != "auto":
            raise StudyError(
                f"--data {kind}: {missing}. Put its four archives ({', '.join(ARCHIVES)}) into a "
                "folder and name it by --data-dir, or take --data digits"
            ) from None
        return _sklearn_digits(f"as {missing}")


class _MissingError(Exception):
    """MNIST is neither on disk nor to be downloaded."""


def _mnist(data_dir: str, source: Source) -> Data:
    folders = [data_dir, *filter(None, [environ.get(source.variable)])]
    for folder in folders:
        if (found := _archive_folder(Path(folder), source)) is not None:
            return _read_mnist(found, source, f"on disk, in {folder}")
    before = f"{source.name} is not in {' or '.join(folders)}"
    mirror = _download(Path(data_dir), source, before)
    found = _archive_folder(Path(data_dir), source)
    if found is None:
        raise _MissingError(f"torchvision left no archives in {data_dir}")
    return _read_mnist(found, source, f"downloaded from {mirror}")


def _archive_folder(folder: Path, source: Source) -> Path | None:
    """Return where the four archives lie: where torchvision puts them in the folder, or in it.

    All sets of this format name their archives alike, so one archive's sum says whether they are
    another set's. Damaged ones are no other's, and are named when they are read.
    """
    for place in (folder / source.name / "raw", folder):
        if all((place / name).is_file() for name in source.archives):
            smallest = place / "t10k-labels-idx1-ubyte.gz"
            others = {s.archives[smallest.name] for s in (MNIST_SOURCE, FASHION_SOURCE)}
            others.discard(source.archives[smallest.name])
            if _md5(smallest.read_bytes()) not in others:
                return place
    return None


def _read_mnist(folder: Path, source: Source, why: str) -> Data:
    parts = [_read_archive(folder / name, md5) for name, md5 in source.archives.items()]
    train, test = (Split(images, labels.long()) for images, labels in (parts[:2], parts[2:]))
    return Data(source.name, why, train, test)


def _read_archive(path: Path, md5: str) -> Tensor:
    """Return the uint8 tensor in an IDX file: big-endian sizes, as many as its fourth byte says."""
    packed = path.read_bytes()
    if (found := _md5(packed)) != md5:
        raise StudyError(f"{path} is damaged: its MD5 is {found}, not {md5}; delete it")
    raw = _unpacked(path.with_suffix(""), packed)
    shape = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, raw[3] + 1)]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * raw[3]).view(shape)


def _unpacked(beside: Path, packed: bytes) -> bytes:
    """Return what is in an archive, from the file that torchvision unpacks beside it if it is it.

    The archive ends with the CRC-32 and the length of what is in it (RFC 1952): a check takes a
    tenth of the time of unpacking.
    """
    check, length = struct.unpack("<II", packed[-8:])
    with contextlib.suppress(OSError):
        if beside.is_file() and beside.stat().st_size == length:
            raw = beside.read_bytes()
            if zlib.crc32(raw) == check:
                return raw
    return gzip.decompress(packed)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(folder: Path, source: Source, before: str) -> str:
    """Let torchvision download the set and check it; return the mirror, or raise _MissingError."""
    try:
        from torchvision import datasets
    except ImportError:
        raise _MissingError(f"{before} and torchvision, which downloads it, is missing") from None
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
    raise _MissingError(failures[0] if failures else silent)


def _fetch(torchvisions: Any, source: Source, mirror: str, folder: Path) -> None:
    """Put the set from a mirror where torchvision puts it, and let torchvision check it."""
    raw = folder / source.name / "raw"
    if mirror.startswith("file:"):
        # torchvision asks for the length that HTTP announces, and so fails on a local mirror. It
        # takes archives that lie there already, once their sums are right.
        raw.mkdir(parents=True, exist_ok=True)
        for name, md5 in source.archives.items():
            with urllib.request.urlopen(mirror + name) as file:
                (raw / name).write_bytes(content := file.read())
            if _md5(content) != md5:
                raise RuntimeError(f"{name} fails its MD5")
    # torchvision names its folder after the class, so the one with a single mirror has its name.
    type(source.name, (torchvisions,), {"mirrors": [mirror]})(folder, download=True)


def _delete_damaged(raw: Path, source: Source) -> None:
    """Delete archives that a failed download left in part: they would be found the next time."""
    for path in (raw / name for name in source.archives):
        if path.is_file() and _md5(path.read_bytes()) != source.archives[path.name]:
            path.unlink()


def _answering(mirrors: list[str], name: str) -> list[str]:
    """Return the mirrors that begin to send the file `name` within PATIENCE seconds.

    Asked all at once, each by a thread: a name server that does not answer would hold up a call
    for a minute, and no timeout of a socket covers it.
    """
    answered = set()

    def ask(mirror: str) -> None:
        try:
            with urllib.request.urlopen(mirror + name, timeout=PATIENCE):
                answered.add(mirror)
        except (OSError, ValueError):
            pass  # it is left out, and the message names it

    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return [mirror for mirror in mirrors if mirror in answered]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let sockets that are opened inside give up after so many seconds of silence."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _sklearn_digits(why: str) -> Data:
    """Return scikit-learn's 1,797 digits, 8x8 with 17 grey levels, scaled to 28x28 and 0 to 255.

    A fifth of each digit's images is the test set, drawn once and for all.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small = load_digits()
    pixels = torch.from_numpy(small.images).float().mul(255 / 16).unsqueeze(1)
    large = torch.nn.functional.interpolate(pixels, size=(28, 28), mode="bilinear")
    images, labels = large.squeeze(1).round().to(torch.uint8), torch.from_numpy(small.target).long()
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, test = (Split(images[index], labels[index]) for index in map(torch.tensor, parts))
    return Data("scikit-learn digits", why, train, test)


def describe(device: torch.device, data: Data) -> dict[str, Any]:
    """Return what environment.json says of a run on these data: plain values, one level deep."""
    return {
        **machine(device),
        "data": data.name,
        "data_why": data.why,
        "data_digest": data.digest,
        "train_images": len(data.train.labels),
        "test_images": len(data.test.labels),
        "commit": commit(),
    }
