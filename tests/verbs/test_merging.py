"""Merging: bits, order, memory format, and writes to merged weights."""

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import EXACT, case_of, snapshot
from tests.support.mixed import assert_bits
from tests.support.reference import floats, shake


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution(groups: int) -> None:
    """A grouped convolution is adapted and merged like any other layer.

    PEFT 0.21 refuses to merge it.
    """
    model: Any = nn.Conv2d(4, 8, 3, groups=groups).double()
    W, x = model.weight.detach().clone(), torch.randn(2, 4, 6, 6).double()
    pl.attach(model, LoRA(2, alpha=3), "weight")
    shake(model)
    factors = pl.state_dict(model)
    wanted = W + 1.5 * (factors["weight.B"] @ factors["weight.A"]).view(W.shape)
    expected = F.conv2d(x, wanted, model.bias, groups=groups)
    assert_close(model(x), expected, **EXACT)
    with pl.merged(model):
        assert_close(model.weight.detach(), wanted, **EXACT)
        assert_close(model(x), expected, **EXACT)


@pytest.mark.parametrize(
    ("first", "second"),
    [(pl.LoRA(2), pl.DoRA(2)), (pl.IA3(), pl.LoRA(2)), (pl.DoRA(2), pl.LoRA(2))],
)
def test_order_of_adapters(first: pl.kinds.Spec, second: pl.kinds.Spec) -> None:
    """If the order of two adapters matters, merging the later one alone raises StateError."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)
    pl.attach(model, first, name="first")
    pl.attach(model, second, name="second", activate="also")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(std=0.3)
    before = model(x)
    with pytest.raises(pl.StateError, match=r"cannot merge 'second' .* while 'first'"):
        pl.merge(model, "second")
    assert torch.equal(model(x), before)
    for names in (["first"], ["first", "second"]):
        with pl.merged(model, *names):
            torch.testing.assert_close(model(x), before)


STEPS: dict[str, Callable[[Any, Path], object]] = {
    "disable": lambda m, _: pl.disable(m, "delta"),
    "enable": lambda m, _: pl.enable(m, "delta"),
    "activate": lambda m, _: pl.activate(m, "delta", "ia3"),
    "load": lambda m, file: pl.load(m, file, name="delta", activate="also"),
    "merge": lambda m, _: pl.merge(m, "ia3"),
    "merge in disabled": lambda m, _: merge_within(pl.disabled(m, "delta"), m),
    "merge in enabled": lambda m, _: merge_within(pl.enabled(m, "delta"), m),
    "merge in using": lambda m, _: merge_within(pl.using(m, "ia3"), m),
    "merge both": lambda m, _: pl.merge(m),
    "unmerge": lambda m, _: pl.unmerge(m),
}


def merge_within(block: AbstractContextManager[None], model: nn.Module) -> None:
    with block:
        pl.merge(model, "ia3")


@pytest.mark.parametrize(
    "first", ["disable", "merge in disabled", "merge in enabled", "merge in using"]
)
def test_order_in_any_sequence(first: str, tmp_path: Path) -> None:
    """After any three steps, W' is that of the active adapters in attaching order, or they raise.

    W' = l ⊙ (W + D), but with l merged before D is switched on it would be l ⊙ W + D.
    """
    torch.manual_seed(0)
    fresh = nn.Linear(3, 2).double()
    W = fresh.weight.detach().clone()
    pl.attach(fresh, pl.Delta(), "weight", name="delta")
    pl.attach(fresh, pl.IA3(), "weight", name="ia3", activate="also")
    shake(fresh)
    pl.save(fresh, tmp_path / "delta", "delta")
    state = pl.state_dict(fresh, "delta") | pl.state_dict(fresh, "ia3")
    D, factor = state["weight.D"], state["weight.l"][:, None]
    for rest in itertools.product(STEPS, repeat=2):
        model = copy.deepcopy(fresh)
        for step in (first, *rest):
            with contextlib.suppress(pl.StateError):
                STEPS[step](model, tmp_path / "delta")
            active = pl.summary(model).active
            expected = W + D if "delta" in active else W
            expected = factor * expected if "ia3" in active else expected
            assert_close(model.weight.detach(), expected, **EXACT, msg=f"{first}, {rest}: {step}")


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_the_bits(dtype: torch.dtype) -> None:
    """Merging and unmerging two adapters keeps every bit, in bfloat16 a thousand times over."""
    layers: Any = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4)).to(dtype)
    targets = [nn.Linear, nn.Embedding]
    pl.attach(layers, pl.LoRA(rank=2), targets, name="one")
    pl.attach(layers, pl.Delta(), targets, name="two", activate="also")
    shake(layers)
    before, adapted = snapshot(layers), layers[0].weight.detach().clone()
    for i in range(1000 if dtype == torch.bfloat16 else 10):
        if i % 2:
            pl.merge(layers, "two")
            pl.merge(layers, "one")
        else:
            pl.merge(layers)
        if i < 2:
            assert_bits(layers[0].weight.detach(), adapted)
        pl.unmerge(layers)
    assert snapshot(layers) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["kaiming", "olora"])
def test_merging_by_blocks_of_rows(
    dtype: torch.dtype, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight merged in several blocks of rows has the bits of W' as read, and unmerges."""
    monkeypatch.setattr(sys.modules["paramlora.verbs.fold"], "_BLOCK", 20)
    layer: Any = nn.Linear(6, 10).to(dtype)
    pl.attach(layer, pl.LoRA(rank=2, alpha=3, init=init), name="one")
    pl.attach(layer, pl.LoRA(rank=1), "weight[2:, :]", name="two", activate="also")
    pl.attach(layer, pl.LoRA(rank=3, transposed=True), name="three", activate="also")
    shake(layer)
    pl.scale(layer, 0.7, "three")
    before, adapted = snapshot(layer), layer.weight.detach().clone()
    with pl.merged(layer):
        assert_bits(layer.weight.detach(), adapted)
        assert_bits(layer.parametrizations.weight.original.detach(), adapted)
    assert snapshot(layer) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_several_adapters_at_once(dtype: torch.dtype) -> None:
    """Several adapters fold in with the bits of the weight that is read; W and factors stay."""
    layer = nn.Linear(24, 16, dtype=dtype)
    for i, spec in enumerate([LoRA(rank=2), LoRA(rank=3), pl.Delta(), LoRA(rank=2)]):
        pl.attach(layer, spec, ["weight"], name=f"a{i}", activate="also")
    shake(layer)
    before, read = snapshot(layer), layer.weight.detach().clone()
    with pl.merged(layer):
        assert_bits(layer.weight.detach(), read)
    assert snapshot(layer) == before


