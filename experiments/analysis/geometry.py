"""Geometry of adapter updates relative to the weights they change: rank, norm, principal angles."""

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
    """An update ΔW = W' - W relative to its weight W, both as matrices (out, everything else).

    `rank`: numerical rank of ΔW, computed in float64.
    `relative_norm`: ‖ΔW‖ / ‖W‖, Frobenius norms.
    `angles`: the `rank` principal angles, in degrees and ascending, between the column space of
    ΔW and the space of W's `rank` leading left singular vectors. Near 0° the update strengthens
    directions that W already writes to. Near 90° it writes to new ones.
    `amplification`: ‖ΔW‖ / ‖Uᵀ W V‖, where U and V are ΔW's singular vectors (Hu et al. 2021,
    "LoRA", section 7.3). It is infinite if W is zero in those directions.
    """

    rank: int
    relative_norm: float
    angles: tuple[float, ...]
    amplification: float


@torch.no_grad()
def geometry(model: nn.Module, *names: str) -> dict[str, Geometry]:
    """Return the geometry of the named adapters' joint update (default: all), by site.

    Source of the principal angles: Björck and Golub 1973, "Numerical methods for computing angles
    between linear subspaces", theorem 1.
    """
    result, chosen = {}, names or names_of(model)
    for site in sites_of(model, *chosen):
        path, _, tensor = site.rpartition(".")
        weight, update = _weight_and_update(model.get_submodule(path), tensor, chosen)
        with cpu_threads(1):
            result[site] = _compare(update, weight)
    return result


def _weight_and_update(
    module: nn.Module, tensor: str, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return W and ΔW in float64, as matrices (out, everything else).

    A float32 layer rounds W' to float32. The rounding errors have full rank, so W' - W would seem
    to have full rank too. In a float64 copy of the layer the errors are far smaller than the
    singular values of ΔW, and `matrix_rank` does not count them.
    """
    double = copy.deepcopy(module).double().cpu()
    attached = names_of(double)
    with pl.using(double):
        weight = getattr(double, tensor).detach().clone()
    with pl.using(double, *[name for name in names if name in attached]):
        update = getattr(double, tensor).detach() - weight
    return weight.flatten(1), update.flatten(1)


def _compare(update: Tensor, weight: Tensor) -> Geometry:
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)  # (out, m), (m,), (m, in)
    rank = int(torch.linalg.matrix_rank(update)) if float(S.max()) > 0 else 0
    if rank == 0:
        return Geometry(0, 0.0, (), 0.0)
    U, Vh = U[:, :rank], Vh[:rank]  # (out, r), (r, in)
    leading = torch.linalg.svd(weight, full_matrices=False)[0][:, :rank]  # (out, r)
    # U and `leading` have orthonormal columns, so the singular values of U^T leading are the
    # cosines of the principal angles. Example with r = 1: the columns e1 and (e1 + e2)/√2 give
    # the 1×1 matrix 1/√2, and the angle is 45°. Rounding can make a cosine larger than 1, whose
    # arccos is nan.
    cosines = torch.linalg.svdvals(U.T @ leading).clamp(max=1)  # (r, out) @ (out, r) -> (r,)
    inside = U.T @ weight @ Vh.T  # (r, out) @ (out, in) @ (in, r): W in the update's directions
    return Geometry(
        rank=rank,
        relative_norm=float(update.norm() / weight.norm()),
        angles=tuple(torch.rad2deg(cosines.arccos()).sort().values.tolist()),
        amplification=float(update.norm() / inside.norm()),
    )
