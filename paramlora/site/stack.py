"""The parametrization at a site: every adapter of one tensor, and which of them contribute.

    W' = aₙ(… a₂(a₁(W)))        over the active adapters that are not merged, in attaching order

A `Stack` is registered once at a tensor through `torch.nn.utils.parametrize`. It holds all state of
the adapters at that tensor.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..kinds.spec import LowRank, Rescaled
from .factors import Blocks, Factors, apply_factors
from .merged_backward import refuse_backward, trained

CHANGED = (
    "a tensor needed for the gradient was changed in place (an optimizer's step, a merge) between "
    "the forward and the backward"
)


def no_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    """Return a context that disables autocast: W' is built in the weight's dtype."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class _Built(threading.local):
    """The tensors that stacks have built inside the innermost `build_once` of this thread."""

    tensors: dict[object, Tensor] | None = None


_BUILT = _Built()


@contextmanager
def build_once() -> Iterator[None]:
    """Let each stack build W' once inside the block, which is the forward of one module.

    `parametrize.cached` is no alternative: all threads would share the tensors that one thread has
    built, perhaps under no_grad, for as long as any thread is inside.
    """
    outer, _BUILT.tensors = _BUILT.tensors, {}
    try:
        yield
    finally:
        _BUILT.tensors = outer


# Numbers adapters in attaching order, over all stacks.
_NUMBERS = itertools.count()


