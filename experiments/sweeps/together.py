"""Training of many adapters on one base at once: stacked factors, `torch.func.vmap` over the model.

The losses and factors equal those of separate trainings up to rounding, since a batched product of
small matrices may add in another order. A step of a small network is mostly Python and kernel
launches, so ten seeds take as long as three or four. Tests compare with the separate trainings.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..harness.batches import Batches
from ..harness.train import Objective


class Together(nn.Module):
    """A model with several sets of factors, stacked so that all of them train at once.

    Sets of different ranks fit one stack because zeros fill the smaller ones up. For ranks 2 and 4
    at a Linear (out, in):

        A: (2, in), (4, in)     →  (2, 4, in), rows 2 and 3 of the first set are zero
        B: (out, 2), (out, 4)   →  (2, out, 4), columns 2 and 3 of the first set are zero

    The added rows and columns stay zero in training. Column k of B multiplies row k of A only. The
    gradient of an added row of A is a product with a zero column of B, and vice versa. Both
    gradients are therefore always zero, and so are Adam's steps. `of` removes the added zeros.

    The model computes B A with the scale of its attached adapter, which is that of the first set.
    `scales` corrects the others: B of a set is multiplied by (its alpha / r) / (the first's).

    Args:
        model: a model with an attached adapter, whose factors do not change.
        sets: the factors of each adapter, by their names in the model.
        scales: a multiplier for each set's B, relative to the model's scale, (sets,); 1 if empty.
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
            nn.Parameter(_padded([values[name].detach() for values in sets]))  # (sets, …)
            for name in self.names
        )
        # Do not multiply if all scales are 1, to keep results bit-for-bit those of earlier runs.
        self.scales = None
        if any(scale != 1 for scale in scales):
            self.scales = self.stacked[0].new_tensor(scales).view(-1, 1, 1)  # (sets, 1, 1)
        self.losses: list[Tensor] = []

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, (sets, …), by their names in the model."""
        return dict(zip(self.names, self.stacked, strict=True))

    def values(self) -> dict[str, Tensor]:
        """Return the factors for the model's forward, with each B multiplied by its scale."""
        if self.scales is None:
            return {**self.factors}
        return {
            name: stacked * self.scales if name.endswith(".B") else stacked
            for name, stacked in self.factors.items()
        }

    def of(self, index: int) -> dict[str, Tensor]:
        """Return the factors of one set in their original shapes."""
        return {
            name: stacked[index][tuple(map(slice, shape))].detach().clone()
            for (name, stacked), shape in zip(self.factors.items(), self.shapes[index], strict=True)
        }


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors with the same number of dimensions, and fill smaller ones up with zeros."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for place, tensor in zip(stacked, tensors, strict=True):
        place[tuple(map(slice, tensor.shape))] = tensor
    return stacked


def objective_together(objectives: Sequence[Objective], shared: bool = False) -> Objective:
    """Return an objective that sums one loss over all sets.

    A set's factors affect only that set's loss. The gradient of the sum with respect to them is
    therefore that of a separate training. Each step appends its losses, (sets,), to `model.losses`.

    Args:
        objectives: one for each set, all the same function of model and batch; the first is used.
        shared: whether all sets use the same batch, (n, …), instead of their own of (sets, n, …).
    """

    def objective(model: Together, *batch: Tensor) -> Tensor:
        bound = _Bound(model.model, objectives[0])
        named = {f"model.{name}": values for name, values in model.values().items()}
        losses = vmap(  # (sets,)
            lambda values, *one: functional_call(bound, values, one),
            in_dims=(0, *([None if shared else 0] * len(batch))),
            randomness="different",
        )(named, *batch)
        model.losses.append(losses.detach())
        return losses.sum()

    return objective


class StackedBatches:
    """The batches of several trainings, stacked to (sets, n, …).

    If all trainings draw the same images in the same order, as in the preset blog, the batches are
    `shared` and not stacked. vmap then computes the base's part of the forward once for all sets.
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
    """Return whether two sources yield the same batches: the same tensors in the same order."""
    if not (isinstance(one, Batches) and isinstance(two, Batches)) or one.size != two.size:
        return False
    same = [a is b for a, b in zip(one.tensors, two.tensors, strict=False)]
    return len(one.tensors) == len(two.tensors) and all(same) and torch.equal(one.order, two.order)


class _Bound(nn.Module):
    """A module whose forward is an objective, so that `functional_call` can replace its factors."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *batch: Tensor) -> Tensor:
        return self.objective(self.model, *batch)
