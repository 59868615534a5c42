"""Modules that host stacks: their classes, and their earlier state for `detach`.

Note [a class for each module]
    `parametrize` gives each host module a class of its own, a subclass of the module's class with
    one property for each parametrized tensor. It changes that class whenever a parametrization is
    registered or removed. `copy.deepcopy` copies the module but not the class, so two modules
    share it afterwards:

        other = copy.deepcopy(layer)                                 # type(other) is type(layer)
        parametrize.remove_parametrizations(other, "weight")         # deletes the shared property
        layer.weight                                                 # AttributeError

    Two things prevent this. The host's class gets a `__deepcopy__` that gives each copy a class of
    its own (`_adopt`). If another parametrization gave the module its class, the module may share
    that class with a copy already. Then it first gets a copy of the class (`register`), and
    `unregister` restores the earlier class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import StateError
from ..site.factors import Factors
from ..site.find import Site, parametrization_lists, stack_of
from ..site.stack import Stack
from ..site.survey import Survey
from .dense import hold_stored
from .describe import with_adapters
from .forward import forward_for

_BEFORE = "_paramlora_before"


@dataclass
class Before:
    """The state of a module before the first adapter, for detach to restore.

    Attributes:
        order: the names of the module's own parameters, in their order.
        cls: the class that another parametrization had given to the module, if any.
        owner: the id of the module that `cls` belongs to; a deep copy has another one.
        replaced: the attributes of the host's class that ours replace, None for a missing one.
        frozen: the names of the frozen parameters, each with the adapters that froze it.
    """

    order: tuple[str, ...] = ()
    cls: type | None = None
    owner: int = 0
    replaced: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, set[str]] = field(default_factory=dict)


def register(module: nn.Module, tensor: str, stack: Stack) -> None:
    """Put a stack at a module's tensor, after the parametrizations that it has already."""
    first, before = not _is_host(module), _before(module)
    if first:
        before.order = tuple(module._parameters)
        if parametrize.is_parametrized(module):
            before.cls, before.owner = type(module), id(module)
            module.__class__ = copied_class(type(module))
    plist = parametrization_lists(module).get(tensor)
    if plist is None:
        parametrize.register_parametrization(module, tensor, stack, unsafe=True)
        parametrization_lists(module)[tensor].__class__ = SiteList
    else:
        # register_parametrization would run the existing parametrizations to check the result.
        plist.append(stack.train(module.training))
    if first:
        children = (child for key, child in module.named_children() if key != "parametrizations")
        alone = not any(True for child in children for _ in child.parameters())
        _adopt(type(module), before, alone)


def unregister(site: Site) -> None:
    """Remove a stack, and with the module's last stack everything else that `register` added."""
    module, plist, before = site.module, site.plist, _before(site.module)
    if len(plist) > 1:
        del plist[list(plist).index(site.stack)]
        plist.__class__ = parametrize.ParametrizationList
    else:
        parametrize.remove_parametrizations(module, site.tensor, leave_parametrized=False)
        _reorder(module, before.order)
    if parametrize.is_parametrized(module) and not _is_host(module):
        _release(module, before)


def freeze_rest(survey: Survey, adapter: str, others: bool) -> None:
    """Freeze the base, and other adapters if `others`, and record the adapter that froze them."""
    rest = (factors for name, factors in _factors(survey) if others and name != adapter)
    for module in (*_base_modules(survey), *rest):
        for key, parameter in _stored_parameters(module):
            if parameter.requires_grad:
                # If an adapter froze it earlier, the user has unfrozen it since.
                _before(module).frozen[key] = {adapter}
                parameter.requires_grad_(False)
            elif key in _frozen(module):
                _frozen(module)[key].add(adapter)


def keep_frozen(factors: Factors) -> None:
    """Stop an adapter's factors from training, also after the adapters that froze it are gone."""
    factors.requires_grad_(False)
    _frozen(factors).clear()


def unfreeze_rest(survey: Survey, adapters: set[str] | None) -> None:
    """Unfreeze what only these adapters froze; None unfreezes all of it."""
    for module in (*_base_modules(survey), *(factors for _, factors in _factors(survey))):
        frozen = _frozen(module)
        for key, holders in list(frozen.items()):
            holders -= holders if adapters is None else adapters
            if not holders:
                del frozen[key]
                for name, parameter in _stored_parameters(module):
                    # weight_norm, registered since, has split `weight` into `weight.original0`, …
                    if name == key or name.startswith(key + "."):
                        parameter.requires_grad_(True)


def forget(survey: Survey) -> None:
    """Drop the saved state of modules that host no adapter and have nothing frozen."""
    for _, module in (*survey.modules, *_factors(survey)):
        if _BEFORE in vars(module) and not _frozen(module) and not _is_host(module):
            delattr(module, _BEFORE)


def froze_base(survey: Survey) -> bool:
    """Return whether an adapter that is attached has frozen parameters of the base."""
    return any(_frozen(module) for module in _base_modules(survey))


def has_traces(module: nn.Module) -> bool:
    """Return whether an adapter, here or elsewhere in the model, has left something to restore."""
    return _BEFORE in vars(module)


