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
from tests.support.reference import KINDS, Case, Host, shake


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
