"""Replay: each batch of tuned digits comes with a batch of images of other digits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...harness.batches import Batches
from ..context import StudyContext


class Joined:
    """Several sources of batches in parallel; each batch has the tensors of all sources."""

    def __init__(self, *sources: Batches) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return min(map(len, self.sources))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for parts in zip(*self.sources, strict=True):
            yield tuple(tensor for part in parts for tensor in part)


def memory_generator(seed: int) -> torch.Generator:
    """Return the generator that draws the replayed images of an adapter seed."""
    return torch.Generator().manual_seed(seed + 2**40)


def memory(context: StudyContext, generator: torch.Generator, digits: str = "old") -> Tensor:
    """Return the rows of the replayed images, equally many per digit, int64 (n,).

    The rows of the old digits come first. They do not depend on `digits`.

    Args:
        context: the data and the number of images per digit.
        generator: the generator of the random choice, on the CPU.
        digits: "old", or "all" to add images of the tuned digits.
    """
    rows = []
    old = sorted(set(context.labels.unique().tolist()) - set(context.tuned))
    for digit in old + (context.tuned if digits == "all" else []):
        of_digit = (context.labels == digit).nonzero().squeeze(1)
        chosen = torch.randperm(len(of_digit), generator=generator)[
            : context.settings.remedies.replay
        ]
        rows.append(of_digit[chosen.to(of_digit.device)])
    return torch.cat(rows)
