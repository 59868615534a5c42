"""Verbs on a part of a model, and on what was changed behind the adapters' back."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import paramlora as pl


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def shaken(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()


def flags(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


class TestParts:
    def test_detaching_the_whole_heals_what_a_part_left(self) -> None:
        """A part gives back its own flags; the whole then gives back all, and leaves no trace."""
        model = net()
        before = [set(vars(module)) for module in model.modules()]
        pl.attach(model, pl.LoRA(2), "0")
        pl.detach(model[0])
        assert flags(model) == [True, True, False, False]
        pl.detach(model)
        assert flags(model) == [True] * 4
        assert [set(vars(module)) for module in model.modules()] == before

    def test_baking_the_whole_heals_what_a_part_left(self) -> None:
        """After a part was baked, baking or detaching the whole gives back every flag."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        pl.bake(model[0])
        assert flags(model)[:2] == [True, True]
        pl.bake(model)
        assert flags(model) == [True] * 4

    def test_a_flag_set_between_two_attaches_comes_back(self) -> None:
        """What a user lets train after one attach, the detach of the next lets train again."""
        model = net()
        pl.attach(model, pl.LoRA(2), "0", name="a")
        model[2].bias.requires_grad_(True)
        pl.attach(model, pl.LoRA(2), "0", name="b")
        pl.detach(model, "b")
        assert model[2].bias.requires_grad
        assert not model[2].weight.requires_grad
        pl.detach(model)
        assert flags(model) == [True] * 4

    def test_what_parametrizations_consist_of_is_no_site(self) -> None:
        """A Linear inside a parametrization of somebody else's is left alone."""

        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4)

            def forward(self, weight: Tensor) -> Tensor:
                return self.inner(weight)

        model = net()
        parametrize.register_parametrization(model[0], "weight", Mixed())
        x = torch.randn(5, 4)
        expected, digest = model(x), pl.fingerprint(model)
        assert [row.site for row in pl.attach(model, pl.LoRA(2)).sites] == ["0.weight", "2.weight"]
        shaken(model)
        assert pl.fingerprint(model) == digest
        pl.disable(model)
        assert torch.equal(model(x), expected)

    def test_a_tie_that_was_adapted_on_one_side_is_refused(self) -> None:
        """Attaching to one side through a part is allowed; going on with the whole is refused."""
        model = Tied()
        pl.attach(model.head, pl.LoRA(2), name="a")
        shaken(model)
        weight = model.emb.weight.clone()
        for call in (
            lambda: pl.attach(model, pl.LoRA(2), "emb", name="b"),
            lambda: pl.merge(model),
        ):
            with pytest.raises(pl.StateError, match=r"'emb.weight' and 'head.weight' are tied"):
                call()
        assert torch.equal(model.emb.weight, weight)
        pl.detach(model)
        pl.attach(model, pl.LoRA(2), "emb", name="b")
        shaken(model)
        assert torch.equal(model.emb.weight, model.head.weight)


class TestMergedWeights:
    def test_a_write_while_merged_is_not_lost(self) -> None:
        """Unmerging is refused where it would lose what was written since; baking keeps that."""
        model = net()
        pl.attach(model, pl.LoRA(2), "0")
        shaken(model)
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

    def test_merging_keeps_the_memory_format(self) -> None:
        """A channels_last weight is one when merged, baked or unmerged."""
        layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        strides = layer.weight.stride()
        pl.attach(layer, pl.LoRA(2), "weight")
        shaken(layer)
        dense = layer.weight.detach().clone()
        pl.merge(layer)
        assert layer.weight.stride() == strides
        assert_close(layer.weight, dense)
        pl.bake(layer)
        assert layer.weight.stride() == strides


class TestInputs:
    def test_a_typo_in_exclude_is_refused(self) -> None:
        """An exclude that matches nothing is an error that names what there is."""
        with pytest.raises(
            pl.TargetError, match=r"exclude= matches nothing: no '2.wieght'.*2.weight"
        ):
            pl.attach(net(), pl.LoRA(2), exclude="2.wieght")

    def test_an_init_that_returns_is_refused(self) -> None:
        """An init that returns a tensor, and leaves A as it was, is an error."""
        model = net()
        with pytest.raises(ValueError, match=r"in place, as torch.nn.init.normal_ does"):
            pl.attach(model, pl.LoRA(2, init=torch.randn_like))
        assert not pl.summary(model).sites

    def test_numbers_of_numpy(self) -> None:
        """numpy's numbers are numbers, and become Python's, which a file can hold."""
        numpy = pytest.importorskip("numpy")
        spec = pl.LoRA(numpy.int64(4), numpy.float32(2))
        assert (type(spec.rank), type(spec.alpha), spec) == (int, float, pl.LoRA(4, 2.0))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_strength_that_is_no_number(self, bad: float) -> None:
        """Strengths that are not finite are refused, given as a number or as a tensor."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        for factor in (bad, torch.tensor(bad)):
            with pytest.raises(ValueError, match="finite number"):
                pl.scale(model, factor)

    def test_names_in_a_list(self) -> None:
        """A list of names is refused in words: names are separate arguments."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        with pytest.raises(TypeError, match=r"separate arguments.*\['default'\]"):
            pl.disable(model, ["default"])

    def test_assigning_a_tensor(self) -> None:
        """Assigning to an adapted tensor is refused with what to do in its place."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        with pytest.raises(NotImplementedError, match="load_base_state_dict, or detach"):
            model[0].weight = torch.zeros(3, 4)
