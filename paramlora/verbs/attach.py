"""Attaching adapters to a model, detaching them, and which of their factors are trained."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import AdapterNameError, StateError
from ..kinds.spec import Spec
from ..layers import host
from ..layers.statistics import hold, release
from ..site.factors import Factors
from ..site.place import Place, holders
from ..site.stack import Site, Stack, sites, stored, walk
from ..site.storage import is_sharded, settle
from .preview import left_out, preview
from .summary import Summary, report
from .targets import Target, Targets, resolve
from .toggle import check_unmerged, names_of, select


@dataclass
class Planned:
    """A tensor that is about to get an adapter, and the factors that it gets."""

    place: Place
    factors: Factors


def attach(
    model: nn.Module,
    spec: Spec | Mapping[Target, Spec],
    targets: Targets | None = None,
    *,
    name: str = "default",
    exclude: Targets = (),
    freeze: bool = True,
    generator: torch.Generator | None = None,
    hold_statistics: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Attach an adapter to every tensor that matches, switched on, its outputs those of the base.

    Args:
        model: any module; it keeps its classes, its code and its stored weights.
        spec: what to learn, such as `LoRA(rank=4)`, or a mapping from target to spec, of which
            the first that matches a tensor, or blocks of it, counts.
        targets: a module type (its `weight`; `nn.Linear` where nothing is given), a glob over
            dotted paths of modules (their `weight`) or tensors, a callable
            `(path, module) -> bool`, or a list of those. `*` crosses dots, and `*.fc1` also means
            an `fc1` at the top. A glob may end with an index, `*.c_attn.weight[:, :768]`: that
            block alone is adapted, with factors of its own, and one adapter may have several that
            do not overlap.
        name: the adapter's name; any that the model does not have yet.
        exclude: what to leave out, in the same forms.
        freeze: stop the base's parameters from requiring a gradient; `detach` gives back the
            flags that were there.
        generator: where the factors' random numbers come from; without one, torch's global CPU
            generator. The same seed gives the same factors whatever the model's device.
        hold_statistics: keep BatchNorm and its like in eval mode until this adapter is detached,
            so that their running statistics stay as they are; see `hold_statistics`.
        dry_run: change nothing, draw nothing, and print what the model would be.

    Returns:
        The model's summary; its `skipped` has the tensors without this adapter, each with the
        reason.

    Raises:
        TargetError: a target matches nothing, or a tensor that cannot be adapted (integer or
            packed, lazy, too few dimensions), or that does not have the block; or blocks overlap.
            The model is then as it was.
        AdapterNameError: the name is taken, or cannot be one.
        StateError: a tensor is tied, and has adapters on one side only.
        TypeError: a spec is no instance of one, or a target none of the forms above.

    >>> import paramlora as pl
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> pl.attach(model, pl.LoRA(rank=2), targets="0", name="digits").trainable
    14
    """
    check_name(model, name)
    resolved = resolve(model, spec, targets, exclude)
    check_tied(model, [place for place, _ in resolved.found])
    skipped = tuple(left_out(model, resolved, freeze))
    if dry_run:
        expected = preview(model, resolved, name, freeze, hold_statistics)
        found = dataclasses.replace(expected, skipped=skipped, dry_run=True)
        print(found)
        return found
    planned = [
        Planned(place, Factors(spec, spec.create(place.value.detach(), generator), place.block))
        for place, spec in resolved.found
    ]
    install(model, planned, name, freeze)
    if hold_statistics:
        hold(model, name)
    return dataclasses.replace(report(model, fresh=name), skipped=skipped)


def detach(model: nn.Module, *names: str) -> None:
    """Take adapters away, all where none is named: the exact inverse of `attach`.

    A module that has no adapter left is what it was: class, parameters with their identity, order,
    bits and requires_grad, hooks. On a part of a model it gives back that part's flags only.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged, tied to a tensor outside of `model`, or sharded.
    """
    check_unmerged(select(model, names), "detach")
    here = sites(model)
    check_ties(here)
    check_whole(here)
    remove(model, here, set(names or names_of(model)))
    if not names:
        # Also what was frozen for an adapter that a part of the model lost before.
        host.unfreeze_base(model, None)
        release(model, None)
        host.forget(model)


