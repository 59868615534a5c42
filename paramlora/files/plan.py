"""From the entries of a state dict to the factors that `install` puts into a model."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TargetError, nearest
from ..kinds.spec import Spec, factor_dtype
from ..layers.install import Planned
from ..site.block import Part, split
from ..site.factors import Factors
from ..site.place import Place, check, check_shapes, places
from ..site.storage import is_sharded
from .compare import compare
from .metadata import spec_of


def planned(
    model: nn.Module,
    tensors: dict[str, Tensor],
    described: dict[str, dict[str, Any]],
    path: str | os.PathLike[str],
    there: bool,
) -> list[Planned]:
    """Return what a file wants to attach, everything checked against the model.

    Where an adapter is `there` that only gets its values, the model may be sharded.
    """
    here = _here(model, described, path)
    specs = {site: spec_of(entry, site, path) for site, entry in described.items()}
    expected: dict[str, Tensor] = {}
    for site, spec in specs.items():
        if not (there and is_sharded(here[site].module, here[site].stored)):
            check_site(here[site], spec, path)
        blank = _blank(spec, here[site], path)
        expected |= {f"{site}.{key}": tensor for key, tensor in blank.items()}
    compare(tensors, expected, str(path))
    return [
        Planned(here[site], _factors(here[site], spec, described[site], site, tensors, expected))
        for site, spec in specs.items()
    ]


def _here(
    model: nn.Module, described: dict[str, dict[str, Any]], path: str | os.PathLike[str]
) -> dict[str, Place]:
    """Return the places of the sites that a file has, blocks of tensors among them."""
    everywhere = {place.path: place for place in places(model)}
    check_shapes(everywhere.values())
    parted = {site: (site, None) if site in everywhere else _split(site) for site in described}
    absent = [site for site, (tensor, _) in parted.items() if tensor not in everywhere]
    if absent:
        raise CheckpointError(
            f"{path} belongs to another model: it adapts {', '.join(absent)}, which this one does "
            f"not have{nearest(absent[0], everywhere)}"
        )
    here: dict[str, Place] = {}
    for site, (tensor, index) in parted.items():
        place = everywhere[tensor]
        _check_shape(place, described[site]["shape"], path)
        if index is not None:
            place = _block(place, index, site, path)
        _check_apart(place, here.values(), path)
        here[site] = place
    return here


def _split(site: str) -> tuple[str, tuple[Part, ...] | None]:
    try:
        return split(site)
    except ValueError:
        return site, None


def _block(place: Place, index: tuple[Part, ...], site: str, path: str | os.PathLike[str]) -> Place:
    try:
        block = place.at(index)
    except TargetError as error:
        raise CheckpointError(f"{path} is damaged: {error}; save the adapter again") from error
    if block.path != site:
        raise CheckpointError(
            f"{path} is damaged: it calls {block.path!r} {site!r}; save the adapter again"
        )
    return block


def _check_apart(place: Place, others: Iterable[Place], path: str | os.PathLike[str]) -> None:
    """Raise a CheckpointError where two sites of a file are in part the same here."""
    for other in others:
        if other.stored is place.stored and place.meets(other):
            raise CheckpointError(
                f"{path} does not fit: {other.path!r} and {place.path!r} are, or share, one tensor "
                "here"
            )


def _factors(
    place: Place,
    spec: Spec,
    entry: dict[str, Any],
    site: str,
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> Factors:
    device = place.value.device
    # Copies: what was read is the file's memory, mapped, aligned as it happens to be.
    own = {
        key.removeprefix(f"{site}."): tensors[key].to(device, blank.dtype, copy=True)
        for key, blank in expected.items()
        if key.rpartition(".")[0] == site
    }
    factors = Factors(spec, own, place.block)
    factors.set_strength(entry["strength"])
    return factors


def _blank(spec: Spec, place: Place, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return what the factors look like, on the meta device."""
    try:
        value = place.value
        return spec.create(torch.empty(value.shape, dtype=value.dtype, device="meta"))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has settings for {place.path!r} that give no factors, {spec!r}: {error}"
        ) from error


def _check_shape(place: Place, shape: list[int], path: str | os.PathLike[str]) -> None:
    found = list(place.whole.shape)
    if found != shape:
        raise CheckpointError(
            f"{path} belongs to another model: {place.path!r} has shape {shape} there and {found} "
            "here"
        )


def check_site(place: Place, spec: Spec, path: str | os.PathLike[str]) -> None:
    try:
        check(place, spec)
    except TargetError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error


def planned_site(
    place: Place, spec: Spec, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> Planned:
    check_site(place, spec, path)
    base = place.value
    # Copies: what was read is the file's memory, mapped, aligned as it happens to be.
    own = {
        key: tensor.to(base.device, factor_dtype(base), copy=True).contiguous()
        for key, tensor in tensors.items()
    }
    return Planned(place, Factors(spec, own))
