"""`detach` is the exact inverse of `attach`, of the whole model and of its parts."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import MATRICES, assert_bits, attach_two, flags, mixed, train


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def shaken(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_()


class TestInvariant4:
    """Detaching is the exact inverse of attaching."""

    def test_4_all_is_given_back(self) -> None:
        """Class, parameter identity, order, requires_grad, hooks and bits are as they were."""
        model, x = mixed()
        model.eval()
        model.table.requires_grad_(False)
        model.head.register_forward_hook(lambda *_: None)
        model.rnn.register_forward_pre_hook(lambda *_: None)
        model.embed.register_full_backward_hook(lambda *_: None)
        model.head.weight.register_hook(lambda grad: grad)
        with unchanged(model):
            attach_two(model)
            train(model, x)
            pl.detach(model, "low")
            pl.attach(model, pl.LoRA(rank=1), MATRICES, name="low")
            pl.disable(model, "full")
            pl.merge(model, "low")
            pl.unmerge(model)
            pl.detach(model)
        assert model.head.weight._backward_hooks

    def test_4_all_tensors_of_one_module(self) -> None:
        """Detaching from a module with several adapted tensors restores all of them."""
        model: Any = nn.LSTM(4, 4, num_layers=2)
        names = [name for name, _ in model.named_parameters()]
        pl.attach(model, pl.Delta(), "*")
        assert len(model.parametrizations) == len(names) == 8
        pl.detach(model)
        assert type(model) is nn.LSTM
        assert [name for name, _ in model.named_parameters()] == names

    @pytest.mark.parametrize("foreign", [weight_norm, spectral_norm])
    @pytest.mark.parametrize("freeze", [True, False])
    def test_4_foreign_ones_from_before_stay(
        self, foreign: Callable[[nn.Module], nn.Module], freeze: bool
    ) -> None:
        """A weight_norm or spectral_norm from before stays, with its class and its bits."""
        model, x = mixed()
        foreign(model.eval().head)
        weight = model.head.weight.detach().clone()
        with unchanged(model):
            attach_two(model, freeze=freeze)
            assert_bits(model.head.weight.detach(), weight)
            train(model, x)
            assert not torch.equal(model.head.weight, weight)
            pl.detach(model)
            model.zero_grad()
        assert_bits(model.head.weight.detach(), weight)

    @pytest.mark.parametrize(("foreign", "parts"), [(weight_norm, 2), (spectral_norm, 1)])
    def test_4_foreign_ones_from_after_stay(
        self, foreign: Callable[[nn.Module], nn.Module], parts: int
    ) -> None:
        """One that is registered after ours stays and works as on the plain layer."""
        model, x = mixed()
        plain = copy.deepcopy(model.eval())
        attach_two(model)
        torch.manual_seed(1)
        foreign(model.head)
        torch.manual_seed(1)
        foreign(plain.head)
        train(model, x)
        pl.detach(model)
        assert len([n for n, _ in model.head.named_parameters() if "original" in n]) == parts
        assert_bits(model.state_dict(), plain.state_dict())
        assert_bits(model(x), plain(x))
        assert flags(model) == flags(plain)


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
