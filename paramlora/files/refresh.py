"""Writing new values into factors that are attached already."""

import os

import torch
from torch import nn

from ..errors import AdapterNameError
from ..layers.install import Planned, check_name, install
from ..site.factors import Factors
from ..site.names import check_unmerged, names_of, select
from ..site.storage import fill, settle
from ..verbs.summary import Summary, summary
from .state import check_writable, parts_of_sites


def take(
    model: nn.Module, planned: list[Planned], name: str, path: str | os.PathLike[str]
) -> Summary:
    """Attach the factors that a file or folder holds, or refresh those of an adapter of that name.

    `path` is for messages.
    """
    if name in names_of(model):
        refresh(model, planned, name, path)
    else:
        check_name(model, name)
        install(model, planned, name, freeze=True)
    return summary(model)


@torch.no_grad()
def refresh(
    model: nn.Module,
    planned: list[Planned],
    name: str,
    path: str | os.PathLike[str],
) -> None:
    """Copy a file's values into the adapter of that name, which must be of the same make."""
    check_unmerged(select(model, [name]), "load")
    attached = parts_of_sites(model, name)
    new = {plan.place.path: plan.factors for plan in planned}
    same = attached.keys() == new.keys() and all(
        type(new[site].spec) is type(attached[site].spec)
        and _shapes(new[site]) == _shapes(attached[site])
        for site in new
    )
    if not same:
        raise AdapterNameError(
            f"an adapter {name!r} is attached already, with other sites, kinds or ranks than "
            f"{path} has ({', '.join(new)}); give name=, or detach it first"
        )
    settle(model)
    check_writable(model, name)
    for site, factors in attached.items():
        factors.spec = new[site].spec
        factors.set_strength(new[site].strength)
        for key, tensor in factors.tensors.items():
            fill(tensor, new[site].tensors[key])


def _shapes(factors: Factors) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in factors.tensors.items()}
