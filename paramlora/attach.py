"""Attaching adapters to a model, detaching them, and which of their factors are trained.

Note [a class for each module]
    torch's parametrize gives each host module a class of its own, with a property for each
    parametrized tensor, and changes that class when one is registered or removed. `copy.deepcopy`
    lets the copy share it: removing a parametrization on the copy then makes the original lose
    its tensor. So a host's class also gets a `__deepcopy__` that gives the copy a class of its
    own, and a host that had such a class before, perhaps shared already, gets a new one first.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import Spec
from .errors import AdapterNameError, StateError
from .forward import forward_for
from .stack import Factors, Site, SiteList, Stack, sites, stack_of, stored, walk
from .summary import Summary, summary
from .targets import Place, Target, Targets, places, resolve
from .toggle import check_unmerged, names_of, select

_BEFORE = "_paramlora_before"


@dataclass
class Before:
    """What attach found at a module, for detach to give back.

    `order` is that of its own parameters. `cls` is a class that another parametrization had
    injected into module `owner`, and `replaced` the attributes of it that ours hide. `frozen` has
    the tensors that were trained, and the adapters that froze each.
    """

    order: tuple[str, ...] = ()
    cls: type | None = None
    owner: int = 0
    replaced: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, set[str]] = field(default_factory=dict)


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
) -> Summary:
    """Attach an adapter to every tensor that matches, switched on, its outputs those of the base.

    Args:
        model: any module; it keeps its classes, its code and its stored weights.
        spec: what to learn, such as `LoRA(rank=4)`, or a mapping from target to spec, of which
            the first that matches a tensor counts.
        targets: a module type (its `weight`; `nn.Linear` where nothing is given), a glob over
            dotted paths of modules (their `weight`) or tensors, a callable
            `(path, module) -> bool`, or a list of those. `*` crosses dots, and `*.fc1` also means
            an `fc1` at the top.
        name: the adapter's name; any that the model does not have yet.
        exclude: what to leave out, in the same forms.
        freeze: stop the base's parameters from requiring a gradient; `detach` gives back the
            flags that were there.
        generator: where the factors' random numbers come from; without one, torch's global CPU
            generator. The same seed gives the same factors whatever the model's device.

    Returns:
        The model's summary.

    Raises:
        TargetError: a target matches nothing, or a tensor that cannot be adapted (integer or
            packed, lazy, too few dimensions). The model is then as it was.
        AdapterNameError: the name is taken, or cannot be one.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> attach(model, LoRA(rank=2), targets="0", name="digits").trainable
    14
    """
    check_name(model, name)
    planned = [
        Planned(place, Factors(its_spec, its_spec.create(place.value.detach(), generator)))
        for place, its_spec in _once_each(model, resolve(model, spec, targets, exclude))
    ]
    install(model, planned, name, freeze)
    return summary(model)


def detach(model: nn.Module, *names: str) -> None:
    """Take adapters away, all where none is named: the exact inverse of `attach`.

    A module that has no adapter left is what it was: class, parameters with their identity, order,
    bits and requires_grad, hooks.

    Raises:
        AdapterNameError: no adapter of that name.
        StateError: an adapter is merged, or tied to a tensor outside of `model`.
    """
    chosen = select(model, names)
    check_unmerged(chosen, "detach")
    here = sites(model)
    _check_ties(here)
    remove(model, here, {name for _, its_names in chosen for name in its_names})


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
    return [
        parameter
        for stack, its_names in select(model, names)
        for name in its_names
        for parameter in stack.factors[name].parameters()
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
    holders = _holders(model)
    for plan in planned:
        shared = holders[id(_stored_at(plan.place))]
        stack = next((s for s in map(_stack_at, shared) if s is not None), None) or Stack()
        for place in shared:
            if _stack_at(place) is None:
                _register(place, stack)
        stack.tied = tuple(place.path for place in shared) if len(shared) > 1 else ()
        stack.add(name, plan.factors)
    if freeze:
        _freeze_base(model, name)


def remove(model: nn.Module, here: list[Site], names: set[str]) -> None:
    """Take the named adapters from the sites, and give back what they froze."""
    _unfreeze_base(model, names)
    for site in here:
        for name in names.intersection(site.stack.factors):
            site.stack.remove(name)
    for site in here:
        if not site.stack.factors:
            _unregister(site)
    for _, module in walk(model):
        before = vars(module).get(_BEFORE)
        if before is not None and not before.frozen and not _is_host(module):
            delattr(module, _BEFORE)


def _once_each(model: nn.Module, chosen: list[tuple[Place, Spec]]) -> Iterator[tuple[Place, Spec]]:
    """Yield the chosen places, tied ones once."""
    seen = set()
    for place, spec in chosen:
        key = id(_stored_at(place))
        if key not in seen:
            seen.add(key)
            yield place, spec


def _stored_at(place: Place) -> Tensor:
    if parametrize.is_parametrized(place.module, place.tensor):
        return stored(place.module.parametrizations[place.tensor])[0]
    return place.module._parameters[place.tensor]


def _stack_at(place: Place) -> Stack | None:
    if parametrize.is_parametrized(place.module, place.tensor):
        return stack_of(place.module.parametrizations[place.tensor])
    return None


def _holders(model: nn.Module) -> dict[int, list[Place]]:
    """Return the places of each stored parameter, by its id: more than one where it is tied."""
    holders: dict[int, list[Place]] = {}
    for place in places(model):
        holders.setdefault(id(_stored_at(place)), []).append(place)
    return holders


def _is_host(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and any(
        stack_of(plist) is not None for plist in module.parametrizations.values()
    )


def _before(module: nn.Module) -> Before:
    return vars(module).setdefault(_BEFORE, Before())


def _register(place: Place, stack: Stack) -> None:
    module, tensor = place.module, place.tensor
    first, before = not _is_host(module), _before(module)
    if first:
        before.order = tuple(module._parameters)
        if parametrize.is_parametrized(module):
            before.cls, before.owner = type(module), id(module)
            module.__class__ = _copied_class(type(module))
    if parametrize.is_parametrized(module, tensor):
        # Not by register_parametrization: its checks would run the ones that are there.
        module.parametrizations[tensor].append(stack.train(module.training))
    else:
        parametrize.register_parametrization(module, tensor, stack, unsafe=True)
        module.parametrizations[tensor].__class__ = SiteList
    if first:
        _adopt(type(module), before)


def _unregister(site: Site) -> None:
    module, plist, before = site.module, site.plist, _before(site.module)
    if len(plist) > 1:
        del plist[list(plist).index(site.stack)]
        plist.__class__ = parametrize.ParametrizationList
    else:
        parametrize.remove_parametrizations(module, site.tensor, leave_parametrized=False)
        _reorder(module, before.order)
    if parametrize.is_parametrized(module) and not _is_host(module):
        _release(module, before)


def _reorder(module: nn.Module, order: tuple[str, ...]) -> None:
    """Put a module's own parameters in the order that they had; later ones stay behind."""
    rank = {name: i for i, name in enumerate(order)}
    items = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    module._parameters.clear()
    module._parameters.update(items)


