"""The invariants on what must not touch what: copies (6), adapters and states (7), ties (8)."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import Mixed, assert_bits, attach_two, fields, flags, mixed, train, values
from tests.support.reference import loss, shake


def changes(tmp_path: Path) -> dict[str, Callable[[Mixed, Tensor], object]]:
    """Return what can be done to a model with the adapters of `attach_two`, by name."""
    source, _ = mixed()
    attach_two(source.eval())
    shake(source)
    pl.save(source, tmp_path / "low.safetensors", "low")

    def merge_and_unmerge(model: Mixed, x: Tensor) -> None:
        pl.merge(model)
        pl.unmerge(model)

    def load_base(model: Mixed, x: Tensor) -> None:
        state = pl.base_state_dict(model)
        pl.load_base_state_dict(model, {key: value + 1 for key, value in state.items()})

    return {
        "attach": lambda model, x: pl.attach(model, pl.LoRA(rank=1), name="more"),
        "attach_elsewhere": lambda model, x: pl.attach(model, pl.Delta(), "norm", name="more"),
        "detach": lambda model, x: pl.detach(model),
        "detach_one": lambda model, x: pl.detach(model, "low"),
        "disable": lambda model, x: pl.disable(model, "full"),
        "scale": lambda model, x: pl.scale(model, 0.5),
        "merge": lambda model, x: pl.merge(model),
        "merge_and_unmerge": merge_and_unmerge,
        "bake": lambda model, x: pl.bake(model),
        "freeze": lambda model, x: pl.freeze(model, "full"),
        "train": lambda model, x: train(model, x),
        "load": lambda model, x: pl.load(model, tmp_path / "low.safetensors"),
        "load_base": load_base,
        "normalise": lambda model, x: spectral_norm(model.head),
        "double": lambda model, x: model.double(),
        "hook": lambda model, x: model.head.register_forward_hook(lambda *_: None),
    }


CHANGES = [
    *("attach", "attach_elsewhere", "detach", "detach_one", "disable", "scale", "merge"),
    *("merge_and_unmerge", "bake", "freeze", "train", "load", "load_base", "normalise"),
    *("double", "hook"),
]


# What is refused while an adapter is merged.
REFUSED = {"detach", "detach_one", "disable", "scale", "merge", "merge_and_unmerge", "load"}
REFUSED |= {"load_base", "train"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("started", ["attached", "merged", "normed"])
def test_6_a_deep_copy_is_independent(change: str, started: str, tmp_path: Path) -> None:
    """Whatever is done to a copy leaves the original alone, and the other way round."""
    for done_to_the_copy in (True, False):
        model, x = mixed()
        if started == "normed":
            weight_norm(model.head)
        attach_two(model.eval())
        shake(model)
        if started == "merged" and change not in REFUSED:
            pl.merge(model)
        model(x)
        other = copy.deepcopy(model)
        assert_bits(other(x), model(x))
        changed, kept = (other, model) if done_to_the_copy else (model, other)
        expected = kept(x).detach()
        with unchanged(kept):
            changes(tmp_path)[change](changed, x)
        assert_bits(kept(x).detach(), expected)
        assert_bits(copy.deepcopy(changed)(x.clone()), changed(x))
        pl.unmerge(kept)
        pl.detach(kept)
        assert type(kept.embed) is nn.Embedding


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


class Tied(nn.Module):
    """A model whose head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("side", ["embed", "head", "*"])
@pytest.mark.parametrize("spec", [pl.LoRA(rank=2, alpha=3), pl.Delta()])
def test_8_tied_weights_stay_tied(side: str, spec: pl.kinds.Spec) -> None:
    """An adapter on either side is seen on both, its gradients add up, and the tie outlives it."""
    torch.default_generator.manual_seed(0)
    model, ids = Tied().double(), torch.randint(11, (4,))
    weight, state = model.embed.weight, copy.deepcopy(model.state_dict())
    with unchanged(model):
        pl.attach(model, spec, [side] if side != "*" else ["embed", "head"])
        shake(model)
        W, bias = weight.detach(), model.head.bias.detach()
        leaves = [p.detach().clone().requires_grad_() for p in pl.parameters(model)]
        dense = W + (leaves[0] if len(leaves) == 1 else 1.5 * leaves[1] @ leaves[0])
        assert_close(model.embed.weight, dense)
        assert_close(model.head.weight, dense)
        expected = dense[ids] @ dense.T + bias
        assert_close(model(ids), expected)
        actual = torch.autograd.grad(loss([model(ids)]), pl.parameters(model))
        assert_close(actual, torch.autograd.grad(loss([expected]), leaves))
        with pl.merged(model):
            assert model.embed.weight is model.head.weight
            assert_close(model(ids), expected)
        with pytest.raises(pl.StateError, match=r"embed\.weight, head\.weight are tied"):
            pl.detach(model.head)
        pl.detach(model)
    assert model.embed.weight is model.head.weight is weight
    assert_bits(model.state_dict(), state)
