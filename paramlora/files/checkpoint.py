"""State dicts of adapters, and one `.safetensors` file for an adapter.

A file has the factors under `<site>.<factor>`, such as `fc1.weight.A`, and one metadata entry,
`paramlora`: JSON with the format's version, for each site the kind, its fields, the strength and
the tensor's shape, and a digest of all that and of the factors. Nothing in it is executed or
unpickled. Where a kind is not one of the library's, its class has to be imported before the file
is loaded.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from ..errors import AdapterNameError, CheckpointError, TargetError
from ..kinds.spec import Spec
from ..site.block import Part, split
from ..site.factors import Factors
from ..site.place import Place, check_shapes, places
from ..site.stack import Site, below, first_sites
from ..site.storage import check_settled, fill, is_sharded, settle, writes_files
from ..verbs.attach import Planned, check_name, check_tied, install
from ..verbs.summary import Summary, summary
from ..verbs.targets import check, nearest
from ..verbs.toggle import check_unmerged, names_of, select
from .base import check_real, compare, digest, whole
from .safetensors_file import ENTRY, VERSION, read, write_atomically


def state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return an adapter's factors by `<site>.<factor>`: `fc1.weight.A`.

    As with `nn.Module.state_dict` the tensors are detached, and share memory with the model's;
    of a model that FSDP has sharded they are in parts (DTensors).

    Raises:
        AdapterNameError: no adapter of that name.
    """
    settle(model)
    return {
        f"{path}.{key}": tensor.detach()
        for path, factors in _parts(model, name).items()
        for key, tensor in factors.tensors.items()
    }


@torch.no_grad()
def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy factors, as `state_dict` gave them, into an adapter that is attached.

    Nothing else changes: no other adapter, not what is active, scaled or trained. Where the model
    is sharded all processes call it, with whole tensors or with parts.

    Raises:
        AdapterNameError: no adapter of that name.
        CheckpointError: missing or unexpected keys, all of them listed, or other shapes; the
            model is then as it was.
        StateError: the adapter is merged, or the model is on the meta device.
    """
    check_unmerged(select(model, [name]), "load")
    own = state_dict(model, name)
    compare(state, own, f"the state for adapter {name!r}")
    _check_writable(model, name)
    for key, tensor in own.items():
        fill(tensor, state[key])


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> None:
    """Save an adapter to one `.safetensors` file that says all that `load` needs.

    The file is written beside its place and moved there: a crash leaves the old one or the new.
    Where the model is sharded all processes call it, and the first one writes.

    Raises:
        AdapterNameError: no adapter of that name.
        FileNotFoundError: no such folder.
        TypeError: a kind of your own has a field that JSON cannot hold.
    """
    state = state_dict(model, name)
    for key, tensor in state.items():
        check_real(key, tensor)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {
        key: whole(tensor).to("cpu", copy=True).contiguous() for key, tensor in state.items()
    }
    described = {
        path: _describe(factors, site)
        for site in sites_of(model, name)
        for path, factors in site.parts(name).items()
    }
    content = {"version": VERSION, "name": name, "sites": described}
    try:
        content["digest"] = digest(tensors.items(), json.dumps(content))
    except TypeError as error:
        raise TypeError(
            f"cannot save adapter {name!r}: a spec's fields must be numbers, strings, booleans or "
            f"None ({error})"
        ) from error
    if writes_files(list(state.values())):
        # Not by safetensors' own save_file, whose files only their owner may read.
        write_atomically(path, serialized(tensors, {"format": "pt", ENTRY: json.dumps(content)}))


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> Summary:
    """Attach the adapter of a file, or refresh the one of that name that is attached.

    A new one is attached as `attach` does it: switched on, its factors trained, the base frozen.
    Into one of the same name, sites and shapes only the values and strengths are copied; that can
    be done in a model that is sharded, too, by all processes.

    Args:
        model: a module with the tensors that the file names.
        path: a file that `save` wrote.
        name: the adapter's name here; without one, its name in the file.

    Returns:
        The model's summary.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, was not written by paramlora, or belongs to another
            model; the message names the file, the site, and the shapes expected and found. The
            model is then as it was.
        AdapterNameError: the name cannot be one, or belongs to an adapter of other sites, kinds
            or shapes.
        StateError: the adapter of that name is merged, or the model is on the meta device.
        TargetError: a tensor of the model is lazy and has no shape yet.
    """
    tensors, content = read(path)
    name = content["name"] if name is None else name
    planned = _planned(model, tensors, content["sites"], path, name in names_of(model))
    for plan in planned:
        check_real(plan.place.path, plan.place.stored)
    check_tied(model, [plan.place for plan in planned])
    # Last, because the checks before it say more.
    saved = content.pop("digest")
    if digest(tensors.items(), json.dumps(content)) != saved:
        raise CheckpointError(
            f"{path} is damaged: its digest is not that of what was saved; save the adapter again"
        )
    return take(model, planned, name, path)


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


def sites_of(model: nn.Module, name: str) -> list[Site]:
    """Return the sites of one adapter, tied ones once, in the order of `parameters`."""
    wanted = {id(stack) for stack, _ in select(model, [name])}
    return [site for site in first_sites(model) if id(site.stack) in wanted]


def _parts(model: nn.Module, name: str) -> dict[str, Factors]:
    """Return one adapter's factors by the path of the site or block, in the same order."""
    return {
        path: factors
        for site in sites_of(model, name)
        for path, factors in site.parts(name).items()
    }


