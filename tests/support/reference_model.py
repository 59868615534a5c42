"""A model of mixed layers, and a dense reference of it and of its adapters.

The reference shares no code with paramlora: it has a plain copy of the base, the factors as float64
tensors, and flags. A `CheckedModel` is a model with its reference; `check` compares all that can be
seen of the two.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import paramlora as pl


class Bare(nn.Module):
    """A module with a bare parameter of three dimensions, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2, 2) / 2)
        self.shift = nn.Buffer(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.flatten(1) + self.shift


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv2d(1, 2, 3, padding=1),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "norm": lambda: nn.LayerNorm(4),
    "bare": Bare,
}


class Net(nn.Module):
    """An embedding, residual layers, and a head."""

    def __init__(self, layers: list[str], tied: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4, padding_idx=1)
        self.layers = nn.ModuleList(LAYERS[layer]() for layer in layers)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            if isinstance(layer, nn.LSTM):
                x = x + layer(x)[0]
            elif isinstance(layer, nn.MultiheadAttention):
                x = x + layer(x, x, x)[0]
            elif isinstance(layer, nn.Conv2d):
                x = x + layer(x.unsqueeze(1)).sum(1)
            else:
                x = x + layer(x)
        return self.head(x)


@dataclass(eq=False)
class AdapterState:
    """The expected state of an adapter at one tensor.

    Assigning to `active` or `strength` sets the own state; reading gives that with the open blocks,
    `blocks`, each of which may set either. A merged adapter has its own state.
    """

    spec: pl.kinds.Spec
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

    def merge(self) -> None:
        """Merge as it is now; this becomes the own state."""
        if self.active and not self.merged:
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

    @property
    def scale(self) -> float:
        """The factor of the update: strength times alpha/r."""
        if not isinstance(self.spec, pl.LoRA):
            return self.strength
        rank = self.spec.rank
        alpha = rank if self.spec.alpha is None else self.spec.alpha
        return self.strength * alpha / (math.sqrt(rank) if self.spec.rank_stabilized else rank)

    def update(self, factors: dict[str, Tensor]) -> Tensor:
        if isinstance(self.spec, pl.LoRA):
            return self.scale * (factors["B"] @ factors["A"])
        return self.scale * factors["D"]


