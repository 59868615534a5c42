"""A module that hosts stacks: what it was before is kept, and given back exactly.

Note [a class for each module]
    torch's parametrize gives each host module a class of its own, with a property for each
    parametrized tensor, and changes that class when one is registered or removed. `copy.deepcopy`
    lets the copy share it: removing a parametrization on the copy then makes the original lose
    its tensor. So a host's class also gets a `__deepcopy__` that gives the copy a class of its
    own, and a host that had such a class before, perhaps shared already, gets a new one first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import StateError
from ..site.find import Site, lists, stack_of, walk
from ..site.stack import Stack
from .dense import hold_stored
from .forward import forward_for

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


def register(module: nn.Module, tensor: str, stack: Stack) -> None:
    """Put a stack at a module's tensor, behind other parametrizations that are there."""
    first, before = not _is_host(module), _before(module)
    if first:
        before.order = tuple(module._parameters)
        if parametrize.is_parametrized(module):
            before.cls, before.owner = type(module), id(module)
            module.__class__ = _copied_class(type(module))
    plist = lists(module).get(tensor)
    if plist is None:
        parametrize.register_parametrization(module, tensor, stack, unsafe=True)
        lists(module)[tensor].__class__ = SiteList
    else:
        # Not by register_parametrization: its checks would run the ones that are there.
        plist.append(stack.train(module.training))
    if first:
        inside = (child for key, child in module.named_children() if key != "parametrizations")
        alone = not any(True for child in inside for _ in child.parameters())
        _adopt(type(module), before, alone)


def unregister(site: Site) -> None:
    """Take a stack away, and with a module's last one every trace of it."""
    module, plist, before = site.module, site.plist, _before(site.module)
    if len(plist) > 1:
        del plist[list(plist).index(site.stack)]
        plist.__class__ = parametrize.ParametrizationList
    else:
        parametrize.remove_parametrizations(module, site.tensor, leave_parametrized=False)
        _reorder(module, before.order)
    if parametrize.is_parametrized(module) and not _is_host(module):
        _release(module, before)


def freeze_base(model: nn.Module, adapter: str) -> None:
    """Stop the base's parameters from requiring a gradient, on behalf of an adapter."""
    for module in _base_modules(model):
        for key, parameter in _stored_parameters(module):
            if parameter.requires_grad:
                # Whoever froze it before has been overruled since.
                _before(module).frozen[key] = {adapter}
                parameter.requires_grad_(False)
            elif key in _frozen(module):
                _frozen(module)[key].add(adapter)


def unfreeze_base(model: nn.Module, adapters: set[str] | None) -> None:
    """Give back the flags that these adapters, and no others, hold down; None means all flags."""
    for module in _base_modules(model):
        frozen = _frozen(module)
        for key, holders in list(frozen.items()):
            holders -= holders if adapters is None else adapters
            if not holders:
                del frozen[key]
                for name, parameter in _stored_parameters(module):
                    # A weight that was split since (weight_norm) has its name and more.
                    if name == key or name.startswith(key + "."):
                        parameter.requires_grad_(True)


def forget(model: nn.Module) -> None:
    """Drop what is kept of modules that no adapter holds any more."""
    for _, module in walk(model):
        if _BEFORE in vars(module) and not _frozen(module) and not _is_host(module):
            delattr(module, _BEFORE)


class SiteList(parametrize.ParametrizationList):
    """The parametrizations of a tensor whose first one is a stack, safe to register more on.

    torch hands a parametrization that is registered on top of another one a single tensor; one
    that needs several (weight_norm: g and v) would fail at the next read. It goes below the stack
    instead: the stored weight is split, and the adapters stay on top.
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
    """Return the tensors that `module` stores for the list's tensor, None where it is one."""
    if not plist.is_tensor or not hasattr(module, "right_inverse"):
        return None
    with torch.no_grad():
        try:
            parts = module.right_inverse(plist.original)  # type: ignore[operator]
        except NotImplementedError:
            return None
    return None if isinstance(parts, Tensor) else parts


def _is_host(module: nn.Module) -> bool:
    return any(stack_of(plist) is not None for plist in lists(module).values())


def _before(module: nn.Module) -> Before:
    return vars(module).setdefault(_BEFORE, Before())


def _frozen(module: nn.Module) -> dict[str, set[str]]:
    return vars(module)[_BEFORE].frozen if _BEFORE in vars(module) else {}


def _base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the base's modules but for lists of parametrizations, whose hosts speak for them."""
    for _, module in walk(model):
        if not isinstance(module, parametrize.ParametrizationList):
            yield module


def _stored_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters by name, those that its parametrizations store included."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, plist in lists(module).items():
        for key, parameter in plist._parameters.items():
            if parameter is not None:
                yield (name if key == "original" else f"{name}.{key}"), parameter


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


def _tensors(cls: type) -> set[str]:
    """Return the names of the tensors that an injected class has as properties."""
    return {key for key, value in vars(cls).items() if isinstance(value, property)}


def _adopt(cls: type, before: Before, alone: bool) -> None:
    """Give a host's own class its deepcopy, and a forward where there is one for it."""
    plain = cls.__deepcopy__  # type: ignore[attr-defined]

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        if id(self) in memo:
            return memo[id(self)]
        if isinstance(self, nn.RNNBase):
            hold_stored(self)
        copied = plain(self, memo)
        copied.__class__ = _copied_class(type(copied))
        return copied

    forward = forward_for(cls.__bases__[0], alone=alone)
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
    # The class object that was there, unless this is a copy, or more was parametrized since.
    if before.cls and before.owner == id(module) and _tensors(before.cls) == _tensors(cls):
        module.__class__ = before.cls
    before.order, before.cls, before.owner, before.replaced = (), None, 0, {}
