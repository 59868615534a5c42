"""The expected state of a model and of its adapters, in float64.

It shares no code with paramlora: it has a plain copy of the base, the factors as float64 tensors,
flags, and the formulas of the kinds. `checked_model.py` compares a model with it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import paramlora as pl
from tests.support.dense_net import (
    ADDITIVE,
    STORED,
    Net,
    call_rows,
    formula_of,
    normalised,
    scaling,
    step,
)
from tests.support.reference import parted

# Inside `routed`: for each row the name of its adapter, or None.
Route = list[str | None]
KEEP: Any = "keep"  # what `enabled` and `disabled` do to a route


@dataclass(eq=False)
class AdapterState:
    """The expected state of an adapter at one tensor.

    Assigning to `active` or `strength` sets the own state; reading gives that with the open blocks,
    `blocks`, each of which may set either. A merged adapter has its own state.

    Attributes:
        specs: the spec of each block of the tensor, by its index; "" is the whole tensor.
        factors: float64 tensors by index and key, such as "[:2].A".
    """

    specs: dict[str, Any]
    factors: dict[str, Tensor]
    own_strength: float = 1.0
    own_active: bool = True
    trainable: bool = True
    merged: bool = False
    frozen_by: set[str] = field(default_factory=set)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    before_merge: tuple[bool, float] | None = None

    def _read(self, key: str, own: Any) -> Any:
        set_by_blocks = [block[key] for block in self.blocks if key in block]
        return own if self.merged or not set_by_blocks else set_by_blocks[-1]

    @property
    def active(self) -> bool:
        return self._read("active", self.own_active)

    @active.setter
    def active(self, value: bool) -> None:
        self.own_active = value

    @property
    def strength(self) -> float:
        return self._read("strength", self.own_strength)

    @strength.setter
    def strength(self, value: float) -> None:
        self.own_strength = value

    @property
    def live(self) -> bool:
        return self.active and not self.merged

    @property
    def may_be_on(self) -> bool:
        """Whether it is on now, or may be when blocks are left."""
        return self.own_active or any(block.get("active") for block in self.blocks)

    @property
    def additive(self) -> bool:
        return all(isinstance(spec, ADDITIVE) for spec in self.specs.values())

    def merge(self) -> None:
        """Merge as it is now; this becomes the own state."""
        if self.live:
            self.before_merge = self.own_active, self.own_strength
            self.own_active, self.own_strength = True, self.strength
            self.merged = True

    def unmerge(self) -> None:
        """Take the adapter out; the own state is the earlier one if a block hides it."""
        if self.merged:
            assert self.before_merge is not None
            merged = True, self.own_strength
            self.merged = False
            self.own_active, self.own_strength = self.before_merge
            if (self.active, self.strength) != merged:
                self.own_active, self.own_strength = merged

    def scale(self, index: str) -> float:
        """The factor of the update of a block: strength times alpha/r."""
        return self.strength * scaling(self.specs[index])

    def constants(self, index: str) -> set[str]:
        """Return the keys of factors that are never trained."""
        spec = self.specs[index]
        if isinstance(spec, pl.LoRAXS):
            return {"A", "B"}
        return {"A0", "B0"} if f"{index}.A0" in self.factors else set()

    def trained(self) -> list[str]:
        """Return the keys of the factors that are trained."""
        keys = [key.rpartition(".") for key in self.factors]
        return [f"{at}.{key}" for at, _, key in keys if key not in self.constants(at)]

    def apply(self, W: Tensor, factors: dict[str, Tensor] | None = None) -> Tensor:
        """Return W' of a tensor, with these factors."""
        factors = self.factors if factors is None else factors
        for index, spec in self.specs.items():
            where = parted(index)[1]
            here = {
                key.rpartition(".")[2]: value
                for key, value in factors.items()
                if key.rpartition(".")[0] == index
            }
            new = formula_of(spec)(W[where], here, self.strength)
            W = W.clone()
            W[where] = new
        return W