@dataclass
class ReferenceModel:
    """The expected state of a model: a plain copy of its base, and its adapters.

    The key of a tied tensor is its first path; `paths` maps it to all its paths.
    """

    plain: nn.Module
    paths: dict[str, list[str]]
    trained: dict[str, bool]
    adapters: dict[str, dict[str, AdapterState]]
    frozen_by: dict[str, set[str]]
    fingerprint: str = ""
    training: bool = True

    @staticmethod
    def of(plain: nn.Module) -> "ReferenceModel":
        paths: dict[int, list[str]] = {}
        for path, parameter in plain.named_parameters(remove_duplicate=False):
            paths.setdefault(id(parameter), []).append(path)
        firsts = [tied[0] for tied in paths.values()]
        trained = {path: plain.get_parameter(path).requires_grad for path in firsts}
        reference = ReferenceModel(
            plain,
            {tied[0]: tied for tied in paths.values()},
            trained,
            {path: {} for path in firsts},
            {path: set() for path in firsts},
            training=plain.training,
        )
        reference.set_base({})
        return reference

    @torch.no_grad()
    def set_base(self, base: dict[str, Tensor]) -> None:
        """Write tensors of another base; the fingerprint is that of a model without adapters."""
        for path, tensor in base.items():
            self.plain.get_parameter(path).copy_(tensor)
        self.fingerprint = pl.fingerprint(self.plain)

    def base(self, path: str) -> Tensor:
        return self.plain.get_parameter(path).detach()

    def dense(
        self, path: str, leaves: dict[AdapterState, dict[str, Tensor]] | None = None
    ) -> Tensor:
        """Return W + Σ λ·s·B A in float64."""
        weight = self.base(path).double()
        for adapter in self.adapters[path].values():
            if adapter.active:
                factors = (
                    adapter.factors if leaves is None else leaves.get(adapter, adapter.factors)
                )
                weight = weight + adapter.update(factors).view(weight.shape)
        return weight

    def outputs(self, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return the outputs of the plain model with these weights, tied ones set at all paths."""
        dtype = self.base("emb.weight").dtype
        self.plain.train(self.training)
        in_dtype = {path: weight.to(dtype) for path, weight in weights.items()}
        return functional_call(self.plain, in_dtype, (ids,))

    def all_adapters(self) -> Iterator[tuple[str, str, AdapterState]]:
        for path, by_name in self.adapters.items():
            for name, adapter in by_name.items():
                yield path, name, adapter

    def select(self, scope: str, names: Any) -> list[tuple[str, AdapterState]]:
        """Return the adapters, by name, that a verb on a part of the model acts on."""
        return [
            (name, adapter)
            for path, name, adapter in self.all_adapters()
            if not names or name in names
            if any(tied.startswith(scope) for tied in self.paths[path])
        ]

    def names(self, scope: str = "") -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.select(scope, ())))

    def merged(self, scope: str = "", names: Any = ()) -> bool:
        return any(adapter.merged for _, adapter in self.select(scope, names))

    def firsts(self) -> dict[str, str]:
        """Return the key of the tensor at each path."""
        return {path: first for first, paths in self.paths.items() for path in paths}

    def flag(self, path: str) -> bool:
        """Return the expected requires_grad of a tensor of the base."""
        return self.trained[path] and not self.frozen_by[path]

    def freeze_base(self, name: str) -> None:
        for path, trained in self.trained.items():
            if trained:
                self.frozen_by[path].add(name)

    def add(self, name: str, activate: str, freeze: bool) -> None:
        """Switch and freeze adapters and the base as attaching `name` does; it may be there yet."""
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
        if freeze:
            self.freeze_base(name)

    def set_trainable(self, scope: str, names: Any, trainable: bool) -> None:
        """Train adapters or freeze them, which also holds after others are detached."""
        for _, adapter in self.select(scope, names):
            adapter.trainable = trainable
            adapter.frozen_by = adapter.frozen_by if trainable else set()

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
        for by_name in self.adapters.values():
            for name in names:
                by_name.pop(name, None)
        for holders in self.frozen_by.values():
            holders.difference_update(names)
        for _, _, adapter in self.all_adapters():
            if adapter.frozen_by and not adapter.frozen_by.difference(names):
                adapter.trainable = True
            adapter.frozen_by.difference_update(names)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Assert that a tensor equals the reference, up to rounding in its dtype."""
    bound = {torch.float64: 1e-10, torch.float32: 2e-4}[actual.dtype]
    top = float(expected.detach().abs().max()) + 1
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=bound, atol=bound * top)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Assert that two tensors are equal bit for bit."""
    assert actual.dtype == expected.dtype
    if not torch.equal(actual, expected):  # much faster than assert_close
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@torch.no_grad()
def frozen_outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return outputs in eval mode with all parameters frozen, to compare bit for bit.

    The last bits of torch's LSTM and MultiheadAttention depend on whether a parameter requires a
    gradient, under no_grad too, in plain models as well.
    """
    training, flags = model.training, [(p, p.requires_grad) for p in model.parameters()]
    outputs = model.eval().requires_grad_(False)(ids)
    model.train(training)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return outputs


