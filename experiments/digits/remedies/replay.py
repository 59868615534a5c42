"""Replay: images of other digits, a batch of them beside each batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...harness.batches import Batches
from ..context import StudyContext


class Joined:
    """Several sources of batches side by side: each batch has the tensors of all."""

    def __init__(self, *sources: Batches) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return min(map(len, self.sources))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for parts in zip(*self.sources, strict=True):
            yield tuple(tensor for part in parts for tensor in part)


def memory_generator(seed: int) -> torch.Generator:
    """Return the generator that draws an adapter seed's replayed images."""
    return torch.Generator().manual_seed(seed + 2**40)


def memory(context: StudyContext, generator: torch.Generator, digits: str = "old") -> Tensor:
    """Return the rows of the images that are replayed, the same number a digit, int64 (n,).

    Those of the old digits come first, and are the same with and without the tuned ones.
    """
    rows = []
    old = sorted(set(context.labels.unique().tolist()) - set(context.tuned))
    for digit in old + (context.tuned if digits == "all" else []):
        its = (context.labels == digit).nonzero().squeeze(1)
        chosen = torch.randperm(len(its), generator=generator)[: context.settings.remedies.replay]
        rows.append(its[chosen.to(its.device)])
    return torch.cat(rows)
