"""Weights that two layers share have one adapter, which both layers see."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import (
    outputs,
    unchanged,
)
from tests.support.mixed import assert_bits
from tests.support.reference import KINDS, Case, Host, loss, shake


class Tied(nn.Module):
    """An embedding and a head that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


TIED = Host(Tied, lambda: (torch.randint(11, (4, 3)),))


class TestTied:
    """An embedding and a head share a weight; see also invariant 8."""

    @pytest.mark.parametrize("merged", [False, True])
    def test_copied_and_cast(self, merged: bool) -> None:
        """After a copy or a cast, both layers still share one stored weight and one adapter."""
        case = Case.of(TIED)
        case.attach(KINDS["lora"], targets="embed", strength=0.7)
        if merged:
            pl.merge(case.model)
        for model in (copy.deepcopy(case.model), case.model):
            model.float().double()
            lists = [layer.parametrizations.weight for layer in (model.embed, model.head)]
            assert lists[0].original is lists[1].original
            assert lists[0][0] is lists[1][0]
            shake(model)
            pl.unmerge(model)
            assert_bits(model.embed.weight, model.head.weight)
            pl.detach(model)
            assert model.embed.weight is model.head.weight

    def test_saved(self, tmp_path: Path) -> None:
        """The adapter is counted and saved once, and loads into both layers of a tied model."""
        case = Case.of(TIED)
        rows = pl.attach(case.model, pl.LoRA(rank=2), ["head", "embed"], name="one").sites
        assert [row.site for row in rows] == ["embed.weight"]
        assert len(pl.parameters(case.model)) == 2
        shake(case.model)
        pl.save(case.model, tmp_path / "tied.safetensors", "one")
        pl.load(case.plain, tmp_path / "tied.safetensors")
        assert_bits(outputs(case, case.plain), outputs(case))
        assert pl.base_state_dict(case.plain).keys() == Tied().state_dict().keys()

    def test_untied(self) -> None:
        """`to_empty` unties the layers; merging, which would reach only one, then raises."""
        model = Tied().to("meta")
        assert model.to_empty(device="cpu").head.weight is not model.embed.weight
        model.head.weight = model.embed.weight
        pl.attach(model, pl.LoRA(rank=2), "embed")
        model.to("meta").to_empty(device="cpu")
        refused = pytest.raises(
            pl.StateError, match=r"'head\.weight' and 'embed\.weight' were tied"
        )
        with unchanged(model), refused:
            pl.merge(model)
        pl.detach(model)
        assert type(model.head) is nn.Linear

    def test_adapting_the_head_adapts_the_embedding(self) -> None:
        """An adapter of the head acts on the tied embedding too, whether merged or not.

        In PEFT, merging an adapter of the head also changes the embedding, which has no adapter
        (PEFT issue 2018).
        """
        model: Any = nn.ModuleDict(
            {"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        bits = model["embed"].weight.detach().clone()
        pl.attach(model, LoRA(rank=2), "head")
        shake(model)
        adapted, ids = model["head"].weight.detach().clone(), torch.arange(7)
        for _ in range(2):
            assert_close(model["embed"](ids), adapted)
            with pl.merged(model):
                assert_bits(model["embed"](ids).detach(), adapted)
                assert_bits(model["head"].weight.detach(), adapted)
            with pl.disabled(model):
                assert_bits(model["embed"](ids).detach(), bits)


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
