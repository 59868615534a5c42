"""The digit study as a plain script, which `study-speed` compares the study with.

It follows the text of the blog post. PIL images go through torchvision's transforms and a
DataLoader in batches of ten, with one optimizer step per batch. The evaluation loops over the rows
in Python. A hand-written parametrization makes the low-rank updates, with the post's transposed
shapes.
"""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

TUNED = (2, 3, 5, 8, 9)
BATCH = 10


class Network(nn.Module):
    """784 → 256 → 128 → 10, without activations between the layers, with a ReLU on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(28 * 28, 256)
        self.linear2 = nn.Linear(256, 128)
        self.linear3 = nn.Linear(128, 10)
        self.relu = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        x = image.view(-1, 28 * 28)
        return self.relu(self.linear3(self.linear2(self.linear1(x))))


class Update(nn.Module):
    """The post's update: BA with A (r, out) and B (in, r), reshaped to (out, in) by `view`."""

    def __init__(self, outputs: int, inputs: int, rank: int = 2, alpha: float = 1.0) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, outputs))
        self.B = nn.Parameter(torch.zeros(inputs, rank))
        self.scale, self.enabled = alpha / rank, True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        return weight + (self.B @ self.A).view(weight.shape) * self.scale


def mnist(folder: Path, train: bool) -> datasets.MNIST:
    """Return MNIST as PIL images with transforms, from a folder in torchvision's layout."""
    steps = [transforms.ToTensor(), transforms.Normalize((0.1301,), (0.3081,))]
    return datasets.MNIST(folder, train=train, transform=transforms.Compose(steps))


def train(model: nn.Module, data: datasets.MNIST, steps: int) -> float:
    """Train for `steps` batches and return the mean loss."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    total = 0.0
    for step, (images, labels) in enumerate(DataLoader(data, batch_size=BATCH, shuffle=True)):
        if step == steps:
            break
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        total += loss.item()
        loss.backward()
        optimizer.step()
    return total / steps


def wrong_counts(model: nn.Module, data: datasets.MNIST) -> list[int]:
    """Return the number of wrong answers for each digit, counted row by row."""
    wrong = [0] * 10
    with torch.no_grad():
        for images, labels in DataLoader(data, batch_size=BATCH, shuffle=False):
            for logits, label in zip(model(images), labels, strict=True):
                if torch.argmax(logits) != label:
                    wrong[int(label)] += 1
    return wrong


def attach(model: Network) -> list[Update]:
    """Freeze the model, register an update on the weight of each layer, return the updates."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    updates = []
    for layer in (model.linear1, model.linear2, model.linear3):
        updates.append(Update(*layer.weight.shape))
        parametrize.register_parametrization(layer, "weight", updates[-1])
    return updates


def study(folder: Path, base_steps: int = 6000, steps: int = 200) -> dict[str, object]:
    """Train, evaluate, fine-tune, and evaluate with the updates on and off.

    Returns the wrong counts of the three evaluations, the seconds of all, and those of the first
    evaluation.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    train_set, test_set = mnist(folder, train=True), mnist(folder, train=False)
    model = Network()
    train(model, train_set, base_steps)
    evaluation_began = time.perf_counter()
    base = wrong_counts(model, test_set)
    evaluation = time.perf_counter() - evaluation_began

    updates = attach(model)
    kept = torch.isin(train_set.targets, torch.tensor(TUNED))
    train_set.data, train_set.targets = train_set.data[kept], train_set.targets[kept]
    train(model, train_set, steps)
    on = wrong_counts(model, test_set)
    for update in updates:
        update.enabled = False
    off = wrong_counts(model, test_set)
    seconds = time.perf_counter() - began
    return {"base": base, "on": on, "off": off, "seconds": seconds, "evaluation": evaluation}