class Unchanged(pl.kinds.Spec):
    """A kind that returns the tensor it is given."""

    def create(self, weight: Tensor, generator: Any = None) -> dict[str, Tensor]:
        return {"t": torch.zeros(1)}

    def apply(self, weight: Tensor, factors: Any, strength: Any = 1.0) -> Tensor:
        return weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_after_a_kind_that_returns_its_input(dtype: torch.dtype) -> None:
    """The stored weight keeps its bits if the adapter before a LoRA returns the weight itself."""
    layer = nn.Linear(24, 16, dtype=dtype)
    pl.attach(layer, Unchanged(), ["weight"], name="same")
    pl.attach(layer, LoRA(rank=2), ["weight"], name="lora", activate="also")
    shake(layer)
    before, read = snapshot(layer), layer.weight.detach().clone()
    with pl.merged(layer):
        assert_bits(layer.weight.detach(), read)
    assert snapshot(layer) == before
    assert_bits(layer.weight.detach(), read)


def test_a_merged_weight_shares_no_memory_with_the_base() -> None:
    """A write to the merged weight leaves the base, if the kind returns the weight itself."""
    layer = nn.Linear(4, 3)
    pl.attach(layer, Unchanged(), "weight")
    base = layer.weight.detach().clone()
    pl.merge(layer)
    layer.state_dict()["weight"].zero_()
    assert_bits(pl.base_state_dict(layer)["weight"], base)


