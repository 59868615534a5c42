"""Find the adapted tensors of a model, and the tensors stored below an adapter."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..stack.factors import Factors
from ..stack.stack import Stack
from ..wrappers import check_model, inner
from .quantized import UnreadWeight, packed_shape, packed_tensor
from .tie import Tie


def is_swapped(module: nn.Module) -> bool:
    """Return whether PEFT's A and B of a module's weight are our Bᵀ and Aᵀ."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, a Linear whose weight is (in, out).

    Subclasses and copies of that class in other packages count as well, because they store the
    same.
    """
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer; transformers' Conv1D and quantized ones are."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or packed_tensor(module) is not None


def is_transformers_conv1d(cls: type[nn.Module]) -> bool:
    """Return whether a class is transformers' Conv1D itself, so that its forward is known."""
    # By name, because importing transformers takes seconds. torch's convolution is Conv1d.
    return (cls.__module__, cls.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


class Site(NamedTuple):
    """One adapted tensor: its path, its module, its name there, and its stack."""

    path: str
    module: nn.Module
    tensor: str
    stack: Stack

    @property
    def plist(self) -> parametrize.ParametrizationList:
        plists = self.module._modules["parametrizations"]
        return plists._modules[self.tensor]  # type: ignore[union-attr, return-value]

    def parts(self, name: str) -> dict[str, Factors]:
        """Return an adapter's factors by path; the path of a block ends with its index."""
        return {f"{self.path}{part.block or ''}": part for part in self.stack.parts(name)}


def dotted(*parts: str) -> str:
    """Join the parts that are not empty to a dotted path."""
    return ".".join(part for part in parts if part)


def parametrization_lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return a module's lists of parametrizations by tensor name; empty if it has none."""
    # The same test as in parametrize.is_parametrized, but without the slow nn.Module.__getattr__:
    # every verb calls this for each module.
    plists = module._modules.get("parametrizations")
    return dict(plists._modules) if isinstance(plists, nn.ModuleDict) else {}  # type: ignore[arg-type]


def stack_of(plist: nn.Module | None) -> Stack | None:
    """Return the stack in a list of parametrizations; None if it has none."""
    if plist is not None:
        for parametrization in plist._modules.values():
            if type(parametrization) is Stack:
                return parametrization
            if type(parametrization) is Tie:
                return parametrization.stack
    return None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for each module of the base, parents first, each module once.

    Stacks are left out; other parametrizations are part of the base. A wrapper, such as what
    `torch.compile` returns, is left out too: its place is taken by the module inside.
    """
    seen: set[int] = set()
    todo = [("", check_model(model))]
    while todo:
        path, module = todo.pop()
        module = inner(module)
        if id(module) in seen or type(module) in (Stack, Tie):
            continue
        seen.add(id(module))
        yield path, module
        if module._modules:
            before = f"{path}." if path else ""
            children = reversed(module._modules.items())
            todo += [(before + key, child) for key, child in children if child is not None]


def stacks_in(model: nn.Module) -> list[Stack]:
    """Return the stacks of a model, each once, in module order.

    Toggling needs no paths, and without them the traversal takes a quarter of the time of `walk`.
    """
    found: list[Stack] = []
    seen: set[int] = set()
    todo: list[nn.Module | None] = [check_model(model)]
    while todo:
        module = todo.pop()
        if type(module) is Tie:
            module = module.stack
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if type(module) is Stack:
            found.append(module)
        else:
            todo += reversed(module._modules.values())
    return found


def sites_in(modules: Iterable[tuple[str, nn.Module]]) -> list[Site]:
    """Return the adapted tensors of modules, in their order."""
    found = []
    for path, module in modules:
        if "parametrizations" not in module._modules:
            continue
        for tensor, plist in parametrization_lists(module).items():
            stack = stack_of(plist)
            if stack is not None:
                found.append(Site(dotted(path, tensor), module, tensor, stack))
    return found


def stored_tensors(plist: parametrize.ParametrizationList) -> list[Tensor]:
    """Return the tensors that a list of parametrizations stores, `original` or `original0`, …"""
    if plist.is_tensor:
        # Without nn.Module.__getattr__, which is slow.
        original = plist._parameters.get("original")
        return [plist.original if original is None else original]
    return [getattr(plist, f"original{i}") for i in range(plist.ntensors)]


def base_weight(plist: parametrize.ParametrizationList, stack: Stack | None) -> Tensor:
    """Return the base's W: the result of the parametrizations before the stack in the list.

    Of a quantized layer, an `UnreadWeight`.
    """
    shape = packed_shape(plist)
    if shape is not None:
        return UnreadWeight.of(stored_tensors(plist)[0], shape)
    values = (stack and stack.stored) or stored_tensors(plist)
    return apply_parametrizations(preceding(plist, stack), values)


def preceding(plist: parametrize.ParametrizationList, stack: Stack | None) -> list[nn.Module]:
    """Return the parametrizations that come before a stack; all if there is no stack."""
    steps = _steps(plist)
    return steps if stack is None else steps[: index_of(plist, stack)]


def index_of(plist: parametrize.ParametrizationList, stack: Stack) -> int:
    """Return the place of a stack in a list of parametrizations, or that of its tie."""
    return _steps(plist).index(in_list(plist, stack))


def in_list(plist: parametrize.ParametrizationList, stack: Stack) -> nn.Module:
    """Return the stack in a list of parametrizations, or its tie."""
    return next(p for p in _steps(plist) if p is stack or getattr(p, "stack", None) is stack)


def _steps(plist: parametrize.ParametrizationList) -> list[Any]:
    # The stored tensors of a list can be parametrized in turn, which is no step after the others.
    return [step for key, step in plist._modules.items() if key != "parametrizations"]


def apply_parametrizations(
    parametrizations: Sequence[nn.Module], values: Sequence[Tensor]
) -> Tensor:
    """Apply parametrizations, one after the other, to the stored tensors.

    They run in evaluation mode: reading a base must not advance spectral_norm's power iteration.
    """
    modes = [(module, module.training) for one in parametrizations for module in one.modules()]
    try:
        for parametrization in parametrizations:
            values = (parametrization.eval()(*values),)
    finally:  # a user's parametrization may fail, and may hold modules of either mode
        for module, mode in modes:
            module.training = mode
    return values[0]
