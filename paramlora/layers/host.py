"""Putting stacks at the tensors of a module, and freezing the base: what detaching gives back."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..site.find import Site, in_list, parametrization_lists, stack_of
from ..site.quantized import BELOW_HOOK, packed_tensor
from ..site.survey import Survey
from ..site.tie import Tie
from ..stack.factors import Factors
from ..stack.stack import Stack
from .host_class import BEFORE, adopt, copied_class, parametrized_tensors
from .quantized import put_below_hook
from .site_list import leave_to_torch, register_at_home, unregister_from_home


@dataclass
class Before:
    """The state of a module before the first adapter, for detach to restore.

    Attributes:
        cls: the class that another parametrization had given to the module, if any.
        owner: the id of the module that `cls` belongs to; a deep copy has another one.
        replaced: the attributes of the host's class that ours replace, None for a missing one.
        below_hook: what a hook of accelerate called at a quantized layer, if it has one.
        frozen: the names of the frozen parameters, each with the adapters that froze it.
    """

    cls: type | None = None
    owner: int = 0
    replaced: dict[str, Any] = field(default_factory=dict)
    below_hook: Any = None
    frozen: dict[str, set[str]] = field(default_factory=dict)


def register(module: nn.Module, tensor: str, stack: Stack, *, tied: bool = False) -> None:
    """Put a stack at a module's tensor, after the parametrizations that it has already.

    Args:
        module: the module that has the tensor.
        tensor: the tensor's name.
        stack: the stack.
        tied: whether the stack belongs to another module, which has the same tensor.
    """
    first, before = not _is_host(module), _before(module)
    if first and parametrize.is_parametrized(module):
        before.cls, before.owner = type(module), id(module)
        module.__class__ = copied_class(type(module))
    parametrization = Tie(stack) if tied else stack
    plist = parametrization_lists(module).get(tensor)
    if plist is None:
        register_at_home(module, tensor, parametrization)
    else:
        # register_parametrization would run the existing parametrizations to check the result.
        plist.append(parametrization.train(module.training))
    if first:
        children = (child for key, child in module.named_children() if key != "parametrizations")
        alone = not any(True for child in children for _ in child.parameters())
        before.replaced = adopt(type(module), alone, packed_tensor(module) is not None)
        before.below_hook = put_below_hook(module) if packed_tensor(module) is not None else None


def unregister(site: Site) -> None:
    """Remove a stack, and with the module's last stack everything else that `register` added."""
    module, plist, before = site.module, site.plist, _before(site.module)
    if len(plist) > 1:
        del plist[list(plist).index(in_list(plist, site.stack))]
        leave_to_torch(module, site.tensor)
    else:
        unregister_from_home(module, site.tensor)
    if not _is_host(module):
        if parametrize.is_parametrized(module):
            _release(module, before)
        before.cls, before.owner, before.replaced = None, 0, {}
        if before.below_hook is not None:
            vars(module)[BELOW_HOOK], before.below_hook = before.below_hook, None


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
    for module in _freezable(survey):
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
        if BEFORE in vars(module) and not _frozen(module) and not _is_host(module):
            delattr(module, BEFORE)


def froze_base(survey: Survey) -> bool:
    """Return whether an adapter that is attached has frozen parameters of the base."""
    return any(_frozen(module) for module in _base_modules(survey))


def frozen_by(survey: Survey) -> list[set[str]]:
    """Return for each frozen parameter, of the base or a factor, the adapters that froze it."""
    return [names for module in _freezable(survey) for names in _frozen(module).values()]


def has_traces(module: nn.Module) -> bool:
    """Return whether an adapter, here or elsewhere in the model, has left something to restore."""
    return BEFORE in vars(module)


def is_adopted(module: nn.Module) -> bool:
    """Return whether a module has a class of its own with our forward and deepcopy."""
    return BEFORE in vars(module) and bool(vars(module)[BEFORE].replaced)


def _is_host(module: nn.Module) -> bool:
    return any(stack_of(plist) is not None for plist in parametrization_lists(module).values())


def _before(module: nn.Module) -> Before:
    return vars(module).setdefault(BEFORE, Before())


def _frozen(module: nn.Module) -> dict[str, set[str]]:
    return vars(module)[BEFORE].frozen if BEFORE in vars(module) else {}


def _freezable(survey: Survey) -> Iterator[nn.Module]:
    yield from (*_base_modules(survey), *(factors for _, factors in _factors(survey)))


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


def _release(module: nn.Module, before: Before) -> None:
    """Undo `adopt` for a module that keeps parametrizations of others."""
    cls = type(module)
    for key, value in before.replaced.items():
        if value is None:
            delattr(cls, key)
        else:
            setattr(cls, key, value)
    # Restore the original class object, except in two cases. A deep copy must not get it, because
    # it belongs to another module. And it lacks the property of a tensor parametrized since.
    if (
        before.cls
        and before.owner == id(module)
        and parametrized_tensors(before.cls) == parametrized_tensors(cls)
    ):
        module.__class__ = before.cls
