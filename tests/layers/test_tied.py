"""Tied weights: two layers share one stored weight and one adapter."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from paramlora.site.find import stack_of
from tests.support.helpers import outputs, refuses, unchanged
from tests.support.mixed import assert_bits
from tests.support.models import Tied
from tests.support.reference import KINDS, Case, Host, loss, shake

TIED = Host(Tied, lambda: (torch.randint(7, (4, 3)),))


@pytest.mark.parametrize("side", ["emb", "head", "*"])
@pytest.mark.parametrize("spec", [pl.LoRA(rank=2, alpha=3), pl.Delta()])
def test_adapter_of_either_side(side: str, spec: pl.kinds.Spec) -> None:
    """An adapter of either layer acts on both, its gradients add up, and detaching keeps the tie.

    In PEFT, merging an adapter of the head also changes the embedding, which has no adapter
    (PEFT issue 2018).
    """
    torch.default_generator.manual_seed(0)
    model, ids = Tied().double(), torch.randint(7, (4,))
    weight, state = model.emb.weight, copy.deepcopy(model.state_dict())
    with unchanged(model):
        pl.attach(model, spec, [side] if side != "*" else ["emb", "head"])
        shake(model)
        W = weight.detach().clone()
        leaves = [p.detach().clone().requires_grad_() for p in pl.parameters(model)]
        dense = W + (leaves[0] if len(leaves) == 1 else 1.5 * leaves[1] @ leaves[0])
        assert_close(model.emb.weight, dense)
        assert_close(model.head.weight, dense)
        expected = dense[ids] @ dense.T
        assert_close(model(ids), expected)
        actual = torch.autograd.grad(loss([model(ids)]), pl.parameters(model))
        assert_close(actual, torch.autograd.grad(loss([expected]), leaves))
        with pl.merged(model):
            assert model.emb.weight is model.head.weight
            assert_close(model.emb.weight, dense)
            assert_close(model(ids), expected)
        with pl.disabled(model):
            assert_bits(model.emb(ids), W[ids])
        with pytest.raises(pl.StateError, match=r"emb\.weight, head\.weight are tied"):
            pl.detach(model.head)
        pl.detach(model)
    assert model.emb.weight is model.head.weight is weight
    assert_bits(model.state_dict(), state)


@pytest.mark.parametrize("merged", [False, True])
def test_copy_and_cast(merged: bool) -> None:
    """After a copy or a cast, both layers still share one stored weight and one adapter."""
    case = Case.of(TIED)
    case.attach(KINDS["lora"], targets="emb", strength=0.7)
    if merged:
        pl.merge(case.model)
    for model in (copy.deepcopy(case.model), case.model):
        model.float().double()
        lists = [layer.parametrizations.weight for layer in (model.emb, model.head)]
        assert lists[0].original is lists[1].original
        assert stack_of(lists[0]) is stack_of(lists[1])
        shake(model)
        pl.unmerge(model)
        assert_bits(model.emb.weight, model.head.weight)
        pl.detach(model)
        assert model.emb.weight is model.head.weight


def test_save_and_load(tmp_path: Path) -> None:
    """The adapter is counted and saved once, and loads into both layers of a tied model."""
    case, file = Case.of(TIED), tmp_path / "tied.safetensors"
    rows = pl.attach(case.model, pl.LoRA(rank=2), ["head", "emb"], name="one").sites
    assert [row.site for row in rows] == ["emb.weight"]
    assert len(pl.parameters(case.model)) == 2
    shake(case.model)
    pl.save(case.model, file, "one")
    assert list(load_file(file)) == ["emb.weight.A", "emb.weight.B"]
    pl.load(case.plain, file)
    assert_bits(outputs(case, case.plain), outputs(case))
    assert pl.base_state_dict(case.plain).keys() == Tied().state_dict().keys()


def test_untied_by_to_empty() -> None:
    """`to_empty` unties the layers; merging, which would reach only one of them, then raises."""
    model = Tied().to("meta")
    assert model.to_empty(device="cpu").head.weight is not model.emb.weight
    model.head.weight = model.emb.weight
    pl.attach(model, pl.LoRA(rank=2), "emb")
    model.to("meta").to_empty(device="cpu")
    refuses(
        model,
        pl.merge,
        pl.StateError,
        "cannot merge: 'head.weight' and 'emb.weight' were tied when their adapter was attached, "
        "and are not any more (to_empty unties, for one); detach, tie them again and attach",
    )
    pl.detach(model)
    assert type(model.head) is nn.Linear


def test_adapter_of_one_side_only() -> None:
    """An adapter attached to one side through a part can be detached; then both can be adapted."""
    model = Tied()
    pl.attach(model.head, pl.LoRA(2), name="a")
    shake(model)
    assert not torch.equal(model.emb.weight, model.head.weight)
    pl.detach(model)
    pl.attach(model, pl.LoRA(2), "emb", name="b")
    shake(model)
    assert torch.equal(model.emb.weight, model.head.weight)
