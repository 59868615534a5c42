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

from ..harness.batches import Batches
from ..harness.train import Objective


class Together(nn.Module):
    """A model with several sets of values for the same parameters, stacked, to train them all.

    Args:
        model: with the adapter attached; its own factors are left alone.
        sets: one a seed: the parameters' values, by their names in the model.
        scales: by what each set's B is multiplied beyond the model's own scale, (sets,); none: 1.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Sequence[Mapping[str, Tensor]],
        scales: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.model, self.names = model, list(sets[0])
        self.shapes = [[values[name].shape for name in self.names] for values in sets]
        self.stacked = nn.ParameterList(
            nn.Parameter(_padded([values[name].detach() for values in sets])) for name in self.names
        )
        # Left out where it is 1, so that these trainings are what they were, bit for bit.
        self.scales = None
        if any(scale != 1 for scale in scales):
            self.scales = self.stacked[0].new_tensor(scales).view(-1, 1, 1)
        self.losses: list[Tensor] = []

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, (seeds, …), by their names in the model."""
        return dict(zip(self.names, self.stacked, strict=True))

    def values(self) -> dict[str, Tensor]:
        """Return what the model computes with: the factors, every B times the scale of its set."""
        if self.scales is None:
            return {**self.factors}
        return {
            name: stacked * self.scales if name.endswith(".B") else stacked
            for name, stacked in self.factors.items()
        }

    def of(self, index: int) -> dict[str, Tensor]:
        """Return the values of one set, in the shapes that it came with."""
        return {
            name: stacked[index][tuple(map(slice, shape))].detach().clone()
            for (name, stacked), shape in zip(self.factors.items(), self.shapes[index], strict=True)
        }


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one number of dimensions stacked, zeros after the ends of smaller ones."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for place, tensor in zip(stacked, tensors, strict=True):
        place[tuple(map(slice, tensor.shape))] = tensor
    return stacked


def objective_together(objectives: Sequence[Objective], shared: bool = False) -> Objective:
    """Return the sum of a loss over all sets, whose gradients are those of each set's own.

    The loss of each is kept in the model's `losses`, one (seeds,) a step.

    Args:
        objectives: one a set, all the same function of model and batch; the first is taken.
        shared: whether a batch is every set's, and not stacked.
    """

    def objective(model: Together, *batch: Tensor) -> Tensor:
        bound = _Bound(model.model, objectives[0])
        named = {f"model.{name}": values for name, values in model.values().items()}
        losses = vmap(
            lambda values, *one: functional_call(bound, values, one),
            in_dims=(0, *([None if shared else 0] * len(batch))),
            randomness="different",
        )(named, *batch)
        model.losses.append(losses.detach())
        return losses.sum()

    return objective


class StackedBatches:
    """The batches of several trainings side by side, stacked along a first dimension of seeds.

    Where all draw the same images in the same order, as the blog's do, they are not stacked but
    `shared`: what the base makes of them is then computed once for all seeds.
    """

    def __init__(self, sources: Sequence) -> None:
        self.sources = sources
        self.shared = all(_same(sources[0], source) for source in sources)

    def __len__(self) -> int:
        return min(map(len, self.sources))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.shared:
            yield from self.sources[0]
            return
        for batches in zip(*self.sources, strict=True):
            yield tuple(torch.stack(tensors) for tensors in zip(*batches, strict=True))


def _same(one: object, two: object) -> bool:
    """Whether two sources give the same batches: the same tensors in the same order."""
    if not (isinstance(one, Batches) and isinstance(two, Batches)) or one.size != two.size:
        return False
    same = [a is b for a, b in zip(one.tensors, two.tensors, strict=False)]
    return len(one.tensors) == len(two.tensors) and all(same) and torch.equal(one.order, two.order)


class _Bound(nn.Module):
    """An objective as a module's forward, so that `functional_call` can swap what it reads."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *batch: Tensor) -> Tensor:
        return self.objective(self.model, *batch)
