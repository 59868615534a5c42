"""Many adapters of one base trained at once: stacked factors, `torch.func.vmap` over the model.

Replaces as many trainings one by one, whose losses and factors it gives to rounding: a product of
small matrices for all seeds at once may add up in another order. On a small network, where a step
is mostly Python and kernel launches, ten seeds take as long as three or four. The trainings one by
one stay the reference that tests compare with.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .train import Objective


class Together(nn.Module):
    """A model with several sets of values for the same parameters, stacked, to train them all.

    Args:
        model: with the adapter attached; its own factors are left alone.
        sets: one a seed: the parameters' values, by their names in the model.
    """

    def __init__(self, model: nn.Module, sets: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.names = model, list(sets[0])
        self.stacked = nn.ParameterList(
            nn.Parameter(torch.stack([values[name].detach() for values in sets]))
            for name in self.names
        )
        self.losses: list[Tensor] = []

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, (seeds, …), by their names in the model."""
        return dict(zip(self.names, self.stacked, strict=True))

    def of(self, index: int) -> dict[str, Tensor]:
        """Return the values of one set."""
        return {name: stacked[index].detach().clone() for name, stacked in self.factors.items()}


def objective_together(objectives: Sequence[Objective]) -> Objective:
    """Return the sum of a loss over all sets, whose gradients are those of each set's own.

    The loss of each is kept in the model's `losses`, one (seeds,) a step. `objectives`: one a set,
    all the same function of model and batch; the first is taken.
    """

    def objective(model: Together, *batch: Tensor) -> Tensor:
        bound = _Bound(model.model, objectives[0])
        named = {f"model.{name}": stacked for name, stacked in model.factors.items()}
        losses = vmap(
            lambda values, *one: functional_call(bound, values, one), randomness="different"
        )(named, *batch)
        model.losses.append(losses.detach())
        return losses.sum()

    return objective


class StackedBatches:
    """The batches of several trainings side by side, stacked along a first dimension of seeds."""

    def __init__(self, sources: Sequence) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return min(map(len, self.sources))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batches in zip(*self.sources, strict=True):
            yield tuple(torch.stack(tensors) for tensors in zip(*batches, strict=True))


class _Bound(nn.Module):
    """An objective as a module's forward, so that `functional_call` can swap what it reads."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *batch: Tensor) -> Tensor:
        return self.objective(self.model, *batch)