@dataclass
class ReferenceModel:
    """The expected state of a model: a plain copy of its base, and its adapters.

    The key of a tied tensor is its first path; `paths` maps it to all its paths.

    Attributes:
        plain: the base, never adapted; it has the dtype of the model.
        routes: the open blocks by tensor, the innermost last: each a list of its route, None for
            no route, KEEP for that of the block around it.
        tensors: the stored tensors of the base by path.
        normed: the parametrization of each layer with a spectral_norm, by the path of the layer.
        order: the names of the adapters, in attaching order.
        holders: the adapters and blocks that hold running statistics.
        training: the mode that was requested last.
    """

    plain: Net
    paths: dict[str, list[str]]
    trained: dict[str, bool]
    adapters: dict[str, dict[str, AdapterState]]
    frozen_by: dict[str, set[str]]
    routes: dict[str, list[list[Any]]]
    tensors: dict[str, nn.Parameter]
    normed: dict[str, Any]
    order: list[str] = field(default_factory=list)
    holders: list[object] = field(default_factory=list)
    training: bool = True

    @staticmethod
    def of(plain: Net) -> "ReferenceModel":
        paths: dict[int, list[str]] = {}
        for path, parameter in plain.named_parameters(remove_duplicate=False):
            paths.setdefault(id(parameter), []).append(path.replace(STORED, "weight"))
        # Shared modules have all their tensors at both paths, in the order of the first one.
        by_first = {tied[0]: tied for tied in paths.values()}
        named = plain.named_parameters(remove_duplicate=False)
        tensors = {path.replace(STORED, "weight"): parameter for path, parameter in named}
        return ReferenceModel(
            plain,
            by_first,
            {path: tensors[path].requires_grad for path in by_first},
            {path: {} for path in by_first},
            {path: set() for path in by_first},
            {path: [] for path in by_first},
            tensors,
            {
                f"layers.{i}": layer.parametrizations["weight"][0]  # type: ignore[index]
                for i, layer in enumerate(plain.layers)
                if parametrize.is_parametrized(layer)
            },
            training=plain.training,
        )

    # ---- the base

    def key(self, path: str) -> str:
        """Return the path of the stored tensor of a site."""
        owner, _, name = path.rpartition(".")
        return f"{owner}.{STORED}" if name == "weight" and owner in self.normed else path

    def parameter(self, path: str) -> nn.Parameter:
        return self.tensors[path]

    def vectors(self, path: str) -> tuple[Tensor, Tensor] | None:
        """Return the buffers u and v of spectral_norm at a tensor, if it has them."""
        owner, _, name = path.rpartition(".")
        norm = self.normed.get(owner) if name == "weight" else None
        return None if norm is None else (norm._u, norm._v)

    @property
    def moves(self) -> bool:
        """Whether a forward may change buffers."""
        return any(isinstance(m, nn.BatchNorm1d) for m in self.plain.layers) or bool(self.normed)

    def base(self, path: str, leaf: Tensor | None = None) -> Tensor:
        """Return the base's tensor in float64."""
        stored = self.parameter(path).detach().double() if leaf is None else leaf
        vectors = self.vectors(path)
        # Copies, as the next read writes to the vectors.
        copies = [vector.to(torch.float64, copy=True) for vector in vectors or ()]
        return normalised(stored, *copies) if copies else stored

    @torch.no_grad()
    def read(self, path: str) -> None:
        """Record that a tensor is read by code that computes: spectral_norm takes a step."""
        vectors = self.vectors(path)
        if vectors is not None and self.training:
            W = self.parameter(path).double()
            for vector, new in zip(vectors, step(W, *(v.double() for v in vectors)), strict=True):
                vector.copy_(new)

    @property
    def held(self) -> bool:
        return bool(self.holders)

    # ---- what the model computes

    def route(self, path: str) -> Route | None:
        """Return the route that counts at a tensor."""
        routes = [None, *(route for (route,) in self.routes[path] if route is not KEEP)]
        return routes[-1] if any(a.live for a in self.adapters[path].values()) else None

    def is_routed(self, scope: str = "") -> bool:
        """Return whether a block with a route is open, however deep."""
        blocks = [block for path in self.inside(scope) for block in self.routes[path]]
        return any(route is not None and route is not KEEP for (route,) in blocks)

    @property
    def in_block(self) -> bool:
        """Whether a block is open at any adapted tensor."""
        return any(self.routes[path] for path in self.inside(""))

    def dense(
        self,
        path: str,
        row: int | None = None,
        leaves: dict[AdapterState, dict[str, Tensor]] | None = None,
        bases: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return W' in float64, in the order in which adapters were attached.

        Args:
            path: the tensor.
            row: the row of the batch, inside of `routed`.
            leaves: factors to differentiate by; by default the factors.
            bases: tensors to differentiate by, what the model stores: W with the merged adapters.
        """
        if bases is None:
            weight, merged = self.base(path), False
        else:
            weight, merged = self.base(path, bases[path]), True
        for name, adapter in self.adapters[path].items():
            on = adapter.live if merged else adapter.active
            if row is not None:
                on = on and name == self.route(path)[row]  # type: ignore[index]
            if on:
                weight = adapter.apply(weight, (leaves or {}).get(adapter))
        return weight

    def stored(self, path: str) -> Tensor:
        """Return the tensor that the model stores, with the merged adapters, in float64."""
        weight = self.parameter(path).detach().double()
        for adapter in self.adapters[path].values():
            if adapter.merged:
                weight = adapter.apply(weight)
        return weight

    def outputs(
        self,
        ids: Tensor,
        leaves: dict[AdapterState, dict[str, Tensor]] | None = None,
        bases: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the outputs in float64, and let buffers move as the model's do."""
        norms = [layer for layer in self.plain.layers if isinstance(layer, nn.BatchNorm1d)]
        for norm in norms:
            norm.training = self.training and not self.held
        buffers = {id(b): b.to(torch.float64, copy=True) for b in self.plain.buffers()}

        def call(path: str, layer: nn.Module, *args: Tensor) -> Any:
            keys = [key.replace(STORED, "weight") for key, _ in layer.named_parameters()]
            firsts = {f"{path}.{key}": self.firsts()[f"{path}.{key}"] for key in keys}
            for first in firsts.values():
                self.read(first)
            routed = any(self.route(first) is not None for first in firsts.values())
            states = []
            for row in range(len(ids)) if routed else [None]:
                state = {}
                for site, first in firsts.items():
                    at = None if self.route(first) is None else row
                    weight = self.dense(first, at, leaves, bases)
                    state[site.removeprefix(f"{path}.")] = weight
                state |= {k: buffers[id(b)] for k, b in layer.named_buffers() if "." not in k}
                states.append(state)
            if any(self.vectors(first) is not None for first in firsts.values()):
                return _linear(states, args[0])
            return call_rows(layer, states, args)

        found = self.plain(ids, call)
        for norm in norms:
            norm.training = self.training
            for buffer in norm.buffers():
                buffer.copy_(buffers[id(buffer)])
        return found

    # ---- names and scopes

    def all_adapters(self) -> Iterator[tuple[str, str, AdapterState]]:
        for path, by_name in self.adapters.items():
            for name, adapter in by_name.items():
                yield path, name, adapter

    def inside(self, scope: str) -> list[str]:
        """Return the adapted tensors inside of a part of the model, by their first paths."""
        return [
            path
            for path, by_name in self.adapters.items()
            if by_name and any(tied.startswith(scope) for tied in self.paths[path])
        ]

    def select(self, scope: str, names: Any) -> list[tuple[str, AdapterState]]:
        """Return the adapters, by name, that a verb on a part of the model acts on."""
        return [
            (name, adapter)
            for path in self.inside(scope)
            for name, adapter in self.adapters[path].items()
            if not names or name in names
        ]

    def names(self, scope: str = "") -> list[str]:
        found = {name for name, _ in self.select(scope, ())}
        return [name for name in self.order if name in found]

    def merged(self, scope: str = "", names: Any = ()) -> bool:
        return any(adapter.merged for _, adapter in self.select(scope, names))

    def firsts(self) -> dict[str, str]:
        """Return the key of the tensor at each path."""
        return {path: first for first, paths in self.paths.items() for path in paths}

    def out_of_order(self, scope: str, names: Any, *, merging: bool) -> bool:
        """Return whether adapters would act in another order than they were attached in.

        Merging `names` puts them below adapters that were attached earlier and are not merged;
        switching `names` on puts them above adapters that were attached later and are merged.
        """
        for path in self.inside(scope):
            here = list(self.adapters[path].items())
            for i, (name, earlier) in enumerate(here):
                for later_name, later in here[i + 1 :]:
                    if earlier.additive and later.additive:
                        continue
                    if not merging:
                        wrong = name in names and not earlier.active and later.merged
                    else:
                        chosen = self._merges(later_name, later, names)
                        apart = not self._merges(name, earlier, names) and not earlier.merged
                        wrong = chosen and apart and earlier.may_be_on
                    if wrong:
                        return True
        return False

    def _merges(self, name: str, adapter: AdapterState, names: Any) -> bool:
        return name in names if names else adapter.live

    # ---- flags

    def flag(self, path: str) -> bool:
        """Return the expected requires_grad of a tensor of the base."""
        return self.trained[path] and not self.frozen_by[path]

    def add(self, name: str, activate: str, freeze: bool) -> None:
        """Switch and freeze adapters and the base as attaching `name` does; it may be there yet."""
        self.order += [] if name in self.order else [name]
        others = [adapter for _, other, adapter in self.all_adapters() if other != name]
        for _, other, adapter in self.all_adapters():
            adapter.active = activate != "no" if other == name else adapter.own_active
        for adapter in others:
            adapter.active = adapter.own_active and activate != "only"
            if freeze and activate != "no":
                if adapter.trainable:
                    adapter.trainable, adapter.frozen_by = False, {name}
                elif adapter.frozen_by:
                    adapter.frozen_by.add(name)
        for path, trained in self.trained.items():
            if freeze and trained:
                self.frozen_by[path].add(name)

    def set_trainable(self, scope: str, names: Any, trainable: bool) -> None:
        """Train adapters or freeze them, which also holds after others are detached."""
        for _, adapter in self.select(scope, names):
            adapter.trainable = trainable
            adapter.frozen_by = adapter.frozen_by if trainable else set()

    # ---- verbs

    def toggle(self, verb: str, scope: str, names: Any, strength: float = 1.0) -> None:
        for _, adapter in self.select(scope, names):
            if verb == "scale":
                adapter.strength = strength
            else:
                adapter.active = verb.startswith("enable")

    def activate(self, scope: str, names: Any, strengths: dict[str, float]) -> None:
        for name, adapter in self.select(scope, ()):
            adapter.active = name in names or name in strengths
            adapter.strength = strengths.get(name, adapter.own_strength)

    def merge(self, scope: str, names: Any) -> None:
        for _, adapter in self.select(scope, names):
            adapter.merge()

    def unmerge(self, scope: str) -> None:
        for _, adapter in self.select(scope, ()):
            adapter.unmerge()

    def detach(self, names: Any) -> None:
        for path, by_name in self.adapters.items():
            for name in names:
                by_name.pop(name, None)
            if not by_name:
                self.routes[path] = []
        self.order = [name for name in self.order if name not in names]
        for holders in self.frozen_by.values():
            holders.difference_update(names)
        for _, _, adapter in self.all_adapters():
            if adapter.frozen_by and not adapter.frozen_by.difference(names):
                adapter.trainable = True
            adapter.frozen_by.difference_update(names)
        self.holders = [holder for holder in self.holders if holder not in names]

    def copied(self) -> "ReferenceModel":
        """Return a copy that is outside of all blocks."""
        reference = copy.deepcopy(self)
        for _, _, adapter in reference.all_adapters():
            adapter.blocks.clear()
        reference.routes = {path: [] for path in reference.paths}
        reference.holders = [holder for holder in self.holders if isinstance(holder, str)]
        return reference


def _linear(states: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    """Return the outputs of a Linear for given weights: functional_call would normalise again."""
    if len(states) == 1:
        return nn.functional.linear(x, states[0]["weight"], states[0]["bias"])
    rows = zip(x.split(1), states, strict=True)
    return torch.cat([nn.functional.linear(row, s["weight"], s["bias"]) for row, s in rows])
