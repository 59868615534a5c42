"""Adapters' updates beside the weights that they change: rank, size, principal angles."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import paramlora as pl

from ..harness.train import cpu_threads
from .insight import names_of, sites_of


@dataclass(frozen=True)
class Geometry:
    """An update beside its weight, seen as matrices (out, everything else).

    `rank`: numerical, of ΔW = W' - W in float64; `size`: ‖ΔW‖/‖W‖, Frobenius; `angles`: principal
    angles between the column spaces of ΔW and of W's `rank` largest left-singular vectors,
    ascending, degrees: near 0 amplifies what W does already, near 90 writes somewhere else.
    `amplified`: ‖ΔW‖ / ‖UᵀWV‖ on ΔW's own singular directions U, V (Hu et al. 2021, LoRA, 7.3).
    """

    rank: int
    size: float
    angles: tuple[float, ...]
    amplified: float


@torch.no_grad()
def geometry(model: nn.Module, *names: str) -> dict[str, Geometry]:
    """Return what the named adapters (all where none is) do to each weight, by its path.

    Principal angles: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces", theorem 1.
    """
    found, chosen = {}, names or names_of(model)
    for site in sites_of(model, *chosen):
        path, _, tensor = site.rpartition(".")
        module = model.get_submodule(path)
        with pl.using(module):
            weight = getattr(module, tensor).detach().double().cpu().flatten(1)
        update = _update(module, tensor, chosen).flatten(1)
        with cpu_threads(1):
            found[site] = _compare(update, weight)
    return found


def _update(module: nn.Module, tensor: str, names: Sequence[str]) -> Tensor:
    """Return ΔW in float64: from a copy, so that W' is not rounded to the weight's dtype."""
    double = copy.deepcopy(module).double().cpu()
    its = {row.adapter for row in pl.summary(double).sites}
    with pl.using(double, *[name for name in names if name in its]):
        on = getattr(double, tensor).clone()
    with pl.using(double):
        return on - getattr(double, tensor)


def _compare(update: Tensor, weight: Tensor) -> Geometry:
    left, sizes, right = torch.linalg.svd(update, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(update)) if float(sizes.max()) > 0 else 0
    if rank == 0:
        return Geometry(0, 0.0, (), 0.0)
    principal = torch.linalg.svd(weight, full_matrices=False)[0][:, :rank]
    cosines = torch.linalg.svdvals(left[:, :rank].T @ principal).clamp(max=1)
    inside = left[:, :rank].T @ weight @ right[:rank].T
    return Geometry(
        rank,
        float(update.norm() / weight.norm()),
        tuple(torch.rad2deg(cosines.arccos()).sort().values.tolist()),
        float(update.norm() / inside.norm()),
    )
