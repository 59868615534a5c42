"""A model with its reference: all that can be seen of the two must agree."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import paramlora as pl
from tests.support.dense_net import scaling
from tests.support.reference import parted
from tests.support.reference_model import ReferenceModel


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Assert that a tensor equals the reference, up to rounding in its dtype."""
    bound = {torch.float64: 1e-10, torch.float32: 2e-4}[actual.dtype]
    expected = expected.detach()
    top = float(expected.abs().max()) + 1
    if (actual.detach() - expected).abs().max() <= bound:  # much faster than assert_close
        return
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
    blocks: list[tuple[AbstractContextManager[Any], Callable[[], None]]] = field(
        default_factory=list
    )
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.stored = {path: stored(self.model, path) for path in self.reference.paths}

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
        copied = CheckedModel(copy.deepcopy(self.model), self.reference.copied())
        # A layer that a block held is held no more, and in evaluation mode until the next call.
        copied.model.train(self.reference.training)
        return copied

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """Assert that the model equals its reference."""
        self._check_factors()
        self._check_base()
        self._check_weights()
        self.check_outputs(ids)
        self._check_summary()
        self._check_modules()

    @torch.no_grad()
    def check_outputs(self, ids: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> None:
        """Assert that the outputs are right; `call` runs the model in another way."""
        actual = (self.model if call is None else call)(ids)
        assert_near(actual, self.reference.outputs(ids))
        self.take_buffers()

    def take_buffers(self) -> None:
        """Compare buffers that a forward has moved, and take the bits of the model."""
        if not self.reference.moves:
            return
        actual, moved = pl.base_state_dict(self.model), False
        for key, expected in self.reference.plain.named_buffers():
            if not torch.equal(actual[key], expected):
                norm = self.reference.plain.get_submodule(key.rpartition(".")[0])
                held = self.reference.held and isinstance(norm, nn.BatchNorm1d)
                assert self.reference.training, key
                assert not held, key
                if expected.is_floating_point():
                    assert_near(actual[key], expected)
                expected.copy_(actual[key])
                moved = True
        if moved or self.reference.training:
            self.fingerprint = ""

    def _check_factors(self) -> None:
        for name in self.reference.names():
            state = pl.state_dict(self.model, name)
            trained, flags = [], []
            for path, by_name in self.reference.adapters.items():
                if name in by_name:
                    adapter = by_name[name]
                    for key, factor in adapter.factors.items():
                        actual = state[f"{path}{key}"]
                        assert_near(actual, factor)
                        # Continue with the bits of the model, or rounding would add up.
                        adapter.factors[key] = actual.double().clone()
                    trained += [state[f"{path}{key}"].data_ptr() for key in adapter.trained()]
                    flags += [adapter.trainable] * len(adapter.trained())
            keys = {
                f"{path}{key}"
                for path, by_name in self.reference.adapters.items()
                if name in by_name
                for key in by_name[name].factors
            }
            assert keys == set(state)
            parameters = pl.parameters(self.model, name)
            assert sorted(p.data_ptr() for p in parameters) == sorted(trained)
            by_place = dict(zip(trained, flags, strict=True))
            assert all(p.requires_grad == by_place[p.data_ptr()] for p in parameters)
            places = [t.data_ptr() for t in state.values() if t.data_ptr() in by_place]
            assert [p.data_ptr() for p in parameters] == places

    def _check_base(self) -> None:
        expected = self.reference.plain.state_dict()
        actual = pl.base_state_dict(self.model)
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_same(actual[key], tensor)
        self.fingerprint = self.fingerprint or pl.fingerprint(self.reference.plain)
        assert pl.fingerprint(self.model) == self.fingerprint
        for path, parameter in self.stored.items():
            assert stored(self.model, path) is parameter
            assert parameter.requires_grad == self.reference.flag(path)
            if any(adapter.merged for adapter in self.reference.adapters[path].values()):
                assert_near(parameter.detach(), self.reference.stored(path))
            else:
                assert_same(parameter.detach(), self.reference.parameter(path).detach())

    def _check_weights(self) -> None:
        for first, adapters in self.reference.adapters.items():
            active = any(adapter.active for adapter in adapters.values())
            if not adapters or self.reference.route(first) is not None:
                continue
            for path in self.reference.paths[first]:
                self.reference.read(first)
                actual = weight_of(self.model, path)
                assert type(actual) in (Tensor, nn.Parameter)
                assert_near(actual, self.reference.dense(first))
                if not active and self.reference.vectors(first) is None:
                    assert_same(actual.detach(), self.reference.parameter(first).detach())
        self.take_buffers()

    def check_off(self, ids: Tensor) -> None:
        """Assert that the outputs without active adapters are the base's, bit for bit."""
        adapters = [adapter for _, _, adapter in self.reference.all_adapters()]
        if adapters and not any(adapter.active for adapter in adapters):
            assert_same(frozen_outputs(self.model, ids), frozen_outputs(self.reference.plain, ids))

    def _check_summary(self) -> None:
        summary = pl.summary(self.model)
        rows = {(row.site, row.adapter): row for row in summary.sites}
        assert len(rows) == len(summary.sites)
        factors = 0
        for path, name, adapter in self.reference.all_adapters():
            assert [site for site, other in rows if parted(site)[0] == path and other == name] == [
                f"{path}{index}" for index in adapter.specs
            ]
            for index, spec in adapter.specs.items():
                row = rows.pop((f"{path}{index}", name))
                numel = sum(
                    adapter.factors[key].numel()
                    for key in adapter.trained()
                    if key.rpartition(".")[0] == index
                )
                block = self.reference.base(path)[parted(index)[1]]
                assert row.shape == block.shape
                assert row.kind == type(spec).__name__
                assert row.rank == getattr(spec, "rank", None)
                assert row.scale == pytest.approx(adapter.strength * scaling(spec))
                assert (row.active, row.merged) == (adapter.active, adapter.merged)
                assert row.trainable == adapter.trainable
                assert (row.parameters, row.share) == (numel, numel / block.numel())
                factors += numel * adapter.trainable
        assert not rows
        sizes = {path: self.reference.parameter(path).numel() for path in self.reference.paths}
        assert summary.total == sum(sizes.values())
        assert summary.trainable == factors + sum(
            size for path, size in sizes.items() if self.reference.flag(path)
        )
        assert bool(summary.held) == (
            self.reference.held
            and bool(summary.sites)
            and any(isinstance(m, nn.BatchNorm1d) for m in self.reference.plain.modules())
        )

    def _check_modules(self) -> None:
        """Assert that modules without adapters have their class, attributes and parameters."""
        adapted = {
            path.rpartition(".")[0]
            for first, by_name in self.reference.adapters.items()
            for path in self.reference.paths[first]
            if by_name
        }
        frozen = any(self.reference.frozen_by.values())
        for path, plain in self.reference.plain.named_modules():
            module = self.model.get_submodule(path)
            is_norm = isinstance(plain, nn.BatchNorm1d)
            held = self.reference.held and is_norm
            if ".parametrizations" not in path:
                assert module.training == (self.reference.training and not held)
            if path in adapted or ".parametrizations" in path:
                continue
            own = parametrize.is_parametrized(plain)
            assert isinstance(module, nn.Linear if own else type(plain))
            assert type(module) is type(plain) or own
            assert list(module._parameters) == list(plain._parameters)
            assert list(module._modules) == list(plain._modules)
            # Lightning's torch.compile, once Lightning is imported, adds the second one.
            kept = {"_is_torch_compile", "_compile_kwargs"}
            kept |= {"_paramlora_before"} if frozen else set()
            kept |= {"train"} if held else set()
            assert vars(module).keys() - kept == vars(plain).keys()
        if not adapted:
            assert list(self.model.state_dict()) == list(self.reference.plain.state_dict())
