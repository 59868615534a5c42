"""Where the adapted tensors of a model are."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .factors import Factors
from .stack import Stack


def is_swapped(module: nn.Module) -> bool:
    """Return whether PEFT's A and B of a module's weight are our B and A, transposed."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Linear with a transposed weight."""
    # By name: transformers is not imported here. torch's own is Conv1d, with a small d.
    kind = parametrize.type_before_parametrizations(module)
    return any(base.__name__ == "Conv1D" for base in kind.__mro__) and hasattr(module, "nf")


_MODULES = operator.attrgetter("_modules")


class Site(NamedTuple):
    """One adapted tensor: where it is, and its stack."""

    path: str
    module: nn.Module
    tensor: str
    stack: Stack

    @property
    def plist(self) -> parametrize.ParametrizationList:
        plists = self.module._modules["parametrizations"]
        return plists._modules[self.tensor]  # type: ignore[union-attr, return-value]

    def parts(self, name: str) -> dict[str, Factors]:
        """Return an adapter's factors here by their path, which has the index of a block."""
        return {f"{self.path}{part.block or ''}": part for part in self.stack.parts(name)}


def dotted(*parts: str) -> str:
    """Return the dotted path of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return a module's lists of parametrizations by tensor name, empty where it has none."""
    # As parametrize.is_parametrized asks, but past nn.Module's __getattr__: every verb calls this.
    plists = module._modules.get("parametrizations")
    return dict(plists._modules) if isinstance(plists, nn.ModuleDict) else {}  # type: ignore[arg-type]


def stack_of(plist: nn.Module | None) -> Stack | None:
    """Return the stack in a list of parametrizations, None where there is none."""
    if plist is not None:
        for parametrization in plist._modules.values():
            if type(parametrization) is Stack:
                return parametrization
    return None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for each module of the base, parents first, each module once.

    Stacks are left out; the parametrizations of others are part of the base.
    """
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen or type(module) is Stack:
            continue
        seen.add(id(module))
        yield path, module
        if module._modules:
            before = f"{path}." if path else ""
            children = reversed(module._modules.items())
            todo += [(before + key, child) for key, child in children if child is not None]


def sites(model: nn.Module) -> list[Site]:
    """Return the adapted tensors of a model in module order; tied ones each, with one stack."""
    found = []
    for path, module in walk(model):
        if "parametrizations" not in module._modules:
            continue
        for tensor, plist in lists(module).items():
            stack = stack_of(plist)
            if stack is not None:
                found.append(Site(dotted(path, tensor), module, tensor, stack))
    return found


def first_sites(model: nn.Module) -> list[Site]:
    """Return the adapted tensors of a model in module order, tied ones once."""
    return once_each(sites(model))


def once_each(here: Iterable[Site]) -> list[Site]:
    """Return the first site of each stack."""
    first: dict[int, Site] = {}
    for site in here:
        first.setdefault(id(site.stack), site)
    return list(first.values())


def stacks(model: nn.Module) -> list[Stack]:
    """Return the stacks of a model, each once, in module order."""
    found = [
        parametrization
        for parametrization in _children(plists(model))
        if type(parametrization) is Stack
    ]
    return list(dict.fromkeys(found))


def plists(model: nn.Module) -> Iterator[nn.Module]:
    """Return the lists of parametrizations of a model in module order, some maybe twice.

    Every toggle calls this, and it takes longer than all that a toggle changes; so it takes the
    fewest steps, looks at hosts and not into them, and calls no function for a module. To remember
    what was found would save nothing: any module's children may be others by the next time, and
    to compare them all takes as long.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    todo: list[Iterator[nn.Module | None]] = [iter((model,))]
    while todo:
        for module in todo[-1]:
            if module is None:
                continue
            inner = module._modules
            if "parametrizations" in inner:
                found.append(inner["parametrizations"])  # type: ignore[arg-type]
                if len(inner) == 1:
                    continue
            if inner and id(inner) not in seen:
                seen.add(id(inner))
                rest = {**inner}
                rest.pop("parametrizations", None)
                todo.append(iter(rest.values()))
                break
        else:
            todo.pop()
    return _children(found)


def _children(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    # Loops in C throughout.
    return itertools.chain.from_iterable(map(dict.values, map(_MODULES, modules)))


def stored(plist: parametrize.ParametrizationList) -> list[Tensor]:
    """Return the tensors that a list of parametrizations stores, `original` or `original0`, …"""
    if plist.is_tensor:
        # Past nn.Module's __getattr__, which asks __dict__ and the class in vain first.
        original = plist._parameters.get("original")
        return [plist.original if original is None else original]
    return [getattr(plist, f"original{i}") for i in range(plist.ntensors)]


def below(plist: parametrize.ParametrizationList, stack: Stack | None) -> Tensor:
    """Return the base's W at the stack's place in the list: what the ones before it give."""
    values = (stack and stack.stored) or stored(plist)
    return through(before(plist, stack), values)


def before(plist: parametrize.ParametrizationList, stack: Stack | None) -> list[nn.Module]:
    """Return the parametrizations that come before a stack; all where there is none."""
    inside: list[Any] = list(plist._modules.values())
    return inside if stack is None else inside[: inside.index(stack)]


def through(parametrizations: Sequence[nn.Module], values: Sequence[Tensor]) -> Tensor:
    """Return what parametrizations, one after the other, make of the stored tensors.

    In eval mode: reading a base must not advance spectral_norm's power iteration.
    """
    for parametrization in parametrizations:
        training = parametrization.training
        parametrization.eval()
        values = (parametrization(*values),)
        parametrization.train(training)
    return values[0]