def _copied_class(cls: type) -> type:
    # See Note [a class for each module].
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, own)


def _adopt(cls: type, before: Before) -> None:
    """Give a host's own class its deepcopy, and a forward where there is one for it."""
    plain = cls.__deepcopy__

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        if id(self) in memo:
            return memo[id(self)]
        copied = plain(self, memo)
        copied.__class__ = _copied_class(type(copied))
        return copied

    forward = forward_for(cls.__bases__[0])
    added = {"__deepcopy__": deepcopy} | ({} if forward is None else {"forward": forward})
    before.replaced = {key: vars(cls).get(key) for key in added}
    for key, value in added.items():
        setattr(cls, key, value)


def _release(module: nn.Module, before: Before) -> None:
    """Take what `_adopt` added from a host that keeps parametrizations of others."""
    cls = type(module)
    for key, value in before.replaced.items():
        if value is None:
            delattr(cls, key)
        else:
            setattr(cls, key, value)
    # The class object that was there, unless a copy's or other tensors were parametrized since.
    if before.owner == id(module) and vars(before.cls).keys() == vars(cls).keys():
        module.__class__ = before.cls
    before.order, before.cls, before.owner, before.replaced = (), None, 0, {}


def _stored_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters by name, those that its parametrizations store included."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    if parametrize.is_parametrized(module):
        for name, plist in module.parametrizations.items():
            for key, parameter in plist._parameters.items():
                yield (name if key == "original" else f"{name}.{key}"), parameter


def _freeze_base(model: nn.Module, adapter: str) -> None:
    for _, module in walk(model):
        if isinstance(module, parametrize.ParametrizationList):
            continue  # its host speaks for it
        for key, parameter in _stored_parameters(module):
            frozen = vars(module)[_BEFORE].frozen if _BEFORE in vars(module) else {}
            if parameter.requires_grad or key in frozen:
                _before(module).frozen.setdefault(key, set()).add(adapter)
                parameter.requires_grad_(False)


def _unfreeze_base(model: nn.Module, adapters: set[str]) -> None:
    """Give back the flags that nobody else holds down any more."""
    for _, module in walk(model):
        frozen = vars(module)[_BEFORE].frozen if _BEFORE in vars(module) else {}
        for key, holders in list(frozen.items()):
            holders -= adapters
            if not holders:
                del frozen[key]
                for name, parameter in _stored_parameters(module):
                    # A weight that was split since (weight_norm) has its name and more.
                    if name == key or name.startswith(key + "."):
                        parameter.requires_grad_(True)


def _check_ties(here: list[Site]) -> None:
    count = Counter(id(site.stack) for site in here)
    for site in here:
        if len(site.stack.tied) > count[id(site.stack)]:
            raise StateError(
                f"{site.path!r} shares its adapter with a tensor outside of this module: "
                f"{', '.join(site.stack.tied)} are tied; detach from a module that holds them all"
            )