class Stack(nn.Module):
    """The named adapters at a site: their factors, which are active, which are merged.

    The state is kept in tuples of names in attaching order, which torch.compile can guard on.

    Attributes:
        names: all adapters here.
        active: the adapters that are switched on.
        merged: the adapters that are folded into the stored weight.
        live: the adapters that the forward has to compute: active and not merged.
        numbers: for each name the value of a counter over all stacks, which gives the order in
            which a model's adapters were attached.
        stored: while adapters are merged, the original stored tensors, in the list's order.
        written: while adapters are merged, the parameters that hold the merged weight, each with
            its version right after the merge.
        tied: the paths of the sites that share this stack, if their tensors are tied.
        route: inside `routed`, which row of a batch gets which adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleDict()
        self.numbers: dict[str, int] = {}
        self.names: tuple[str, ...] = ()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.live: tuple[str, ...] = ()
        self.stored: tuple[Tensor, ...] = ()
        self.written: tuple[tuple[weakref.ref[Tensor], int], ...] = ()
        self.tied: tuple[str, ...] = ()
        self.route: Any = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.route is not None:
            raise StateError(
                f"{self.route.paths[id(self)]!r} was read inside of routed(), where each row of a "
                "batch has a tensor of its own; read it outside, or give this adapter no rows"
            )
        if self._trains_merged():
            weight = refuse_backward(weight, self.merged)
        if not self.live:
            return weight
        built = None if torch.compiler.is_compiling() else _BUILT.tensors
        if built is None:
            return self._build(weight)
        key = self._key()
        if key not in built:
            built[key] = self._build(weight)
        return built[key]

    def _build(self, weight: Tensor) -> Tensor:
        with no_autocast(weight):
            for name in self.live:
                weight = self[name](weight)
        return weight

    def _key(self) -> object:
        """Return a key that is equal for two reads that may get the same W'.

        Without `live` and the strengths, a module whose forward toggles would read a stale W':

            def forward(self, x):
                with pl.using(self, a=0.5):
                    half = x @ self.weight.T        # builds W + 0.5·ΔW
                return half + x @ self.weight.T     # needs W + ΔW

        Without `is_grad_enabled`, a first read under no_grad would serve a later read that needs a
        gradient, and the factors would silently get none. Strengths that are tensors count by
        identity, since comparing values would wait for the GPU; like the factors, they are assumed
        not to be written to during a forward.
        """
        parts = [part for name in self.live for part in self.parts(name)]
        strengths = [id(s) if isinstance(s, Tensor) else s for s in (p.strength for p in parts)]
        return id(self), self.live, torch.is_grad_enabled(), *strengths

    def right_inverse(self, weight: Tensor) -> Tensor:
        raise NotImplementedError(
            "a tensor with adapters cannot be assigned to: write to the base with "
            "load_base_state_dict, or detach first"
        )

    def recipe(self, weight: Tensor) -> Callable[[], Tensor]:
        """Return a closure that rebuilds today's W' from `weight`, even if adapters change later.

        A layer that computes with W' does not keep it for the backward but builds it again there
        (`layers.dense`). By then the user may have switched adapters:

            with pl.using(model, "a"):
                loss = model(x).sum()       # computed with W + ΔW_a
            loss.backward()                 # here the stack's state is another

        Reading the stack in the backward would give the gradient of another function. So the
        closure keeps what defines today's W': the specs, the factors and the strengths. It keeps
        the factors themselves and not copies, which would cost memory; if one of them was written
        to since, by an optimizer's step for example, it raises the error that autograd raises for
        a saved tensor, and does not compute a wrong gradient.
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
                built = apply_factors(spec, block, built, tensors, strength)
            return built

        return build

    def low_rank(self) -> list[LowRank] | None:
        """Return the live updates in factored form; None if one of them has no such form.

        Also None if a backward has to raise, for which `forward` has to read the tensor.
        """
        if self._trains_merged():
            return None
        terms = []
        for name in self.live:
            term = self[name].low_rank()
            if term is None:
                return None
            terms.append(term)
        return terms

    def rescaled(self, weight: Tensor) -> Rescaled | None:
        """Return W' as a rescaled `weight`; None if the live adapters have no such form."""
        if self._trains_merged():
            return None
        factors = self[self.live[0]] if len(self.live) == 1 else None
        if not isinstance(factors, Factors):
            return None
        with no_autocast(weight):
            return factors.rescaled(weight)

    def _trains_merged(self) -> bool:
        """Return whether a backward has to raise: see merged_backward.py."""
        # A compiled model has one graph for merged and for switched off. So the compiler must not
        # read `merged` if no adapter is live.
        if not self.live and torch.compiler.is_compiling():
            return False
        return bool(self.merged) and trained(self[name] for name in self.merged)

    def set(self, active: Container[str], merged: Container[str]) -> None:
        """Set which adapters are active and which are merged."""
        names = tuple(self.named)
        on = tuple(name for name in names if name in active)
        # Not through nn.Module.__setattr__, which is slow: a model may have hundreds of stacks.
        vars(self).update(
            names=names,
            active=on,
            live=tuple(name for name in on if name not in merged),
            merged=tuple(name for name in names if name in merged),
        )

    def switch(self, active: Container[str]) -> None:
        """Set which adapters are active; the others stay attached, and merged ones merged."""
        on = tuple([name for name in self.names if name in active])
        live = tuple([name for name in on if name not in self.merged]) if self.merged else on
        vars(self).update(active=on, live=live)

    @property
    def named(self) -> Mapping[str, "Factors | Blocks"]:
        """The adapters here by name, in attaching order."""
        # Not through ModuleDict.__getitem__, which is slow: each layer's forward reads this.
        return self._modules["factors"]._modules  # type: ignore[union-attr, return-value]

    def __getitem__(self, name: str) -> "Factors | Blocks":
        return self._modules["factors"]._modules[name]  # type: ignore[union-attr, return-value]

    def parts(self, name: str) -> list[Factors]:
        """Return an adapter's factors: one for the whole tensor, or one for each block."""
        factors = self[name]
        return factors.parts if isinstance(factors, Blocks) else [factors]

    def add(self, name: str, factors: Factors) -> None:
        """Add an adapter and make it active; one of several blocks is added block by block."""
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
        # The original tensors are not buffers, which a state dict would contain. So they have to be
        # moved and cast here.
        super()._apply(fn, recurse)
        self.stored = tuple(fn(tensor) for tensor in self.stored)
        return self