def _describe(factors: Factors, site: Site) -> dict[str, Any]:
    values = {f.name: getattr(factors.spec, f.name) for f in dataclasses.fields(factors.spec)}
    return {
        "kind": type(factors.spec).__name__,
        # A callable (an init) has done its work and cannot be saved.
        "fields": {key: value for key, value in values.items() if not callable(value)},
        "strength": float(factors.strength),
        # Of the whole tensor, also for a block, whose place in it the path has.
        "shape": list(below(site.plist, site.stack).shape),
    }


def _planned(
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
    specs = {site: _spec(entry, site, path) for site, entry in described.items()}
    expected: dict[str, Tensor] = {}
    for site, spec in specs.items():
        if not (there and is_sharded(here[site].module, here[site].stored)):
            _check_site(here[site], spec, path)
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


def _check_site(place: Place, spec: Spec, path: str | os.PathLike[str]) -> None:
    try:
        check(place, spec)
    except TargetError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error


def _spec(entry: dict[str, Any], site: str, path: str | os.PathLike[str]) -> Spec:
    imported = list(_derived(Spec))  # type: ignore[type-abstract]
    # By their places: a notebook's cell that runs again defines its class again.
    named = {_full_name(kind): kind for kind in imported if kind.__name__ == entry["kind"]}
    if not named:
        known = sorted({kind.__name__ for kind in imported})
        raise CheckpointError(
            f"{path} has an adapter of kind {entry['kind']!r} at {site!r}, and no imported class "
            f"of that name derives from Spec (there are {', '.join(known)}); import it"
        )
    if len(named) > 1:
        raise CheckpointError(
            f"{path} has an adapter of kind {entry['kind']!r} at {site!r}, and there are several "
            f"classes of that name: {', '.join(sorted(named))}; rename your own"
        )
    [kind] = named.values()
    try:
        return kind(**entry["fields"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has settings for {site!r} that {entry['kind']} does not take: {error}"
        ) from error


def _full_name(kind: type[Spec]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _derived(kind: type[Spec]) -> Iterator[type[Spec]]:
    for derived in kind.__subclasses__():
        yield derived
        yield from _derived(derived)


@torch.no_grad()
def refresh(
    model: nn.Module,
    planned: list[Planned],
    name: str,
    path: str | os.PathLike[str],
) -> None:
    """Copy a file's values into the adapter of that name, which must be of the same make."""
    check_unmerged(select(model, [name]), "load")
    attached = _parts(model, name)
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
    _check_writable(model, name)
    for site, factors in attached.items():
        factors.spec = new[site].spec
        factors.set_strength(new[site].strength)
        for key, tensor in factors.tensors.items():
            fill(tensor, new[site].tensors[key])


def _check_writable(model: nn.Module, name: str) -> None:
    """Raise a StateError where what is written to an adapter's factors would be lost."""
    for site in sites_of(model, name):
        for path, factors in site.parts(name).items():
            # Parameters alone: constants are buffers, which FSDP leaves whole.
            for key, parameter in factors.named_parameters():
                check_settled(site.module, parameter, path)
                check_real(f"{path}.{key}", parameter)


def _shapes(factors: Factors) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in factors.tensors.items()}
