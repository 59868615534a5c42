"""Putting planned factors at their places in a model, and taking them away."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import AdapterNameError, StateError
from ..site.factors import Factors
from ..site.find import Site, stored, walk
from ..site.names import names_of
from ..site.place import Place, holders
from ..site.stack import Stack
from ..site.storage import is_sharded
from . import host
from .statistics import release


@dataclass
class Planned:
    """A tensor that is about to get an adapter, and the factors that it gets."""

    place: Place
    factors: Factors


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