def stored(model: nn.Module, path: str) -> nn.Parameter:
    """Return the parameter that a model stores for a path, adapted or not."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[union-attr, index]
    return module.get_parameter(name)


def weight_of(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


@dataclass
class CheckedModel:
    """A model, its reference, and the open blocks, each with the function that ends it."""

    model: nn.Module
    reference: ReferenceModel
    blocks: list[tuple[AbstractContextManager[None], Callable[[], None]]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        self.stored = {path: stored(self.model, path) for path in self.reference.adapters}

    def exit_block(self, error: Exception | None = None, index: int = -1) -> None:
        """Exit a block, by default the innermost one, with an exception if one is given."""
        block, end = self.blocks.pop(index)
        if error is None:
            block.__exit__(None, None, None)
        else:
            assert not block.__exit__(type(error), error, error.__traceback__)
        end()

    def copied(self) -> "CheckedModel":
        """Return a deep copy, which is outside of all blocks."""
        reference = copy.deepcopy(self.reference)
        for _, _, adapter in reference.all_adapters():
            adapter.blocks.clear()
        return CheckedModel(copy.deepcopy(self.model), reference)

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Assert that the model equals its reference."""
        self._check_factors()
        self._check_base()
        self._check_weights(ids)
        self._check_summary()
        self._check_modules()

    def _check_factors(self) -> None:
        for name in self.reference.names():
            state = pl.state_dict(self.model, name)
            parameters = pl.parameters(self.model, name)
            in_order = [tensor.data_ptr() for tensor in state.values()]
            assert [parameter.data_ptr() for parameter in parameters] == in_order
            flags = {}
            for path, by_name in self.reference.adapters.items():
                for key, factor in by_name[name].factors.items() if name in by_name else ():
                    actual = state.pop(f"{path}.{key}")
                    flags[actual.data_ptr()] = by_name[name].trainable
                    assert_near(actual, factor)
                    # Continue with the bits of the model, or rounding would add up.
                    by_name[name].factors[key] = actual.double().clone()
            assert not state
            for parameter in parameters:
                assert parameter.requires_grad == flags.pop(parameter.data_ptr())
            assert not flags

    def _check_base(self) -> None:
        expected = self.reference.plain.state_dict()
        actual = pl.base_state_dict(self.model)
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_same(actual[key], tensor)
        assert pl.fingerprint(self.model) == self.reference.fingerprint
        for path, parameter in self.stored.items():
            assert stored(self.model, path) is parameter
            assert parameter.requires_grad == self.reference.flag(path)
            if not any(adapter.merged for adapter in self.reference.adapters[path].values()):
                assert_same(parameter.detach(), self.reference.base(path))

    def _check_weights(self, ids: Tensor) -> None:
        weights = {path: self.reference.dense(path) for path in self.reference.adapters}
        for first, expected in weights.items():
            active = any(adapter.active for adapter in self.reference.adapters[first].values())
            for path in self.reference.paths[first]:
                actual = weight_of(self.model, path)
                assert type(actual) in (Tensor, nn.Parameter)
                (assert_near if active else assert_same)(
                    actual.detach(), expected if active else self.reference.base(first)
                )
        assert_near(self.model(ids), self.reference.outputs(ids, weights))
        if not any(adapter.active for _, _, adapter in self.reference.all_adapters()):
            assert_same(frozen_outputs(self.model, ids), frozen_outputs(self.reference.plain, ids))

    def _check_summary(self) -> None:
        summary = pl.summary(self.model)
        rows = {(row.site, row.adapter): row for row in summary.sites}
        assert len(rows) == len(summary.sites)
        for path, by_name in self.reference.adapters.items():
            assert [adapter for site, adapter in rows if site == path] == list(by_name)
        factors = 0
        for path, name, adapter in self.reference.all_adapters():
            row = rows.pop((path, name))
            numel = sum(factor.numel() for factor in adapter.factors.values())
            assert row.shape == self.reference.base(path).shape
            assert row.kind == type(adapter.spec).__name__
            assert row.rank == adapter.spec.rank
            assert row.scale == pytest.approx(adapter.scale)
            assert (row.active, row.trainable, row.merged) == (
                adapter.active,
                adapter.trainable,
                adapter.merged,
            )
            assert (row.parameters, row.share) == (numel, numel / self.reference.base(path).numel())
            factors += numel * adapter.trainable
        assert not rows
        sizes = {path: self.reference.base(path).numel() for path in self.reference.adapters}
        assert summary.total == sum(sizes.values())
        assert summary.trainable == factors + sum(
            size for path, size in sizes.items() if self.reference.flag(path)
        )

    def _check_modules(self) -> None:
        """Assert that modules without adapters have their class, attributes and parameters."""
        adapted = {
            path.rpartition(".")[0]
            for first, by_name in self.reference.adapters.items()
            for path in self.reference.paths[first]
            if by_name
        }
        for path, plain in self.reference.plain.named_modules():
            module = self.model.get_submodule(path)
            assert isinstance(module, type(plain))
            if path not in adapted:
                assert type(module) is type(plain)
                assert list(module._parameters) == list(plain._parameters)
                assert list(module._modules) == list(plain._modules)
                kept = {"_paramlora_before"} if any(self.reference.frozen_by.values()) else set()
                assert vars(module).keys() - kept == vars(plain).keys()
        if not adapted:
            assert list(self.model.state_dict()) == list(self.reference.plain.state_dict())
