"""The training loop of every study, and the order in which it sees its examples."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

Objective = Callable[..., Tensor]


class Optimizer(Protocol):
    """What training asks of an optimizer; those of `torch.optim` have it."""

    def step(self) -> object: ...

    def zero_grad(self) -> object: ...


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    objective: Objective,
    optimizer: Optimizer,
    *,
    label: str = "training",
) -> Tensor:
    """Train on each batch once, and return the loss of each step, float32 (steps,), on the CPU.

    Args:
        model: trained in place, and left in training mode.
        batches: tuples of tensors on the model's device.
        objective: `(model, *batch) -> loss`, such as `cross_entropy`; whatever is to be added to
            the loss is said here.
        optimizer: holds the parameters that are trained; one of `torch.optim`, or alike.
        label: what the progress bar is called.
    """
    losses = []
    model.train()
    for batch in tqdm(batches, desc=label, unit="step", leave=False, disable=None):
        loss = objective(model, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).float().cpu()


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the model's logits, in nats: the plain objective."""
    return F.cross_entropy(model(inputs), labels)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use so many CPU threads inside.

    On small batches one is the fastest, and where other work shares the cores several threads
    that wait for each other are slower by an order of magnitude.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Batches:
    """Examples in a given order, a batch at a time, from tensors that stay on their device.

    Args:
        tensors: the data set, each with one example a row.
        order: int64, the rows to draw one after the other; the last batch may be smaller.
        size: examples in a batch.
    """

    # Rows are gathered for so many steps at once: a gather a step would cost a tenth of the step.
    GATHERED = 50

    def __init__(self, tensors: tuple[Tensor, ...], order: Tensor, size: int) -> None:
        self.tensors, self.size = tensors, size
        self.order = order.to(tensors[0].device)

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in self.order.split(self.size * self.GATHERED):
            yield from zip(*(tensor[rows].split(self.size) for tensor in self.tensors), strict=True)


def loader_order(rows: int, count: int) -> Tensor:
    """Return `count` of `rows` indices in the order a shuffling DataLoader would draw them.

    Drawn from torch's global generator as `DataLoader(shuffle=True)` draws: for each epoch one
    number for its workers and one for its sampler, which seeds the permutation.
    """

    def epoch() -> Tensor:
        torch.empty((), dtype=torch.int64).random_()
        seed = int(torch.empty((), dtype=torch.int64).random_())
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    return _epochs(epoch, rows, count)


def seeded_order(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of `rows` indices, every epoch a permutation from `generator`."""
    return _epochs(lambda: torch.randperm(rows, generator=generator), rows, count)


def _epochs(epoch: Callable[[], Tensor], rows: int, count: int) -> Tensor:
    return torch.cat([epoch() for _ in range(-(-count // rows))])[:count]
