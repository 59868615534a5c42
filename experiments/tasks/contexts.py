"""The contexts of the three types of incremental learning: their images, output units and masks.

A context is a task of the sequence. Each example has a label within its context, from 0 to `per` -
1. The network's output units, and those among which an example of context k is classified:

    scenario   units          label's unit      active for context k
    task       contexts·per   k·per + label     k·per, …, (k + 1)·per - 1; k is given
    domain     per            label             all
    class      contexts·per   k·per + label     all, or with --units so-far the first (k + 1)·per

Source: van de Ven and Tolias 2019, "Three scenarios for continual learning", arXiv 1904.07734; van
de Ven et al. 2022, "Three types of incremental learning", and the code of the authors,
github.com/GMvandeVen/continual-learning. In the scenario class the first version of the code has
the units of the contexts so far, later versions have all units. The classes are shuffled over the
contexts of split tasks by seed. Pixels are between 0 and 1. Permuted images are padded to 32×32,
and all contexts are permuted. Images are stored once, and a batch is permuted when it is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..digits.data import Split
from ..harness.batches import seeded_order
from .settings import TaskSettings


@dataclass(frozen=True)
class Side:
    """Training or test data: images (n, pixels), labels within the context (n,), and its rows."""

    images: Tensor
    labels: Tensor
    members: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """Examples, (n, …): inputs, output units of their labels, contexts, rows in the side."""

    inputs: Tensor
    units: Tensor
    owners: Tensor
    rows: Tensor


class Contexts:
    """The contexts of one seed in one scenario."""

    def __init__(
        self, settings: TaskSettings, scenario: str, seed: int, splits: tuple[Split, Split]
    ) -> None:
        split, self.scenario = settings.sequence.stream == "split", scenario
        self.count, self.per = settings.sequence.tasks, 2 if split else 10
        generator = torch.Generator().manual_seed(seed)
        device = splits[0].images.device
        if split:
            places, self.pixels = torch.randperm(10, generator=generator).to(device), None
            self.names = [
                "-".join(str(c) for c in range(10) if int(places[c]) // 2 == k)
                for k in range(self.count)
            ]
        else:
            orders = [torch.randperm(32 * 32, generator=generator) for _ in range(self.count)]
            places, self.pixels = torch.arange(10, device=device), torch.stack(orders).to(device)
            self.names = [f"permutation {k + 1}" for k in range(self.count)]
        self.train, self.test = (self._side(part, places, 0 if split else 2) for part in splits)
        shared = scenario == "domain"
        self.outputs = self.per if shared else self.per * self.count
        self.active = torch.ones(self.count, self.outputs, dtype=torch.bool, device=device)
        mine = torch.arange(self.outputs, device=device) // self.per
        numbers = torch.arange(self.count, device=device).unsqueeze(1)
        if scenario == "task":
            self.active = mine == numbers
        elif scenario == "class" and settings.continual.units == "so-far":
            self.active = mine <= numbers
        self.masks = not bool(self.active.all())

    def _side(self, part: Split, places: Tensor, padding: int) -> Side:
        images = F.pad(part.images, [padding] * 4).flatten(1).float() / 255
        labels = places[part.labels]
        if self.pixels is not None:
            return Side(
                images, labels, [torch.arange(len(labels), device=labels.device)] * self.count
            )
        owners = labels // self.per
        rows = [(owners == k).nonzero().squeeze(1) for k in range(self.count)]
        return Side(images, labels % self.per, rows)

    def batch(self, side: Side, rows: Tensor, owners: Tensor) -> Batch:
        """Return the examples in these rows, each as one of its context."""
        inputs = side.images[rows]
        if self.pixels is not None:
            inputs = inputs.gather(1, self.pixels[owners])
        shift = 0 if self.scenario == "domain" else self.per * owners
        return Batch(inputs, side.labels[rows] + shift, owners, rows)

    def examples(self, side: Side, context: int, count: int | None = None) -> Batch:
        """Return all examples of a context, or the first `count`."""
        rows = side.members[context][:count]
        return self.batch(side, rows, torch.full_like(rows, context))

    def masked(self, logits: Tensor, owners: Tensor, current: int) -> Tensor:
        """Return the logits, (n, units), with -∞ at the units that are not active.

        In the scenario task these depend on the context of each example, in class on the current
        context, which is the one that is learned or was learned last.
        """
        if not self.masks:
            return logits
        active = self.active[owners if self.scenario == "task" else current]
        return logits.masked_fill(~active, -torch.inf)

    def pool(self, contexts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows and contexts of the training examples of some contexts, (n,) each."""
        rows = [self.train.members[k] for k in contexts]
        owners = [torch.full_like(part, k) for k, part in zip(contexts, rows, strict=True)]
        return torch.cat(rows), torch.cat(owners)


class Draws:
    """Batches of training examples from a pool, in a random order; each epoch is a permutation."""

    def __init__(
        self,
        contexts: Contexts,
        pool: tuple[Tensor, Tensor],
        steps: int,
        size: int,
        generator: torch.Generator,
    ) -> None:
        rows, owners = pool
        order = seeded_order(len(rows), steps * size, generator).to(rows.device)
        self.contexts, self.steps = contexts, steps
        self.rows, self.owners = rows[order].split(size), owners[order].split(size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows, owners in zip(self.rows, self.owners, strict=True):
            batch = self.contexts.batch(self.contexts.train, rows, owners)
            yield batch.inputs, batch.units, batch.owners, batch.rows
