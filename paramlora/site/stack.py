"""The parametrization at a site: every adapter of one tensor, and which of them contribute.

    W' = aₙ(… a₂(a₁(W)))        over the active adapters that are not merged, in attaching order

A `Stack` is registered once at a tensor through `torch.nn.utils.parametrize`; all state of the
adapters at that tensor lives in it. The functions below find the stacks of a model.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

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
