"""Switching adapters on, off and to a strength, for good and for a block; freezing them."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from tests.support.checked_model import assert_near
from tests.support.helpers import new_garbage_only, unchanged
from tests.support.mixed import (
    Mixed,
    assert_bits,
    attach_two,
    fields,
    flags,
    mixed,
)
from tests.support.reference import shake

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_outputs_of_the_base(
    dtype: torch.dtype, training: bool, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Outputs are bit-for-bit the base's with new adapters, and always with adapters off."""
    model, x = mixed(dtype)
    base = copy.deepcopy(model).train(training)
    model.train(training)
    attach_two(model)
    with mode():
        expected = base(x)
        assert_bits(model(x), expected)
    shake(model)
    pl.scale(model, 0.3, "full")
    with mode():
        assert not torch.equal(model(x), expected)
        with pl.disabled(model):
            assert_bits(model(x), expected)
        with pl.using(model):
            assert_bits(model(x), expected)
        with pl.merged(model):
            pass
        pl.disable(model)
        assert_bits(model(x), expected)


def trained_model() -> tuple[Mixed, Tensor]:
    """Return a model with two adapters, some factors of which are frozen, and an input."""
    model, x = mixed()
    attach_two(model.eval())
    shake(model)
    pl.freeze(model, "full")
    next(iter(pl.parameters(model, "low"))).requires_grad_(False)
    return model, x


@pytest.mark.parametrize("names", [(), ("low",), ("low", "full")])
def test_toggling_keeps_requires_grad(names: tuple[str, ...]) -> None:
    """Toggling, scaling and merging do not touch requires_grad, and act on the named adapters."""
    model, _ = trained_model()
    before = flags(model)
    for verb in (pl.disable, pl.enable, pl.merge):
        verb(model, *names)
        assert flags(model) == before
    pl.unmerge(model)
    pl.scale(model, 0.5, *names)
    for block in (pl.enabled, pl.disabled, pl.using, pl.merged):
        with block(model, *names):
            assert flags(model) == before
    assert flags(model) == before
    touched = {row.adapter for row in pl.summary(model).sites if row.scale in (0.5, 0.75)}
    assert touched == set(names or ("low", "full"))
    pl.scale(model, low=0.25)  # by name: the others keep theirs
    assert {float(row.scale) for row in pl.summary(model).sites if row.adapter == "full"} == {
        0.5 if "full" in touched else 1.0
    }


@pytest.mark.parametrize("block", [pl.enabled, pl.disabled, pl.using])
def test_blocks_restore_the_state(block: Callable[..., AbstractContextManager[None]]) -> None:
    """A block restores the state: normally, after an exception inside, and nested."""
    model, x = trained_model()
    pl.disable(model, "full")
    with unchanged(model), block(model, "low"):
        model(x)
    error = pytest.raises(ZeroDivisionError, match="inside")
    with unchanged(model), error, block(model, "low"):
        raise ZeroDivisionError("inside")
    with unchanged(model), pl.using(model, low=0.5), unchanged(model), block(model, "full"):
        with unchanged(model), block(model, "low"), pl.disabled(model, "low"):
            model(x)
        model(x)


def test_merged_restores_the_state() -> None:
    """`merged` restores the state: normally, after an exception inside, and in other blocks."""
    model, x = trained_model()
    with unchanged(model), pl.merged(model):
        model(x)
    error = pytest.raises(ZeroDivisionError, match="inside")
    with unchanged(model), error, pl.merged(model, "low"):
        raise ZeroDivisionError("inside")
    with unchanged(model), pl.using(model, full=0.5), unchanged(model), pl.merged(model):
        model(x)