def freeze(model: nn.Module, *names: str) -> None:
    """Stop the factors of the adapters from requiring a gradient; nothing else changes."""
    for parameter in parameters(model, *names):
        parameter.requires_grad_(False)


def unfreeze(model: nn.Module, *names: str) -> None:
    """Let the factors of the adapters require a gradient; nothing else changes."""
    for parameter in parameters(model, *names):
        parameter.requires_grad_(True)


def parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Return the factors of the adapters, all where none is named, for an optimizer.

    Raises:
        AdapterNameError: no adapter of that name.
    """
    settle(model)
    return [
        parameter
        for stack, its_names in select(model, names)
        for name in its_names
        for parameter in stack[name].parameters()
    ]


def check_name(model: nn.Module, name: str) -> None:
    """Raise an AdapterNameError where a new adapter cannot have this name."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(
            f"{name!r} cannot be an adapter's name: it must be a string, not empty, without a "
            "dot, and no attribute of nn.ModuleDict"
        )
    taken = names_of(model)
    if name in taken:
        raise AdapterNameError(
            f"an adapter {name!r} is attached already (there are {', '.join(map(repr, taken))}); "
            "choose another name=, or detach it first"
        )


def install(model: nn.Module, planned: list[Planned], name: str, freeze: bool) -> None:
    """Put new factors at their places; nothing here can fail for what a user wrote."""
    found = holders(model)
    for plan in planned:
        shared = found[id(plan.place.stored)]
        stack = next((place.stack for place in shared if place.stack is not None), None) or Stack()
        for place in shared:
            if place.stack is None:
                host.register(place.module, place.tensor, stack)
        stack.tied = tuple(place.path for place in shared) if len(shared) > 1 else ()
        stack.add(name, plan.factors)
    if freeze:
        host.freeze_base(model, name)


def remove(model: nn.Module, here: list[Site], names: set[str]) -> None:
    """Take the named adapters from the sites, and give back what they froze."""
    host.unfreeze_base(model, names)
    release(model, set(names))
    for site in here:
        for name in names.intersection(site.stack.factors):
            site.stack.remove(name)
    for site in here:
        if not site.stack.factors:
            host.unregister(site)
    host.forget(model)


def check_tied(model: nn.Module, chosen: Iterable[Place]) -> None:
    """Raise a StateError where a tensor is tied, and the adapters on it are on one side only."""
    # Most models tie nothing, which is told sooner than what is tied to what.
    everywhere = (module._parameters.values() for _, module in walk(model))
    uses = Counter(map(id, itertools.chain.from_iterable(everywhere)))
    chosen = [place for place in chosen if uses[id(place.stored)] > 1]
    found = holders(model) if chosen else {}
    for place in chosen:
        shared = found[id(place.stored)]
        stacks = {id(other.stack) for other in shared}
        if len(stacks) > 1:
            raise StateError(
                f"{' and '.join(repr(other.path) for other in shared)} are tied, and adapters were "
                "attached to one side alone, through a part of the model; detach those, and attach "
                "to the whole"
            )


def check_whole(here: list[Site]) -> None:
    """Raise a StateError where FSDP has sharded a tensor: it keeps a copy that would stay."""
    for site in here:
        if any(is_sharded(site.module, tensor) for tensor in stored(site.plist)):
            raise StateError(
                f"{site.path!r} is sharded over processes; merge or detach before fully_shard, or "
                "save the adapter and load it where the model is whole"
            )


def check_ties(here: list[Site]) -> None:
    """Raise a StateError where a stack is also at a tensor outside of these sites."""
    count = Counter(id(site.stack) for site in here)
    for site in here:
        if len(site.stack.tied) > count[id(site.stack)]:
            raise StateError(
                f"{site.path!r} shares its adapter with a tensor outside of this module: "
                f"{', '.join(site.stack.tied)} are tied; call it on a module that holds them all"
            )