class SiteList(parametrize.ParametrizationList):
    """The parametrizations of a tensor whose first one is a stack; more can be registered on it.

    torch calls a parametrization on top of another one with a single tensor. A parametrization of
    several tensors, such as weight_norm with g and v, would fail there at the next read. So it is
    put below the stack: the stored weight is split, and the adapters stay on top.
    """

    def append(self, module: nn.Module) -> "SiteList":
        parts = _several(module, self)
        if parts is None:
            return super().append(module)
        stack = stack_of(self)
        if stack is not None and stack.merged:
            raise StateError(
                f"{type(module).__name__} cannot take over a tensor into which adapter "
                f"{stack.merged[0]!r} is merged; unmerge first"
            )
        requires_grad = self.original.requires_grad
        del self.original
        for i, part in enumerate(parts):
            self.register_parameter(f"original{i}", nn.Parameter(part, requires_grad))
        self.is_tensor, self.ntensors = False, len(parts)
        self.insert(0, module)
        return self


def _several(module: nn.Module, plist: SiteList) -> Sequence[Tensor] | None:
    """Return the tensors into which `module` splits the list's tensor; None if it does not."""
    if not plist.is_tensor or not hasattr(module, "right_inverse"):
        return None
    with torch.no_grad():
        try:
            parts = module.right_inverse(plist.original)  # type: ignore[operator]
        except NotImplementedError:
            return None
    return None if isinstance(parts, Tensor) else parts


def is_adopted(module: nn.Module) -> bool:
    """Return whether a module has a class of its own with our forward and deepcopy."""
    return _BEFORE in vars(module) and bool(vars(module)[_BEFORE].replaced)


def _is_host(module: nn.Module) -> bool:
    return any(stack_of(plist) is not None for plist in parametrization_lists(module).values())


def _before(module: nn.Module) -> Before:
    return vars(module).setdefault(_BEFORE, Before())


def _frozen(module: nn.Module) -> dict[str, set[str]]:
    return vars(module)[_BEFORE].frozen if _BEFORE in vars(module) else {}


def _base_modules(survey: Survey) -> Iterator[nn.Module]:
    """Yield the base's modules except lists of parametrizations, which belong to their hosts."""
    for _, module in survey.modules:
        if not isinstance(module, parametrize.ParametrizationList):
            yield module


def _factors(survey: Survey) -> Iterator[tuple[str, Factors]]:
    """Yield the factors of all adapters, each with the adapter's name."""
    for stack in survey.stacks:
        for name in stack.named:
            yield from ((name, factors) for factors in stack.parts(name))


def _stored_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters by name, including those that its parametrizations store."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, plist in parametrization_lists(module).items():
        # What a list stores can be parametrized in turn.
        for key, parameter in _stored_parameters(plist):
            yield (name if key == "original" else f"{name}.{key}"), parameter


def _reorder(module: nn.Module, order: tuple[str, ...]) -> None:
    """Restore the order of a module's own parameters; parameters added since come last.

    Removing a parametrization registers the tensor anew, at the end: (weight, bias) becomes
    (bias, weight), and an optimizer state that is matched by position would be mixed up.
    """
    rank = {name: i for i, name in enumerate(order)}
    items = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    module._parameters.clear()
    module._parameters.update(items)


def copied_class(cls: type) -> type:
    """Return a class with the same bases and attributes: see Note [a class for each module]."""
    copied = {key: value for key, value in vars(cls).items() if key not in _NOT_COPIED}
    return type(cls.__name__, cls.__bases__, copied)


# The descriptors that every class gets anew.
_NOT_COPIED = ("__dict__", "__weakref__")


def _tensors(cls: type) -> set[str]:
    """Return the names of the parametrized tensors, which are properties of the host's class."""
    return {key for key, value in vars(cls).items() if isinstance(value, property)}


def _adopt(cls: type, before: Before, alone: bool) -> None:
    """Give a host's own class its deepcopy, and an adapted forward if there is one for it.

    Without this `__deepcopy__` the copy shares the class: see Note [a class for each module].
    torch's `__deepcopy__` (`plain`) copies the module first. Then the copy gets a copy of the
    class. This class has the new `__deepcopy__` as well, so copies of copies are independent, too.
    """
    plain = cls.__deepcopy__  # type: ignore[attr-defined]

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        if id(self) in memo:
            return memo[id(self)]
        if isinstance(self, nn.RNNBase):
            # Its list of weights may hold a W' with a graph, which cannot be copied.
            hold_stored(self)
        copied = plain(self, memo)
        copied.__class__ = copied_class(type(copied))
        return copied

    forward = forward_for(cls.__bases__[0], alone=alone)
    show: Any = cls.__repr__
    added = {"__deepcopy__": deepcopy, "__repr__": with_adapters(show)}
    added |= {} if forward is None else {"forward": forward}
    before.replaced = {key: vars(cls).get(key) for key in added}
    for key, value in added.items():
        setattr(cls, key, value)


def _release(module: nn.Module, before: Before) -> None:
    """Undo `_adopt` for a module that keeps parametrizations of others."""
    cls = type(module)
    for key, value in before.replaced.items():
        if value is None:
            delattr(cls, key)
        else:
            setattr(cls, key, value)
    # Restore the original class object, except in two cases. A deep copy must not get it, because
    # it belongs to another module. And it lacks the property of a tensor parametrized since.
    if before.cls and before.owner == id(module) and _tensors(before.cls) == _tensors(cls):
        module.__class__ = before.cls
    before.order, before.cls, before.owner, before.replaced = (), None, 0, {}
