"""The tasks of a sequence, and the images of each.

split      digits 0-1, 2-3, 4-5, 6-7, 8-9; the base is pre-trained on the first pair
rotated    all digits, rotated by 0°, 90°/(T-1), …, 90°; the base is pre-trained at 0°
permuted   all digits, one pixel permutation per task; the base is pre-trained on unchanged images
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..digits.data import Split
from .settings import TaskSettings


@dataclass(frozen=True)
class Task:
    """A task: its name, its classes, and its training and test images with labels."""

    name: str
    classes: tuple[int, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def stream(settings: TaskSettings, train_split: Split, test_split: Split) -> list[Task]:
    """Return the tasks in order."""
    parts = [(s.images.float() / 255, s.labels) for s in (train_split, test_split)]
    tasks = []
    for number in range(settings.sequence.tasks):
        if settings.sequence.stream == "split":
            name = f"{2 * number}-{2 * number + 1}"
            classes: tuple[int, ...] = (2 * number, 2 * number + 1)
        else:
            name, classes = f"task {number + 1}", tuple(range(10))
        change = _change(settings, number)
        sides = []
        for images, labels in parts:
            chosen = torch.isin(labels, torch.tensor(classes, device=labels.device))
            sides.append(((change(images[chosen]).flatten(1) - 0.1307) / 0.3081, labels[chosen]))
        tasks.append(Task(name, classes, sides[0], sides[1]))
    return tasks


def _change(settings: TaskSettings, number: int) -> Callable[[Tensor], Tensor]:
    """Return a task's transform of images, (n, 28, 28)."""
    if settings.sequence.stream == "rotated":
        angle = 90.0 * number / (settings.sequence.tasks - 1)
        return lambda images: rotated(images, angle)
    if settings.sequence.stream == "permuted" and number:
        generator = torch.Generator().manual_seed(1000 * settings.seed + number)
        order = torch.randperm(28 * 28, generator=generator)
        return lambda images: images.flatten(1)[:, order.to(images.device)]
    return lambda images: images


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Rotate images, (n, h, w), counter-clockwise, with bilinear sampling and zeros outside.

    >>> torch.allclose(rotated(torch.eye(4)[None], 90.0), torch.eye(4).rot90()[None], atol=1e-5)
    True
    """
    turn = torch.deg2rad(torch.tensor(degrees))
    c, s = float(turn.cos()), float(turn.sin())
    matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]], device=images.device)
    shape = (len(images), 1, *images.shape[1:])
    grid = nn.functional.affine_grid(matrix.expand(len(images), 2, 3), list(shape), False)
    return nn.functional.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
