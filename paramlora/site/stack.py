"""The parametrization at a site: every adapter of one tensor, and which of them contribute.

    W' = aₙ(… a₂(a₁(W)))        over the active adapters that are not merged, in attaching order

A `Stack` is registered once at a tensor through `torch.nn.utils.parametrize`; all state of the
adapters at that tensor lives in it. The functions below find the stacks of a model.
"""

import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import StateError
from ..kinds.spec import LowRank, Rescaled
from .factors import Blocks, Factors, applied

CHANGED = (
    "a tensor needed for the gradient was changed in place (an optimizer's step, a merge) between "
    "the forward and the backward"
)


def exact(weight: Tensor) -> AbstractContextManager[Any]:
    """Return what keeps autocast out: a weight is a weight, whatever it wants for products."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class _Once(threading.local):
    """What stacks have built, by what they were then, inside the innermost `once` of a thread."""

    built: dict[object, Tensor] | None = None


_ONCE = _Once()


@contextmanager
def once() -> Iterator[None]:
    """Let each stack build W' once inside: for the forward of one module.

    `parametrize.cached` would let all threads share what one has built, without a gradient maybe,
    and would keep it while any of them is inside.
    """
    outer, _ONCE.built = _ONCE.built, {}
    try:
        yield
    finally:
        _ONCE.built = outer


# Numbers adapters in attaching order, over all stacks.
_NUMBERS = itertools.count()

_MODULES = operator.attrgetter("_modules")


class Stack(nn.Module):
    """The named adapters at a site: their factors, which are active, which are merged.

    `live` is what the forward has to compute: active and not merged. It and the others (`names`:
    all that are here) are tuples of names in attaching order, so that a compiled graph can be keyed
    on them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleDict()
        self.numbers: dict[str, int] = {}
        self.names: tuple[str, ...] = ()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.live: tuple[str, ...] = ()
        # While merged, the original bits of the stored tensors, in the list's order.
        self.stored: tuple[Tensor, ...] = ()
        # And which parameters have the merged weight, each as it was when that was written.
        self.written: tuple[tuple[weakref.ref[Tensor], int], ...] = ()
        # Paths of the sites that share this stack, where their tensors are tied.
        self.tied: tuple[str, ...] = ()
        # Inside of `routed`: which rows of a batch get which adapter.
        self.route: Any = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.route is not None:
            raise StateError(
                f"{self.route.paths[id(self)]!r} was read inside of routed(), where each row of a "
                "batch has a tensor of its own; read it outside, or give this adapter no rows"
            )
        if not self.live:
            return weight
        built = None if torch.compiler.is_compiling() else _ONCE.built
        if built is not None:
            key = self._key()
            if key not in built:
                built[key] = self._build(weight)
            return built[key]
        return self._build(weight)

    def _build(self, weight: Tensor) -> Tensor:
        with exact(weight):
            for name in self.live:
                weight = self[name](weight)
        return weight

    def _key(self) -> object:
        """Return what W' may serve for: toggled inside a forward, or no_grad, it is another."""
        parts = [part for name in self.live for part in self.parts(name)]
        strengths = [id(s) if isinstance(s, Tensor) else s for s in (p.strength for p in parts)]
        return id(self), self.live, torch.is_grad_enabled(), *strengths

    def right_inverse(self, weight: Tensor) -> Tensor:
        raise NotImplementedError(
            "a tensor with adapters cannot be assigned to: write to the base with "
            "load_base_state_dict, or detach first"
        )

    def recipe(self, weight: Tensor) -> Callable[[], Tensor]:
        """Return how to build W' from `weight` again as it is now, wherever adapters are by then.

        What it returns raises the RuntimeError of autograd where a tensor has changed since.
        """
        live = [factors for name in self.live for factors in self.parts(name)]
        steps = [(f.spec, f.block, dict(f.tensors), f.strength) for f in live]
        sources = [weight, *(tensor for _, _, tensors, _ in steps for tensor in tensors.values())]
        sources += [strength for *_, strength in steps if isinstance(strength, Tensor)]
        versions = [tensor._version for tensor in sources]

        @torch.no_grad()
        def build() -> Tensor:
            if [tensor._version for tensor in sources] != versions:
                raise RuntimeError(CHANGED)
            built = weight
            for spec, block, tensors, strength in steps:
                built = applied(spec, block, built, tensors, strength)
            return built

        return build

    def low_rank(self) -> list[LowRank] | None:
        """Return the live updates in factored form; None where one of them has no such form."""
        terms = []
        for name in self.live:
            term = self[name].low_rank()
            if term is None:
                return None
            terms.append(term)
        return terms

    def rescaled(self, weight: Tensor) -> Rescaled | None:
        """Return W' as the rescaled `weight`, None where what is live has no such form."""
        factors = self[self.live[0]] if len(self.live) == 1 else None
        if not isinstance(factors, Factors):
            return None
        with exact(weight):
            return factors.rescaled(weight)

    def set(self, active: Container[str], merged: Container[str]) -> None:
        """Set which adapters are active and which are merged."""
        names = tuple(self.named)
        chosen, live = in_order(names, active, merged)
        # Past nn.Module.__setattr__: a model may have hundreds of stacks.
        vars(self).update(
            names=names,
            active=chosen,
            live=live,
            merged=tuple(name for name in names if name in merged),
        )

    @property
    def named(self) -> Mapping[str, "Factors | Blocks"]:
        """The adapters here by name, in attaching order."""
        # Past ModuleDict's and its parents' own lookups: this runs in the forward of each layer.
        return self._modules["factors"]._modules  # type: ignore[union-attr, return-value]

    def __getitem__(self, name: str) -> "Factors | Blocks":
        return self._modules["factors"]._modules[name]  # type: ignore[union-attr, return-value]

    def parts(self, name: str) -> list[Factors]:
        """Return an adapter's factors here: one for the whole tensor, or one for each block."""
        own = self[name]
        return own.parts if isinstance(own, Blocks) else [own]

    def add(self, name: str, factors: Factors) -> None:
        """Add an adapter, active; one of blocks is added block by block."""
        if factors.block is None:
            self.factors[name] = factors
        else:
            if name not in self.factors:
                self.factors[name] = Blocks()
            self[name].add_module(str(factors.block), factors)
        self.numbers.setdefault(name, next(_NUMBERS))
        self.set((*self.active, name), self.merged)

    def remove(self, name: str) -> None:
        del self.factors[name], self.numbers[name]
        self.set(self.active, self.merged)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # The original bits move and are cast with the module, though they are no buffers of it.
        super()._apply(fn, recurse)
        self.stored = tuple(fn(tensor) for tensor in self.stored)
        return self


def in_order(
    names: Iterable[str], active: Container[str], merged: Container[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which of the names are active, and which of those are live, in the names' order."""
    chosen = tuple(name for name in names if name in active)
    return chosen, tuple(name for name in chosen if name not in merged)


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
