"""The parametrization at a site: all adapters of one tensor, with their states.

    W' = aₙ(… a₂(a₁(W)))        over the active adapters that are not merged, in attaching order

A `Stack` is registered once at a tensor through `torch.nn.utils.parametrize`. It holds all state of
the adapters at that tensor.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import StateError
from ..kinds.spec import LowRank, Rescaled, Strength
from .built import BUILT, no_autocast
from .factors import TRACED, Blocks, Factors, apply_factors
from .merged_backward import refuse_backward, trained
from .overlay import ENTERED, UNSET, Block, State, composed, state_within
from .storage import Written

CHANGED = (
    "a tensor needed for the gradient was changed in place (an optimizer's step, a merge) between "
    "the forward and the backward"
)


# Numbers adapters in attaching order, over all stacks.
_NUMBERS = itertools.count()
# A string, because the compiler of torch 2.6 does not look other objects up in a dict.
_KEYS = (f"stack {number}" for number in itertools.count())


class Stack(nn.Module):
    """The named adapters at a site, with their factors and states (active, merged).

    The state is kept in tuples of names in attaching order, which torch.compile can guard on.
    `active`, `own` and the strengths of the factors are the stack's own, which persistent verbs
    write. To compute with, use `state()`, which includes the open blocks.

    Attributes:
        names: all adapters here.
        active: the adapters that are switched on.
        merged: the adapters that are folded into the stored weight.
        own: `active` as a `State`, with the adapters that the forward has to compute: active and
            not merged.
        numbers: for each name the value of a counter over all stacks, which gives the order in
            which a model's adapters were attached.
        stored: while adapters are merged, the original stored tensors, in the list's order.
        written: while adapters are merged, what the merge has written to each stored tensor.
        before_merge: for adapters that were merged inside a block, whether they were active and
            their strengths before.
        paused: the adapters that were active when `enabled` was set to False.
        tied: the paths of the sites that share this stack, if their tensors are tied.
        drops: whether an adapter here has dropout.
        key: identifies the stack in blocks; a deep copy has another one.
        open: the blocks that are open here, of all threads.
        traced_live, traced_route, traced_names, shared: for torch.compile, see `reflect`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleDict()
        self.numbers: dict[str, int] = {}
        self.names: tuple[str, ...] = ()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.own = State()
        self.stored: tuple[Tensor, ...] = ()
        self.written: tuple[Written, ...] = ()
        self.before_merge: dict[str, tuple[bool, list[Strength]]] = {}
        self.paused: tuple[str, ...] = ()
        self.tied: tuple[str, ...] = ()
        self.drops = False
        self.key = next(_KEYS)
        self.open: tuple[Block, ...] = ()
        self.traced_live: tuple[str, ...] = ()
        self.traced_route: Any = None
        self.traced_names: tuple[str, ...] = ()
        self.shared = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy is outside of the blocks in which it was made.
        super().__setstate__({**state, "key": next(_KEYS), "open": ()})
        self.reflect()

    def _replicate_for_data_parallel(self) -> "Stack":
        raise StateError(
            "nn.DataParallel cannot replicate a model with adapters: its replicas have no "
            "parameters and run in threads of their own, outside of the open blocks; use "
            "DistributedDataParallel, or bake the adapters first"
        )

    def state(self) -> State:
        """Return the state to compute with in this thread or task, open blocks included.

        Raises:
            StateError: see Note [blocks belong to threads] in overlay.py.
        """
        return self.traced() if is_compiling() else self.current()

    def traced(self) -> State:
        """Return the state while torch.compile traces."""
        if self.shared:
            return self.current()
        return State((), self.traced_live, self.traced_route, None)

    def current(self) -> State:
        """Return the state while torch.compile does not trace."""
        if ENTERED.get() is None and not self.open:
            return self.own
        return state_within(self)

    def seen(self) -> State:
        """Return the state in this thread or task; the own one if none of its blocks is open."""
        entered = ENTERED.get()
        blocks = [] if entered is None else entered.at(self)
        return composed(self, [b for b in blocks if entered.kept or not b.closed])  # type: ignore[union-attr]

    def reflect(self) -> None:
        """Write the state, open blocks included, to the attributes that torch.compile reads.

        A compiled model has one state for all threads. If several threads or tasks have blocks
        open, `shared` is set, and the compiler has to read the context variable of `state`.
        """
        open = [block for block in self.open if not block.closed]
        state = composed(self, open) if open else self.own
        shared = any(block.owner != open[0].owner for block in open)
        strengths: Any = state.strengths
        # Not all adapters, of which there may be hundreds: the others have their own strength.
        for name in {*self.traced_names, *strengths} & self.named.keys():
            for part in self.parts(name):
                part.trace_strength(strengths.get(name))
        reflected = {"traced_live": state.live, "traced_route": state.route, "shared": shared}
        vars(self).update(reflected, traced_names=tuple(strengths))

    def put_open(self, blocks: tuple[Block, ...]) -> None:
        """Set the blocks that are open here."""
        vars(self)["open"] = blocks
        self.reflect()

    def forward(self, weight: Tensor) -> Tensor:
        state = self.state()
        if state.route is not None:
            return state.route.stand_in(self, weight)
        built = None if torch.compiler.is_compiling() else BUILT.tensors
        if built is not None and self._trains_merged(state):
            weight = refuse_backward(weight, self.merged)
        if not state.live:
            return weight
        if built is None:
            return self.build(weight, state)
        strengths = [strength for _, strength in self._steps(state)]
        key = self._key(state, strengths)
        if key not in built:
            # The entry holds strengths that are tensors, so that no other tensor gets their ids.
            built[key] = self.build(weight, state), strengths
        return built[key][0]

    def build(self, weight: Tensor, state: State, names: Iterable[str] | None = None) -> Tensor:
        """Return W' with these adapters; by default with all that are live."""
        with no_autocast(weight):
            for name in state.live if names is None else names:
                weight = self[name](weight, self._strength(name, state))
        return weight

    @staticmethod
    def _strength(name: str, state: State) -> Strength | None:
        return TRACED if state.strengths is None else state.strengths.get(name)

    def _key(self, state: State, strengths: Sequence[Strength]) -> object:
        """Return a key that is equal for two reads that may get the same W'.

        Without `live` and the strengths, a module whose forward toggles would read a stale W':

            def forward(self, x):
                with pl.using(self, a=0.5):
                    half = x @ self.weight.T        # builds W + 0.5·ΔW
                return half + x @ self.weight.T     # needs W + ΔW

        Without `is_grad_enabled`, a first read under no_grad would serve a later read that needs a
        gradient, and the factors would silently get none. `id(self)` is there because the cache
        serves all stacks that a module's forward reads. Strengths that are tensors are compared by
        identity, because comparing values would wait for the GPU. Writing to them, or to the
        factors, during a forward is not supported.
        """
        compared = [id(s) if isinstance(s, Tensor) else s for s in strengths]
        return id(self), state.live, torch.is_grad_enabled(), *compared

    def _steps(self, state: State) -> list[tuple[Factors, Strength]]:
        """Return the live factors in order, each with its strength."""
        return [
            (part, part.at(self._strength(name, state)))
            for name in state.live
            for part in self.parts(name)
        ]

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
            loss.backward()                 # here the stack has another state

        Reading the stack in the backward would give the gradient of another function. So the
        closure keeps the specs, the factors and the strengths of today's W'. It keeps no copies of
        the factors, which would cost memory. If a factor has changed since, for example by an
        optimizer's step, the closure raises the error that autograd raises for a saved tensor.
        Otherwise the gradient would be wrong.
        """
        live = self._steps(self.state())
        steps = [(f.spec, f.block, dict(f.tensors), strength) for f, strength in live]
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

    def low_rank(self, state: State) -> list[LowRank] | None:
        """Return the live updates in factored form; None if one of them has no such form.

        Also None if a backward has to raise, for which `forward` has to read the tensor.
        """
        # Written for small layers, which feel every call.
        if (self.merged if state.live else True) and self._trains_merged(state):
            return None
        terms, named = [], self._modules["factors"]._modules  # type: ignore[union-attr]
        for name in state.live:
            factors: Any = named[name]
            if state.strengths is UNSET:
                term = factors.low_rank()
            else:
                term = factors.low_rank(self._strength(name, state))
            if term is None:
                return None
            terms.append(term)
        return terms

    def dropped(self, state: State) -> tuple[State, list[tuple[LowRank, float]]]:
        """Return the state without the adapters that have dropout, and their updates with it.

        Raises:
            StateError: a live adapter rescales the weight after one with dropout was added to it.
        """
        rest, terms, first = [], [], None
        # Plain loops, because torch 2.6 does not compile generators here.
        for name in state.live:
            parts = self.parts(name)
            drops = [part.spec.dropout for part in parts]
            if not any(drops):
                rest.append(name)
                if first is not None and not self.commute(first, name):
                    raise StateError(
                        f"adapter {name!r} acts on the update of {first!r}, whose dropout is on "
                        f"the input of the layer: attach {name!r} first, or train one of them only"
                    )
                continue
            first = first or name
            strength = self._strength(name, state)
            terms += [(part.low_rank(strength), p) for part, p in zip(parts, drops, strict=True)]
        return State(state.active, tuple(rest), state.route, state.strengths), terms  # type: ignore[return-value]

    def rescaled(self, weight: Tensor, state: State) -> Rescaled | None:
        """Return W' as a rescaled `weight`; None if the live adapters have no such form."""
        if self._trains_merged(state):
            return None
        factors = self[state.live[0]] if len(state.live) == 1 else None
        if not isinstance(factors, Factors):
            return None
        with no_autocast(weight):
            return factors.rescaled(weight, self._strength(state.live[0], state))

    def _trains_merged(self, state: State) -> bool:
        """Return whether a backward has to raise: see merged_backward.py."""
        # A compiled model has one graph for merged and for switched off. So the compiler must not
        # read `merged` if no adapter is live.
        if not state.live and torch.compiler.is_compiling():
            return False
        return bool(self.merged) and trained(self[name] for name in self.merged)

    def set(self, active: Container[str], merged: Container[str]) -> None:
        """Set the active and the merged adapters."""
        names = tuple(self.named)
        merged = tuple(name for name in names if name in merged)
        drops = any(part.spec.dropout for name in names for part in self.parts(name))
        # Not through nn.Module.__setattr__, which is slow: a model may have hundreds of stacks.
        vars(self).update(names=names, merged=merged, drops=drops)
        self.switch(active)

    def switch(self, active: Container[str]) -> None:
        """Set the active adapters. The others stay attached, and merged adapters stay merged."""
        on = tuple([name for name in self.names if name in active])
        live = tuple([name for name in on if name not in self.merged]) if self.merged else on
        vars(self).update(active=on, own=State(on, live))
        if self.open:
            self.reflect()
        else:
            vars(self).update(traced_live=live, traced_route=None)

    def set_strengths(self, strengths: Mapping[str, Strength]) -> None:
        """Set the own strengths of adapters here, which open blocks may override."""
        for name, strength in strengths.items():
            for part in self.parts(name):
                part.set_strength(strength)
        if self.open:
            self.reflect()

    @property
    def enabled(self) -> bool:
        """Whether an adapter is active here; assign to it to switch all off, and on again.

        Raises:
            StateError: an adapter is merged.
        """
        return bool(self.active)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if type(value) is not bool:
            raise TypeError(f"enabled is True or False, got {value!r}")
        if self.merged:
            raise StateError(f"adapter {self.merged[0]!r} is merged; unmerge first")
        if self.enabled and not value:
            vars(self)["paused"] = self.active
            self.switch(())
        elif value and not self.enabled:
            self.switch({*self.paused} & {*self.names} or self.names)

    def fold(self, names: Iterable[str]) -> None:
        """Record that adapters were merged, as they are now.

        If a block has switched them on or set their strength, that is in the stored weight from
        now on. So it becomes the stack's own state, and outlasts the block.
        """
        state = self.seen()
        for name in names:
            parts = self.parts(name)
            if name not in self.active or name in state.strengths:  # type: ignore[operator]
                self.before_merge[name] = name in self.active, [part.strength for part in parts]
                for part in parts:
                    part.set_strength(part.at(state.strengths.get(name)))  # type: ignore[union-attr]
        self.set((*self.active, *names), (*self.merged, *names))

    def unfold(self) -> None:
        """Record that no adapter is merged any more.

        What a block had changed is undone if the block is still open, for then it has its effect
        again. Otherwise it stays, since unmerging must not change what the model computes.
        """
        folded = {name: [p.strength for p in self.parts(name)] for name in self.before_merge}
        before, self.before_merge = self.before_merge, {}
        self._put(before)
        self.set([n for n in self.active if before.get(n, (True,))[0]], ())
        state = self.seen()
        lost = {
            name: (True, strengths)
            for name, strengths in folded.items()
            if name not in state.live
            or [part.at(self._strength(name, state)) for part in self.parts(name)] != strengths
        }
        self._put(lost)
        self.switch([*self.active, *lost])

    def _put(self, states: Mapping[str, tuple[bool, list[Strength]]]) -> None:
        for name, (_, strengths) in states.items():
            for part, strength in zip(self.parts(name), strengths, strict=True):
                part.set_strength(strength)

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

    def commute(self, first: str, second: str) -> bool:
        """Return whether W' is independent of the order in which two adapters act."""
        return all(part.spec.additive for name in (first, second) for part in self.parts(name))

    def add(self, name: str, factors: Factors) -> None:
        """Add an adapter and make it active. Call it once per block if it has several blocks."""
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
