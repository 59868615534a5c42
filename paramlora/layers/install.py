"""Install planned factors at their places in a model, and remove them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import AdapterNameError, StateError
from ..site.find import Site, stored_tensors
from ..site.names import check_names, check_not_routed
from ..site.place import Place
from ..site.survey import Survey
from ..stack.factors import Factors
from ..stack.stack import Stack
from ..stack.storage import is_sharded
from ..wrappers import check_not_peft, check_not_synchronized
from . import host
from .host import keep_frozen as keep_frozen
from .statistics import is_held, release


@dataclass
class PlannedSite:
    """A tensor that is about to get an adapter, and its factors."""

    place: Place
    factors: Factors


def check_valid_name(name: str) -> None:
    """Raise an AdapterNameError if an adapter cannot have this name in any model."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(
            f"{name!r} cannot be an adapter's name: it must be a string, not empty, without a "
            "dot, and not an attribute of nn.ModuleDict"
        )


def check_name(survey: Survey, name: str) -> None:
    """Raise an AdapterNameError if a new adapter cannot have this name, or no adapter can be added.

    Raises:
        StateError: this is inside of `routed`, which would ignore the new adapter.
    """
    check_valid_name(name)
    check_not_synchronized(survey.model)
    check_not_peft(survey.modules)
    check_not_routed(survey.stacks, "attach an adapter")
    taken = survey.names
    if name in taken:
        raise AdapterNameError(
            f"an adapter {name!r} is attached already (there are {', '.join(map(repr, taken))}); "
            "choose another name=, or detach it first"
        )


def install(
    survey: Survey, planned: list[PlannedSite], name: str, freeze: bool, others: bool = True
) -> None:
    """Put new factors at their places; freeze the base, and other adapters unless told not to.

    Everything was checked before: no user input can make this fail half-way.
    """
    for plan in planned:
        tied = survey.holders[id(plan.place.stored)]
        stack = next((place.stack for place in tied if place.stack is not None), None)
        for place in tied:
            if stack is None:
                stack = Stack()
                host.register(place.module, place.tensor, stack)
            elif place.stack is None:
                host.register(place.module, place.tensor, stack, tied=True)
        assert stack is not None
        stack.tied = tuple(place.path for place in tied) if len(tied) > 1 else ()
        stack.add(name, plan.factors)
    if freeze:
        host.freeze_rest(survey, name, others)


def remove(survey: Survey, names: set[str] | None = None) -> None:
    """Remove the named adapters, and restore the requires_grad flags that they cleared.

    None removes all adapters, and everything else that adapters have stored at the modules. An
    adapter that was detached from a part of the model only may have left flags cleared.
    """
    host.unfreeze_rest(survey, names)
    release(survey.modules, names)
    for stack in survey.stacks:
        for name in stack.names:
            if names is None or name in names:
                stack.remove(name)
    for site in survey.sites:
        if not site.stack.factors:
            host.unregister(site)
    host.forget(survey)


def check_attached(survey: Survey) -> None:
    """Raise a StateError if a model has no adapters, and none has left anything to restore.

    After `detach(model.fc)` the rest of the model may still be frozen for that adapter.
    """
    if not any(host.has_traces(module) or is_held(module) for _, module in survey.modules):
        check_names(survey.stacks, ())


def check_tied(survey: Survey, chosen: Iterable[Place]) -> None:
    """Raise a StateError if a chosen tensor is tied and only one side of the tie has adapters."""
    for place in chosen:
        tied = survey.holders[id(place.stored)]
        if len({id(other.stack) for other in tied}) > 1:
            raise StateError(
                f"{' and '.join(repr(other.path) for other in tied)} are tied, and adapters were "
                "attached to one side alone, through a part of the model; detach those, and attach "
                "to the whole"
            )


def check_whole(sites: Iterable[Site]) -> None:
    """Raise a StateError if FSDP has sharded a tensor.

    FSDP keeps its own copy of the module's parameters, which the call would not change.
    """
    for site in sites:
        if any(is_sharded(site.module, tensor) for tensor in stored_tensors(site.plist)):
            raise StateError(
                f"{site.path!r} is sharded over processes; merge or detach before fully_shard, or "
                "save the adapter and load it where the model is whole"
            )


def check_ties(sites: Iterable[Site]) -> None:
    """Raise a StateError if a stack is also at a tensor outside of these sites."""
    sites = list(sites)
    count = Counter(id(site.stack) for site in sites)
    for site in sites:
        if len(site.stack.tied) > count[id(site.stack)]:
            raise StateError(
                f"{site.path!r} shares its adapter with a tensor outside of this module: "
                f"{', '.join(site.stack.tied)} are tied; call it on a module that holds them all"
            )
