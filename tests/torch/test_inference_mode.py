"""Verbs inside of torch.inference_mode(): what they make can be trained outside of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl

Make = Callable[[nn.Module, Path], object]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def trained(model: nn.Module) -> nn.Module:
    pl.attach(model, pl.LoRA(rank=2), nn.Linear, name="digits")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pl.parameters(model):
            parameter.normal_(generator=generator)
    return model


def attach(model: nn.Module, folder: Path) -> None:
    pl.attach(model, {"0": pl.LoRA(2, init="pissa"), "2": pl.DoRA(2)}, name="digits")


def load(model: nn.Module, folder: Path) -> None:
    pl.load(model, folder / "digits.safetensors")


def load_twice(model: nn.Module, folder: Path) -> None:
    load(model, folder)
    load(model, folder)


def combine(model: nn.Module, folder: Path) -> None:
    load(model, folder)
    pl.combine(model, {"digits": 0.5}, name="weaker", activate="only")
    pl.detach(model, "digits")


def merge_and_unmerge(model: nn.Module, folder: Path) -> None:
    load(model, folder)
    pl.merge(model)
    pl.unmerge(model)


MAKING: dict[str, Make] = {
    "attach": attach,
    "load": load,
    "load values": load_twice,
    "load_peft": lambda model, folder: pl.load_peft(model, folder / "digits"),
    "combine": combine,
    "merge and unmerge": merge_and_unmerge,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of an adapter."""
    pl.save(trained(base()), tmp_path / "digits.safetensors", "digits")
    pl.save_peft(trained(base()), tmp_path / "digits", "digits")
    return tmp_path


@pytest.mark.parametrize("make", MAKING.values(), ids=MAKING.keys())
def test_factors_made_in_inference_mode(make: Make, folder: Path) -> None:
    """The factors get the gradients and the step of those that are made outside."""
    gradients = []
    for inference in (True, False):
        model, x = base(), torch.linspace(-1, 1, 8).view(2, 4)
        torch.manual_seed(2)
        with torch.inference_mode(inference):
            make(model, folder)
        optimizer = torch.optim.SGD(pl.parameters(model), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        gradients.append([parameter.grad for parameter in pl.parameters(model)])
    assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("fold", [pl.bake, pl.merge])
def test_weights_folded_in_inference_mode(fold: Callable[[nn.Module], None]) -> None:
    """Weights that contain an adapter are ordinary ones, which can be trained."""
    model, x = trained(base()), torch.randn(2, 4)
    expected = model(x)
    with torch.inference_mode():
        fold(model)
    assert_close(model(x), expected)
    factors = pl.parameters(model) if fold is pl.merge else []
    for factor in factors:
        factor.requires_grad_(False)
    for weight in set(model.parameters()) - set(factors):
        assert not weight.is_inference()
        weight.requires_grad_()
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_extract_in_inference_mode() -> None:
    """An extracted adapter can be trained."""
    tuned, model = base(), base()
    with torch.no_grad():
        next(tuned.parameters()).add_(torch.randn(5, 4))
    with torch.inference_mode():
        pl.extract(tuned, model, rank=2)
    model(torch.randn(2, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in pl.parameters(model))
