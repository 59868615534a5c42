"""ParityMNIST: the images of MNIST and Fashion-MNIST as inputs of one network.

An input has 784 normalised pixels and a task bit, (n, 785): +1 asks for a digit of the image's
parity, -1 for the garment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..digits.data import Data, Split, load_data
from .settings import DatasetSettings

NORMS = {"parity": (0.1307, 0.3081), "fashion": (0.286, 0.353)}
BITS = {"parity": 1.0, "fashion": -1.0}
SYNTHETIC = 640, 300  # images of a synthetic training split and of a test split


@dataclass(frozen=True)
class Examples:
    """Inputs, float32 (n, 785), and their labels, int64 (n,): digits or garments, 0 to 9."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ParityData:
    """The training and test examples of both tasks."""

    digits: Examples
    digits_test: Examples
    garments: Examples
    garments_test: Examples


def examples(split: Split, task: str) -> Examples:
    """Return the images of a split as inputs with the bit of a task, "parity" or "fashion"."""
    pixels = split.inputs(*NORMS[task])
    return Examples(
        torch.cat([pixels, pixels.new_full((len(pixels), 1), BITS[task])], 1), split.labels
    )


def parity_data(digits: Data, garments: Data, device: torch.device) -> ParityData:
    """Return the examples of both data sets, on the device."""
    parts = [
        examples(split.to(device), task)
        for data, task in ((digits, "parity"), (garments, "fashion"))
        for split in (data.train, data.test)
    ]
    return ParityData(*parts)


def load_both(settings: DatasetSettings) -> tuple[Data, Data]:
    """Return the data sets with digits and with garments, on the CPU."""
    if settings.data == "synthetic":
        return synthetic(0), synthetic(1)
    return load_data("mnist", settings.data_dir), load_data("fashion", settings.data_dir)


def synthetic(seed: int) -> Data:
    """Return a data set of ten random images, each of which is repeated with noise."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(10, 28, 28, generator=generator)
    splits: list[Split] = []
    for count in SYNTHETIC:
        labels = torch.randint(10, (count,), generator=generator)
        noise = torch.randn(count, 28, 28, generator=generator)
        pixels = (means[labels] + 0.5 * noise).clamp(0, 1).mul(255)
        splits.append(Split(pixels.to(torch.uint8), labels))
    train, test = splits
    return Data(f"synthetic images {seed}", "as asked", train, test)
