"""Sequences of tasks: their settings, and the images of each.

split      digits 0-1, 2-3, 4-5, 6-7, 8-9; the base is pre-trained on the first pair
rotated    all digits, turned by 0°, 90°/(T-1), …, 90°; the base on those not turned
permuted   all digits, each task's pixels in an order of its own; the base on the first
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..digits.data import Split
from ..harness.settings import Settings, option


@dataclass(frozen=True)
class TaskSettings(Settings):
    """All settings of a sequence of tasks."""

    STUDY: ClassVar[str] = "tasks"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "split": {},
        "rotated": {"stream": "rotated"},
        "permuted": {"stream": "permuted"},
    }

    preset: str = option(
        "split", "the settings to start from", choices=("split", "rotated", "permuted")
    )
    stream: str = option("split", "what the tasks are", choices=("split", "rotated", "permuted"))
    tasks: int = option(5, "tasks, the first of which the base is pre-trained on")
    scenario: str = option(
        "class", "whether an image's task is told: task, or class", choices=("class", "task")
    )
    seed: int = option(0, "seed of the base and of the pixels' orders")
    seeds: int = option(3, "number of adapter seeds, counted from 0")
    hidden: tuple[int, ...] = option((256, 128), "hidden layers, units of each")
    base_steps: int = option(1000, "length of pre-training, optimizer steps")
    base_lr: float = option(1e-3, "learning rate of pre-training, Adam's step size")
    steps: int = option(200, "length of each stage, optimizer steps")
    lr: float = option(3e-3, "learning rate of the stages, Adam's step size")
    batch: int = option(32, "batch size, images")
    rank: int = option(8, "rank r of each update")
    alpha: float = option(8.0, "numerator of the update's scale alpha/r")
    margin: float = option(0.0, "remedy: by how much other tasks' logits are lowered in training")
    orthogonal: float = option(0.0, "remedy: weight of the overlap with the A of earlier adapters")
    data: str = option(
        "auto",
        "mnist; fashion: Fashion-MNIST; digits: scikit-learn's; auto: MNIST if any, or digits",
        choices=("auto", "mnist", "fashion", "digits"),
    )
    data_dir: str = option("data", "folder with the archives", place=True)
    device: str = option("auto", "a torch device; auto: a GPU if any, or cpu")
    threads: int = option(1, "CPU threads of training")
    out: str = option("", "folder of the run; else runs/tasks-PRESET and what differs", place=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "base_steps", "steps", "batch", "rank", "threads"):
            self.require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        most = 5 if self.stream == "split" else 20
        self.require("tasks", 2 <= self.tasks <= most, f"a whole number from 2 to {most}")
        for name in ("margin", "orthogonal"):
            self.require(name, getattr(self, name) >= 0, "a number of at least 0")


@dataclass(frozen=True)
class Task:
    """A task: what it is called, its classes, its images for training and for testing."""

    name: str
    classes: tuple[int, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def stream(settings: TaskSettings, train_split: Split, test_split: Split) -> list[Task]:
    """Return the tasks of the settings, in their order."""
    parts = [(s.images.float() / 255, s.labels) for s in (train_split, test_split)]
    tasks = []
    for number in range(settings.tasks):
        if settings.stream == "split":
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
    """Return what a task does to images, (n, 28, 28)."""
    if settings.stream == "rotated":
        angle = 90.0 * number / (settings.tasks - 1)
        return lambda images: rotated(images, angle)
    if settings.stream == "permuted" and number:
        generator = torch.Generator().manual_seed(1000 * settings.seed + number)
        order = torch.randperm(28 * 28, generator=generator)
        return lambda images: images.flatten(1)[:, order.to(images.device)]
    return lambda images: images


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Return images, (n, h, w), turned counter-clockwise by bilinear samples, zero outside.

    >>> torch.allclose(rotated(torch.eye(4)[None], 90.0), torch.eye(4).rot90()[None], atol=1e-5)
    True
    """
    turn = torch.deg2rad(torch.tensor(degrees))
    c, s = float(turn.cos()), float(turn.sin())
    matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]], device=images.device)
    shape = (len(images), 1, *images.shape[1:])
    grid = nn.functional.affine_grid(matrix.expand(len(images), 2, 3), list(shape), False)
    return nn.functional.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
