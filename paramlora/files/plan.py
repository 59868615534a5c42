"""Check the content of a file, and plan its factors at the places of a model.

Nothing here changes the model. `refresh.py` changes it after the whole plan is made.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, TargetError, nearest, some
from ..kinds.spec import FLOATS, Spec, factor_dtype
from ..layers.install import PlannedSite
from ..site.place import Place, check, check_shapes, first_overlap
from ..stack.block import Part, split
from ..stack.factors import Factors
from ..stack.storage import is_sharded
from .metadata import spec_of
from .safetensors_file import FilePath, damaged
from .state import compare

Described = Mapping[str, dict[str, Any]]


def plan_sites(
    everywhere: list[Place],
    tensors: Mapping[str, Tensor],
    described: Described,
    path: FilePath,
    *,
    refresh: bool,
) -> list[PlannedSite]:
    """Return the factors that a file has for a model, in the file's order.

    Args:
        everywhere: the places of the model.
        tensors: the factors in the file, by `<site>.<factor>`.
        described: the metadata of the file's sites, by path.
        path: the file, for messages.
        refresh: whether the file has new values for an adapter that is attached. Only then may the
            model be sharded.

    Raises:
        CheckpointError: the file does not fit the model.
        TargetError: a tensor of the model is lazy.
    """
    here = _places_of(everywhere, described, path)
    specs = {site: spec_of(entry, site, path) for site, entry in described.items()}
    blanks: dict[str, dict[str, Tensor]] = {}
    for site, spec in specs.items():
        place = here[site]
        if not (refresh and is_sharded(place.module, place.stored)):
            check_site(place, spec, path)
        blanks[site] = _blank(spec, place, path)
    expected = {f"{site}.{key}": blank for site in blanks for key, blank in blanks[site].items()}
    compare(tensors, expected, str(path))
    check_dtypes(tensors, path)
    planned = []
    for site, spec in specs.items():
        dtypes = {key: blank.dtype for key, blank in blanks[site].items()}
        values = {key: tensors[f"{site}.{key}"] for key in dtypes}
        planned.append(plan_site(here[site], spec, values, dtypes))
        planned[-1].factors.set_strength(described[site]["strength"])
    return planned


def plan_site(
    place: Place,
    spec: Spec,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> PlannedSite:
    """Return a place with factors that are contiguous copies of `tensors` on its device.

    The copies have the given dtypes, by default `factor_dtype` of the base's tensor.
    """
    base = place.value
    dtypes = dtypes or dict.fromkeys(tensors, factor_dtype(base))
    copies = {
        key: tensor.to(base.device, dtypes[key], copy=True).contiguous()
        for key, tensor in tensors.items()
    }
    return PlannedSite(place, Factors(spec, copies, place.block))


def check_dtypes(tensors: Mapping[str, Tensor], path: FilePath) -> None:
    """Raise a CheckpointError if a tensor in a file has a dtype that no factor has."""
    wrong = [f"{key} has dtype {t.dtype}" for key, t in tensors.items() if t.dtype not in FLOATS]
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: {some(wrong)}; factors are floating tensors of 16 to 64 bits"
        )


def check_site(place: Place, spec: Spec, path: FilePath) -> None:
    """Raise a CheckpointError if the spec in a file cannot adapt the tensor at `place`."""
    try:
        check(place, spec)
    except TargetError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error


def _places_of(everywhere: list[Place], described: Described, path: FilePath) -> dict[str, Place]:
    """Return the place of each site in a file: a tensor of the model, or a block of one."""
    check_shapes(everywhere)
    by_path = {place.path: place for place in everywhere}
    # Whole paths come first, because a parameter's own name may end with an index.
    parts = {site: (site, None) if site in by_path else _split(site) for site in described}
    absent = [site for site, (tensor, _) in parts.items() if tensor not in by_path]
    if absent:
        raise CheckpointError(
            f"{path} belongs to another model: it adapts {', '.join(absent)}, which this model "
            f"does not have{nearest(absent[0], by_path)}"
        )
    here: dict[str, Place] = {}
    for site, (tensor, index) in parts.items():
        place, shape = by_path[tensor], described[site]["shape"]
        found = list(place.whole.shape)
        if found != shape:
            raise CheckpointError(
                f"{path} belongs to another model: {tensor!r} has shape {shape} in the file and "
                f"{found} in this model"
            )
        here[site] = place if index is None else _block(place, index, site, path)
    overlap = first_overlap(here.values())
    if overlap is not None:
        raise CheckpointError(
            f"{path} does not fit this model, in which {overlap[0].path!r} and "
            f"{overlap[1].path!r} share elements"
        )
    return here


def _split(site: str) -> tuple[str, tuple[Part, ...] | None]:
    """Return the path of a tensor and the index of a block, None if the site has no valid index."""
    try:
        return split(site)
    except ValueError:
        return site, None


def _block(place: Place, index: tuple[Part, ...], site: str, path: FilePath) -> Place:
    """Return the place of a block, which the file must write in its shortest form."""
    try:
        block = place.at(index)
    except TargetError as error:
        raise damaged(path, str(error)) from error
    if block.path != site:
        raise damaged(path, f"the site {site!r} must be written {block.path!r}")
    return block


def _blank(spec: Spec, place: Place, path: FilePath) -> dict[str, Tensor]:
    """Return factors for a place on the meta device: their names, shapes and dtypes."""
    try:
        value = place.value
        return spec.create(torch.empty(value.shape, dtype=value.dtype, device="meta"))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has settings for {place.path!r} that cannot create factors, {spec!r:.200}: "
            f"{error}"
        ) from error
