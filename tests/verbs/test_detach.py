"""`detach` is the exact inverse of `attach`, of the whole model and of its parts."""

from typing import Any

import pytest
from torch import nn

import paramlora as pl
from tests.support.helpers import unchanged
from tests.support.mixed import MATRICES, attach_two, flags, mixed, train


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_exact_inverse() -> None:
    """Detaching restores classes, parameter identity and order, flags, hooks and bits."""
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


def test_several_tensors_of_one_module() -> None:
    """Detaching from a module with several adapted tensors restores all of them."""
    model: Any = nn.LSTM(4, 4, num_layers=2)
    names = [name for name, _ in model.named_parameters()]
    pl.attach(model, pl.Delta(), "*")
    assert len(model.parametrizations) == len(names) == 8
    pl.detach(model)
    assert type(model) is nn.LSTM
    assert [name for name, _ in model.named_parameters()] == names


def test_detach_a_part_then_the_whole() -> None:
    """Detaching from a part restores its flags; detaching from the whole then restores all."""
    model = net()
    before = [set(vars(module)) for module in model.modules()]
    pl.attach(model, pl.LoRA(2), "0")
    pl.detach(model[0])
    assert flags(model) == [True, True, False, False]
    pl.detach(model)
    assert flags(model) == [True] * 4
    assert [set(vars(module)) for module in model.modules()] == before


def test_bake_a_part_then_the_whole() -> None:
    """Baking a part restores its flags; baking the whole then restores all."""
    model = net()
    pl.attach(model, pl.LoRA(2))
    pl.bake(model[0])
    assert flags(model)[:2] == [True, True]
    pl.bake(model)
    assert flags(model) == [True] * 4


def test_bake_what_an_adapter_elsewhere_froze() -> None:
    """Baking gives back all flags, also those that an adapter of a part baked before froze."""
    model = net()
    base = list(model.parameters())
    pl.attach(model, pl.LoRA(2), "0", name="a")
    pl.attach(model, pl.LoRA(2), "2", name="b", activate="also")
    pl.bake(model[0])
    assert [p.requires_grad for p in base] == [True, True, False, False]
    pl.bake(model)
    assert all(p.requires_grad for p in base)


@pytest.mark.parametrize("first", ["a", "b"])
def test_base_below_the_other_adapter(first: str) -> None:
    """Detaching one of two adapters leaves the base frozen for the other one."""
    model = net()
    base = list(model.parameters())
    pl.attach(model, pl.LoRA(2), "0", name="a")
    pl.attach(model, pl.LoRA(2), "0", name="b", activate="also")
    pl.detach(model, first)
    assert not any(p.requires_grad for p in base)
    pl.detach(model)
    assert all(p.requires_grad for p in base)


def test_flag_set_between_two_attaches() -> None:
    """A parameter unfrozen by the user after one attach is trained again after the next detach."""
    model = net()
    pl.attach(model, pl.LoRA(2), "0", name="a")
    model[2].bias.requires_grad_(True)
    pl.attach(model, pl.LoRA(2), "0", name="b")
    pl.detach(model, "b")
    assert model[2].bias.requires_grad
    assert not model[2].weight.requires_grad
    pl.detach(model)
    assert flags(model) == [True] * 4