def test_toggling_after_modules_moved() -> None:
    """Verbs act on the modules that a model has now: moved, replaced, removed or shared."""
    first, second = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    for model in (first, second):
        pl.attach(model, pl.LoRA(rank=1), name="low")
        pl.disable(model)
    layers = [*first, *second]

    def active(*models: nn.Module) -> list[bool]:
        """Enable adapters in the given models; return which of the four layers are active."""
        for model in models:
            pl.enable(model, "low")
        found = [bool(layer.parametrizations.weight[0].active) for layer in layers]
        for model in (first, second, *layers):
            pl.disable(model)
        return found

    assert active(first) == [True, True, False, False]
    assert active(first[1]) == [False, True, False, False]
    first[1], second[1] = second[1], first[1]
    assert active(first) == [True, False, False, True]
    first.append(second)
    assert active(first) == [True, True, True, True]
    del first._modules["1"]
    assert active(first) == [True, True, True, False]
    first.again, second.up = second[1], first
    assert active(first) == active(second) == [True, True, True, False]
    del first.again, first[1]
    assert active(first) == [True, False, False, False]
    first._modules = {"only": layers[3]}
    assert active(first, layers[2]) == [False, False, True, True]


def test_verbs_keep_no_reference() -> None:
    """A model, or a part of it, is freed when it is deleted, whatever verbs it went through."""
    with new_garbage_only():
        model, x = trained_model()
        for verb in (pl.disable, pl.enable, pl.merge, pl.unmerge):
            verb(model)
        with pl.using(model, low=0.5), pl.disabled(model):
            model(x)
        head, whole = weakref.ref(model.head), weakref.ref(model)
        model.head = nn.Identity()  # type: ignore[assignment]
        gc.collect()
        assert head() is None
        del model
        gc.collect()
        assert whole() is None


def test_freezing_keeps_the_active_adapters() -> None:
    """Freezing and unfreezing change requires_grad of the named factors and nothing else."""
    for prepare in (lambda m: None, pl.disable, pl.merge):
        model, x = trained_model()
        prepare(model)
        before, outputs = fields(model), model(x).detach()
        pl.unfreeze(model)
        pl.freeze(model, "low")
        assert not any(parameter.requires_grad for parameter in pl.parameters(model, "low"))
        assert all(parameter.requires_grad for parameter in pl.parameters(model, "full"))
        assert fields(model) == before
        assert_bits(model(x).detach(), outputs)


def small() -> tuple[nn.Sequential, Tensor]:
    """Return a model with adapters "a" and "b", their factors random, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    for name in "ab":
        pl.attach(model, pl.LoRA(rank=1), name=name, activate="also")
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model, torch.randn(2, 3, dtype=torch.float64)


def test_merging_in_a_block() -> None:
    """An adapter merged in a block keeps the strength of the block when the block ends.

    A second merge, which folds both adapters again, changes no output.
    """
    model, x = small()
    with pl.using(model, a=0.5):
        pl.merge(model)
        inside = model(x)
    assert {row.scale for row in pl.summary(model).sites if row.adapter == "a"} == {0.5}
    pl.disable(model, "b")
    assert_near(model(x), inside)
    pl.enable(model, "b")
    both = model(x)
    pl.merge(model, "b")
    assert_near(model(x), both)
    pl.unmerge(model)
    assert_near(model(x), both)


def test_detaching_in_a_block() -> None:
    """A block that sets the strength of an adapter can be left after the adapter is detached."""
    model, _ = small()
    with pl.using(model, "b", a=0.5):
        pl.detach(model, "a")
        pl.scale(model, 2.0, "b")
    assert {(row.adapter, row.active, row.scale) for row in pl.summary(model).sites} == {
        ("b", True, 2.0)
    }


@pytest.mark.parametrize("alone", [True, False])
def test_attaching_in_a_block(alone: bool) -> None:
    """A block does not restore the state of an adapter onto a new one of the same name."""
    model, _ = small()
    if alone:
        pl.detach(model, "b")
    pl.scale(model, 3.0, "a")
    pl.disable(model, "a")
    with pl.enabled(model, "a"):
        pl.detach(model, "a")
        pl.attach(model, pl.LoRA(rank=1), name="a")
    rows = [row for row in pl.summary(model).sites if row.adapter == "a"]
    assert [(row.active, row.scale) for row in rows] == [(True, 1.0)] * 2
