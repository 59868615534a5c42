"""Batches of examples, and the order in which training draws the examples."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Batches:
    """Batches of a data set in a given order. The tensors stay on their device.

    Args:
        tensors: the data set; each tensor has one example per row, (n, …).
        order: the rows in the order in which they are drawn, int64 (count,). A row may repeat. The
            last batch is smaller if `size` does not divide `count`.
        size: number of examples in a batch.
    """

    # Number of steps whose rows are gathered in one call. One gather per step would take a tenth of
    # the step's time.
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
    """Return the indices that a shuffling DataLoader draws, int64 (count,).

    `DataLoader(shuffle=True)` does not shuffle with torch's global generator itself. For each epoch
    it draws two int64 numbers from the global generator: first a base seed for its workers, which
    it draws even with `num_workers=0`, and then the seed of a new generator that makes the epoch's
    permutation. A single `randperm` from the global generator would give another order, and it
    would leave the global generator in another state, so that all later draws of a study that
    replays a published script would differ as well. This function makes the same draws and reads no
    data.

    Args:
        rows: number of examples in the data set.
        count: number of indices to return, over as many epochs as needed.
    """

    def epoch() -> Tensor:
        torch.empty((), dtype=torch.int64).random_()  # the base seed of the workers, unused
        seed = int(torch.empty((), dtype=torch.int64).random_())
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))  # (rows,)

    return _epochs(epoch, rows, count)


def seeded_order(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` indices below `rows`, int64 (count,); each epoch is a new permutation.

    Args:
        rows: number of examples in the data set.
        count: number of indices to return, over as many epochs as needed.
        generator: the generator of the permutations, on the CPU.
    """
    return _epochs(lambda: torch.randperm(rows, generator=generator), rows, count)


def _epochs(epoch: Callable[[], Tensor], rows: int, count: int) -> Tensor:
    """Return the first `count` indices of repeated epochs of `rows` indices each."""
    return torch.cat([epoch() for _ in range(-(-count // rows))])[:count]
