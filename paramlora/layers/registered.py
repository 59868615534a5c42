"""Stacks that were registered by torch's own function, and not by `attach`.

    update = LoRA(rank=2).parametrization(layer.weight)
    parametrize.register_parametrization(layer, "weight", update)

The layer computes with W' at once, for a stack is a parametrization like any other. What `attach`
does besides, such as the adapted forward, needs the module, which torch does not hand to the stack.
The first verb that looks at the whole model does it (`claim`): it takes the stack out of torch's
list and registers it as `attach` would. Parameters keep their identity.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import AdapterNameError, TargetError
from ..kinds.spec import Spec, makes_parametrizations
from ..site.find import parametrization_lists, stored_tensors
from ..site.quantized import is_wrapper
from ..site.survey import before_survey
from ..stack.factors import Factors
from ..stack.stack import Stack
from ..stack.storage import is_sharded
from . import host
from .install import check_valid_name


@makes_parametrizations
def parametrization(
    spec: Spec, weight: Tensor, name: str, generator: torch.Generator | None
) -> Stack:
    """Return a new stack with one adapter: see `Spec.parametrization`."""
    check_valid_name(name)
    reason = "it is quantized; use attach" if is_wrapper(weight) else spec.refusal(weight)
    if reason is not None:
        raise TargetError(f"cannot adapt a tensor of shape {tuple(weight.shape)}: {reason}")
    if spec.dropout:
        raise TargetError(
            "dropout acts on the input of a layer, which a parametrization does not see; attach "
            "the adapter by attach(), or use dropout=0"
        )
    stack = Stack()
    stack.add(name, Factors(spec, spec.create(weight.detach(), generator)))
    return stack


@before_survey
def claim(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Register as `attach` does the stacks that torch has registered.

    Raises:
        AdapterNameError: two stacks at one tensor have an adapter of the same name.
    """
    todo = [
        (module, found)
        for path, module in modules
        if "parametrizations" in module._modules
        and (found := _unclaimed(module, f"{path}." if path else ""))
    ]
    for module, tensors in todo:
        _claim(module, tensors)


def _unclaimed(module: nn.Module, before: str) -> list[str]:
    """Return the tensors of a module with a stack that `attach` does not know."""
    found = []
    for tensor, plist in parametrization_lists(module).items():
        stacks = [one for one in plist._modules.values() if type(one) is Stack]
        names = [name for stack in stacks for name in stack.named]
        if len(set(names)) < len(names):
            raise AdapterNameError(
                f"{before + tensor!r} has two adapters of one name among {', '.join(names)}; pass "
                "another name= to parametrization()"
            )
        if any(is_sharded(plist, stored) for stored in stored_tensors(plist)):
            continue  # FSDP has noted where the parameter is; the stack works there, too
        torchs = type(plist) is parametrize.ParametrizationList and len(plist) == 1
        if len(stacks) > 1 or (stacks and (torchs or not host.is_adopted(module))):
            found.append(tensor)
    return found


def _claim(module: nn.Module, tensors: list[str]) -> None:
    # A deep copy that torch made shares its class with the original, and removing would change it.
    module.__class__ = host.copied_class(type(module))
    taken = {tensor: _take(module, tensor) for tensor in tensors}
    for tensor, (stack, index) in taken.items():
        host.register(module, tensor, stack)
        plist: Any = parametrization_lists(module)[tensor]
        # The stack goes back to its position, from the end of the list.
        ordered = list(plist._modules.values())
        ordered.insert(index, ordered.pop())
        plist._modules.update({str(i): one for i, one in enumerate(ordered)})


def _take(module: nn.Module, tensor: str) -> tuple[Stack, int]:
    """Take the stacks out of a list of parametrizations, as one; return it and its position."""
    plist: Any = parametrization_lists(module)[tensor]
    at = [i for i, one in enumerate(plist) if type(one) is Stack]
    stack, *others = [plist[i] for i in at]
    for other in others:
        active = [name for name in other.named if name in other.active]
        for name in other.named:
            for part in other.parts(name):
                stack.add(name, part)
        stack.switch({*stack.active} - {*other.named} | {*active})
    if len(plist) > len(at):
        for i in reversed(at):
            del plist[i]
        return stack, at[0]
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    # torch puts the parameter last. Where it was is lost, but weights come first in torch's layers.
    if "weight" in tensor:
        rest = {key: value for key, value in module._parameters.items() if key != tensor}
        parameter = module._parameters[tensor]
        module._parameters.clear()
        module._parameters.update({tensor: parameter, **rest})
    return stack, 0
