"""Examples in batches, and the order in which training sees them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


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
