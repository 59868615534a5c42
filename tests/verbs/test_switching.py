"""Switching adapters on, off and to a strength: what it changes, and what it leaves."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import (
    Mixed,
    assert_bits,
    attach_two,
    fields,
    flags,
    mixed,
    values,
)
from tests.support.reference import shake
from tests.support.reference_model import close

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_1_new_or_off_is_the_base(
    dtype: torch.dtype, training: bool, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Outputs are bitwise the base's after attach before training; with adapters off, always."""
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


class TestInvariant7:
    """Active, trainable and merged are three states, and adapters do not touch each other."""

    @staticmethod
    def model() -> tuple[Mixed, Tensor]:
        model, x = mixed()
        attach_two(model.eval())
        shake(model)
        pl.freeze(model, "full")
        next(iter(pl.parameters(model, "low"))).requires_grad_(False)
        return model, x

    @pytest.mark.parametrize("names", [(), ("low",), ("low", "full")])
    def test_7_toggling_leaves_requires_grad(self, names: tuple[str, ...]) -> None:
        """No toggle, scale or merge touches requires_grad; names decide what it touches."""
        model, _ = self.model()
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

    @pytest.mark.parametrize("block", [pl.enabled, pl.disabled, pl.using])
    def test_7_contexts_end_where_they_began(
        self, block: Callable[..., AbstractContextManager[None]]
    ) -> None:
        """A context manager restores all: normally, after an exception inside, and nested."""
        model, x = self.model()
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

    def test_7_merged_ends_where_it_began(self) -> None:
        """Merged, too: normally, after an exception inside, and within other contexts."""
        model, x = self.model()
        with unchanged(model), pl.merged(model):
            model(x)
        error = pytest.raises(ZeroDivisionError, match="inside")
        with unchanged(model), error, pl.merged(model, "low"):
            raise ZeroDivisionError("inside")
        with unchanged(model), pl.using(model, full=0.5), unchanged(model), pl.merged(model):
            model(x)

    def test_7_toggles_act_on_what_is_there_now(self) -> None:
        """Modules that were moved, replaced, removed or put in twice are toggled where they are."""
        one, other = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
        for model in (one, other):
            pl.attach(model, pl.LoRA(rank=1), name="low")
            pl.disable(model)
        layers = [*one, *other]

        def active(*models: nn.Module) -> list[bool]:
            """Return which of the four layers are on after all of the given models are toggled."""
            for model in models:
                pl.enable(model, "low")
            found = [bool(layer.parametrizations.weight[0].active) for layer in layers]
            for model in (one, other, *layers):
                pl.disable(model)
            return found

        assert active(one) == [True, True, False, False]
        assert active(one[1]) == [False, True, False, False]
        one[1], other[1] = other[1], one[1]
        assert active(one) == [True, False, False, True]
        one.append(other)
        assert active(one) == [True, True, True, True]
        del one._modules["1"]
        assert active(one) == [True, True, True, False]
        one.again, other.up = other[1], one
        assert active(one) == active(other) == [True, True, True, False]
        del one.again, one[1]
        assert active(one) == [True, False, False, False]
        one._modules = {"only": layers[3]}
        assert active(one, layers[2]) == [False, False, True, True]

    def test_7_verbs_keep_no_model(self) -> None:
        """What verbs were called on is freed when it is let go of, the whole and a part."""
        model, x = self.model()
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

    def test_7_freezing_leaves_what_is_active(self) -> None:
        """Freezing and unfreezing change requires_grad of the named factors and nothing else."""
        for prepare in (lambda m: None, pl.disable, pl.merge):
            model, x = self.model()
            prepare(model)
            before, outputs = fields(model), model(x).detach()
            pl.unfreeze(model)
            pl.freeze(model, "low")
            assert not any(parameter.requires_grad for parameter in pl.parameters(model, "low"))
            assert all(parameter.requires_grad for parameter in pl.parameters(model, "full"))
            assert fields(model) == before
            assert_bits(model(x).detach(), outputs)

    def test_7_loading_one_leaves_the_others(self, tmp_path: Path) -> None:
        """Loading an adapter, from a file or a state dict, changes its own values alone."""
        model, _ = self.model()
        pl.attach(model, pl.LoRA(rank=1), "head", name="off")
        pl.disable(model, "off")
        pl.scale(model, 0.25, "full")
        pl.save(model, tmp_path / "low.safetensors", "low")
        saved, other = values(model, "low"), values(model, "full")
        before, rows = flags(model), fields(model)
        for load in (
            lambda: pl.load(model, tmp_path / "low.safetensors"),
            lambda: pl.load_state_dict(model, saved, "low"),
        ):
            shake(model, "low")
            assert not torch.equal(values(model, "low")["head.weight.A"], saved["head.weight.A"])
            load()
            assert_bits(values(model, "low"), saved)
            assert_bits(values(model, "full"), other)
            assert (flags(model), fields(model)) == (before, rows)
        shake(model, "full")
        assert_bits(values(model, "low"), saved)


def small() -> tuple[nn.Sequential, Tensor]:
    """Return a model with adapters "a" and "b" that do something, and an input for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    for name in "ab":
        pl.attach(model, pl.LoRA(rank=1), name=name)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()
    return model, torch.randn(2, 3, dtype=torch.float64)


def test_merging_inside_of_using_keeps_the_strength() -> None:
    """What is merged at a strength keeps that strength when the context ends, so that a second
    merge, which folds both anew, changes no output."""
    model, x = small()
    with pl.using(model, a=0.5):
        pl.merge(model)
        inside = model(x)
    assert {row.scale for row in pl.summary(model).sites if row.adapter == "a"} == {0.5}
    pl.disable(model, "b")
    close(model(x), inside)
    pl.enable(model, "b")
    both = model(x)
    pl.merge(model, "b")
    close(model(x), both)
    pl.unmerge(model)
    close(model(x), both)


@pytest.mark.parametrize("alone", [True, False])
def test_attaching_inside_of_a_context_what_was_detached_there(alone: bool) -> None:
    """A context puts back what it found, not what is attached inside under the same name, be it
    alone at its tensor or not."""
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
