"""A model of mixed layers, and a book that knows by itself what its adapters must make of it.

The book shares no code with paramlora: it has a plain copy of the base, factors as float64 tensors,
and flags. A `World` is a model with its book; `agree` compares all that can be seen of the two.
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
    """A user's own module with a bare parameter of three dimensions, and a buffer."""

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
    """Ids through an embedding, layers that each add to what is there, and a head."""

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
class Part:
    """What is known of an adapter at one tensor."""

    spec: pl.kinds.Spec
    factors: dict[str, Tensor]
    strength: float = 1.0
    active: bool = True
    trainable: bool = True
    merged: bool = False

    @property
    def scale(self) -> float:
        """All that multiplies the update."""
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
class Book:
    """What a model must be: a plain copy of its base, and all that is known of its adapters.

    A tied tensor is known by its first path; `paths` has all of each.
    """

    plain: nn.Module
    paths: dict[str, list[str]]
    trained: dict[str, bool]
    parts: dict[str, dict[str, Part]]
    frozen_by: dict[str, set[str]]
    fingerprint: str = ""
    training: bool = True

    @staticmethod
    def of(plain: nn.Module) -> "Book":
        paths: dict[int, list[str]] = {}
        for path, parameter in plain.named_parameters(remove_duplicate=False):
            paths.setdefault(id(parameter), []).append(path)
        firsts = [same[0] for same in paths.values()]
        trained = {path: plain.get_parameter(path).requires_grad for path in firsts}
        book = Book(
            plain,
            {same[0]: same for same in paths.values()},
            trained,
            {path: {} for path in firsts},
            {path: set() for path in firsts},
            training=plain.training,
        )
        book.rebase({})
        return book

    @torch.no_grad()
    def rebase(self, base: dict[str, Tensor]) -> None:
        """Take over another base; the fingerprint is that of a model that never had adapters."""
        for path, tensor in base.items():
            self.plain.get_parameter(path).copy_(tensor)
        self.fingerprint = pl.fingerprint(self.plain)

    def base(self, path: str) -> Tensor:
        return self.plain.get_parameter(path).detach()

    def dense(self, path: str, leaves: dict[Part, dict[str, Tensor]] | None = None) -> Tensor:
        """Return W + Σ λ·s·B A in float64."""
        weight = self.base(path).double()
        for part in self.parts[path].values():
            if part.active:
                factors = part.factors if leaves is None else leaves.get(part, part.factors)
                weight = weight + part.update(factors).view(weight.shape)
        return weight

    def outputs(self, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return what the plain model gives with these weights; tied ones are set everywhere."""
        dtype = self.base("emb.weight").dtype
        self.plain.train(self.training)
        in_dtype = {path: weight.to(dtype) for path, weight in weights.items()}
        return functional_call(self.plain, in_dtype, (ids,))

    def all_parts(self) -> Iterator[tuple[str, str, Part]]:
        for path, held in self.parts.items():
            for name, part in held.items():
                yield path, name, part

    def select(self, scope: str, names: Any) -> list[tuple[str, Part]]:
        """Return the parts that a verb on a part of the model means, by name."""
        return [
            (name, part)
            for path, name, part in self.all_parts()
            if not names or name in names
            if any(same.startswith(scope) for same in self.paths[path])
        ]

    def names(self, scope: str = "") -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.select(scope, ())))

    def merged(self, scope: str = "", names: Any = ()) -> bool:
        return any(part.merged for _, part in self.select(scope, names))

    def firsts(self) -> dict[str, str]:
        """Return all paths, each with the one by which its tensor is known."""
        return {path: first for first, paths in self.paths.items() for path in paths}

    def flag(self, path: str) -> bool:
        """Return whether a tensor of the base must require a gradient."""
        return self.trained[path] and not self.frozen_by[path]

    def freeze_base(self, name: str) -> None:
        for path, trained in self.trained.items():
            if trained:
                self.frozen_by[path].add(name)

    def toggle(self, verb: str, scope: str, names: Any, strength: float = 1.0) -> None:
        for _, part in self.select(scope, names):
            if verb == "scale":
                part.strength = strength
            else:
                part.active = verb.startswith("enable")

    def merge(self, scope: str, names: Any) -> None:
        for _, part in self.select(scope, names):
            part.merged = part.merged or part.active

    def unmerge(self, scope: str) -> None:
        for _, part in self.select(scope, ()):
            part.merged = False

    def detach(self, names: Any) -> None:
        for held in self.parts.values():
            for name in names:
                held.pop(name, None)
        for holders in self.frozen_by.values():
            holders.difference_update(names)


def close(actual: Tensor, expected: Tensor) -> None:
    """Assert that a tensor of the model is the book's one, to rounding in the model's dtype."""
    bound = {torch.float64: 1e-10, torch.float32: 2e-4}[actual.dtype]
    top = float(expected.detach().abs().max()) + 1
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=bound, atol=bound * top)


def same(actual: Tensor, expected: Tensor) -> None:
    """Assert that two tensors are equal, every element."""
    assert actual.dtype == expected.dtype
    if not torch.equal(actual, expected):  # at a fraction of what assert_close takes
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@torch.no_grad()
def exactly(model: nn.Module, ids: Tensor) -> Tensor:
    """Return outputs to compare bit for bit: in eval mode, and nothing requires a gradient.

    Some of torch's own layers (LSTM, MultiheadAttention) have other last bits where a parameter
    requires a gradient, under no_grad too: freezing a plain one shows it.
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
class World:
    """A model, its book, and the contexts that it is in, with what the book does at their ends."""

    model: nn.Module
    book: Book
    contexts: list[tuple[AbstractContextManager[None], Callable[[], None]]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        self.stored = {path: stored(self.model, path) for path in self.book.parts}

    def leave(self, error: Exception | None = None) -> None:
        """Leave the innermost context, by an exception where one is given."""
        context, end = self.contexts.pop()
        if error is None:
            context.__exit__(None, None, None)
        else:
            assert not context.__exit__(type(error), error, error.__traceback__)
        end()

    def copied(self) -> "World":
        """Return a deep copy; it is in no context, but looks as the original does in them."""
        return World(copy.deepcopy(self.model), copy.deepcopy(self.book))

    @torch.no_grad()
    def agree(self, ids: Tensor) -> None:
        """Assert that the model is what the book says."""
        self._agree_factors()
        self._agree_base()
        self._agree_weights(ids)
        self._agree_summary()
        self._agree_modules()

    def _agree_factors(self) -> None:
        for name in self.book.names():
            state = pl.state_dict(self.model, name)
            parameters = pl.parameters(self.model, name)
            in_order = [tensor.data_ptr() for tensor in state.values()]
            assert [parameter.data_ptr() for parameter in parameters] == in_order
            flags = {}
            for path, held in self.book.parts.items():
                for key, factor in held[name].factors.items() if name in held else ():
                    actual = state.pop(f"{path}.{key}")
                    flags[actual.data_ptr()] = held[name].trainable
                    close(actual, factor)
                    # From here on the model's bits, or rounding would add up.
                    held[name].factors[key] = actual.double().clone()
            assert not state
            for parameter in parameters:
                assert parameter.requires_grad == flags.pop(parameter.data_ptr())
            assert not flags

    def _agree_base(self) -> None:
        expected = self.book.plain.state_dict()
        actual = pl.base_state_dict(self.model)
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            same(actual[key], tensor)
        assert pl.fingerprint(self.model) == self.book.fingerprint
        for path, parameter in self.stored.items():
            assert stored(self.model, path) is parameter
            assert parameter.requires_grad == self.book.flag(path)
            if not any(part.merged for part in self.book.parts[path].values()):
                same(parameter.detach(), self.book.base(path))

    def _agree_weights(self, ids: Tensor) -> None:
        weights = {path: self.book.dense(path) for path in self.book.parts}
        for first, expected in weights.items():
            active = any(part.active for part in self.book.parts[first].values())
            for path in self.book.paths[first]:
                actual = weight_of(self.model, path)
                assert type(actual) in (Tensor, nn.Parameter)
                (close if active else same)(
                    actual.detach(), expected if active else self.book.base(first)
                )
        close(self.model(ids), self.book.outputs(ids, weights))
        if not any(part.active for _, _, part in self.book.all_parts()):
            same(exactly(self.model, ids), exactly(self.book.plain, ids))

    def _agree_summary(self) -> None:
        summary = pl.summary(self.model)
        rows = {(row.site, row.adapter): row for row in summary.sites}
        assert len(rows) == len(summary.sites)
        for path, held in self.book.parts.items():
            assert [adapter for site, adapter in rows if site == path] == list(held)
        factors = 0
        for path, name, part in self.book.all_parts():
            row = rows.pop((path, name))
            numel = sum(factor.numel() for factor in part.factors.values())
            assert row.shape == self.book.base(path).shape
            assert row.kind == type(part.spec).__name__
            assert row.rank == part.spec.rank
            assert row.scale == pytest.approx(part.scale)
            assert (row.active, row.trainable, row.merged) == (
                part.active,
                part.trainable,
                part.merged,
            )
            assert (row.parameters, row.share) == (numel, numel / self.book.base(path).numel())
            factors += numel * part.trainable
        assert not rows
        sizes = {path: self.book.base(path).numel() for path in self.book.parts}
        assert summary.total == sum(sizes.values())
        assert summary.trainable == factors + sum(
            size for path, size in sizes.items() if self.book.flag(path)
        )

    def _agree_modules(self) -> None:
        """A module without adapters is what it was: class, attributes, order of parameters."""
        adapted = {
            path.rpartition(".")[0]
            for first, held in self.book.parts.items()
            for path in self.book.paths[first]
            if held
        }
        for path, plain in self.book.plain.named_modules():
            module = self.model.get_submodule(path)
            assert isinstance(module, type(plain))
            if path not in adapted:
                assert type(module) is type(plain)
                assert list(module._parameters) == list(plain._parameters)
                assert list(module._modules) == list(plain._modules)
                kept = {"_paramlora_before"} if any(self.book.frozen_by.values()) else set()
                assert vars(module).keys() - kept == vars(plain).keys()
        if not adapted:
            assert list(self.model.state_dict()) == list(self.book.plain.state_dict())