def test_write_to_a_merged_weight() -> None:
    """Unmerging raises if it would lose a write to the merged weight; baking keeps the write."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    pl.attach(model, pl.LoRA(2), "0")
    shake(model)
    pl.merge(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    written = model[0].weight.clone()
    with pytest.raises(pl.StateError, match=r"'0.weight' was written to since the merge.*bake"):
        pl.unmerge(model)
    assert torch.equal(model[0].weight, written)
    pl.bake(model)
    assert torch.equal(model[0].weight, written)
    pl.unmerge(copied)


def test_memory_format() -> None:
    """A channels_last weight keeps its format when merged and baked."""
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    pl.attach(layer, pl.LoRA(2), "weight")
    shake(layer)
    dense = layer.weight.detach().clone()
    pl.merge(layer)
    assert layer.weight.stride() == strides
    assert_close(layer.weight, dense)
    pl.bake(layer)
    assert layer.weight.stride() == strides


@pytest.mark.parametrize("host", ["linear", "conv2d", "lstm", "bilinear", "bare_2d"])
def test_backward_through_a_merged_adapter(host: str) -> None:
    """A backward that would leave merged factors without a gradient raises."""
    case = case_of(host)
    model = case.model
    pl.merge(model)
    match = r"cannot train adapter 'one' while it is merged: its factors would get no gradient"
    with pytest.raises(pl.StateError, match=match):
        torch.cat([y.flatten() for y in floats(model(*case.inputs))]).sum().backward()
    assert all(factor.grad is None for factor in pl.parameters(model))
    with torch.no_grad():
        model(*case.inputs)
    pl.freeze(model)
    inputs = [x.requires_grad_() for x in case.inputs if x.is_floating_point()]
    if inputs:
        torch.cat([y.flatten() for y in floats(model(*case.inputs))]).sum().backward()
        assert all(x.grad is not None for x in inputs)


def test_merged_below_a_trained_adapter() -> None:
    """A merged adapter that is frozen does not keep the one on top of it from training."""
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    pl.attach(model, pl.LoRA(rank=2), name="below")
    pl.merge(model)
    pl.attach(model, pl.LoRA(rank=1), name="top", activate="also")
    model(x).sum().backward()
    assert all(factor.grad is not None for factor in pl.parameters(model, "top"))
    pl.unfreeze(model, "below")
    with pytest.raises(pl.StateError, match="cannot train adapter 'below' while it is merged"):
        model(x).sum().backward()
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    assert gradient.shape == x.shape
    pl.unmerge(model)
    model(x).sum().backward()
    assert all(factor.grad is not None for factor in pl.parameters(model, "below"))


def test_reading_a_merged_weight() -> None:
    """`layer.weight` of a merged layer is the stored parameter itself, also in grad mode."""
    model = nn.Linear(4, 3)
    pl.attach(model, pl.LoRA(rank=2))
    pl.merge(model)
    assert model.weight is model.weight
    assert isinstance(model.weight, nn.Parameter)


def test_scales_of_several_adapters() -> None:
    """Merging several LoRAs adds each with its own scale, whatever the order."""
    model = nn.Linear(4, 3).double()
    expected = model.weight.detach().clone()
    for name, alpha in (("a", 6), ("b", 1), ("c", -3)):
        pl.attach(model, LoRA(2, alpha), "weight", name=name, activate="also")
        A, B = torch.randn(2, 4).double(), torch.randn(3, 2).double()
        state = {key: (A if key.endswith("A") else B) for key in pl.state_dict(model, name)}
        pl.load_state_dict(model, state, name)
        expected += alpha / 2 * B @ A
    pl.merge(model)
    assert_close(model.weight, expected)
