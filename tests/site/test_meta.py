"""On the meta device an adapter can be attached, and nothing that would be lost can be loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import paramlora as pl


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def trained() -> nn.Sequential:
    """Return a model whose adapter has learned something."""
    model = plain()
    pl.attach(model, pl.LoRA(2), name="digits")
    with torch.no_grad():
        for factor in pl.parameters(model):
            factor.normal_()
    return model


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return plain()


def test_materialised_after_attaching(tmp_path: Path) -> None:
    """Attached on meta, materialised, base and factors loaded: the outputs are the original's."""
    expected, x = trained(), torch.randn(3, 4)
    pl.save(expected, tmp_path / "digits.safetensors", "digits")
    model = on_meta()
    pl.attach(model, pl.LoRA(2), name="digits")
    model.to_empty(device="cpu")
    pl.load_base_state_dict(model, pl.base_state_dict(expected))
    pl.load(model, tmp_path / "digits.safetensors")
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


def test_assigned_before_loading(tmp_path: Path) -> None:
    """A base on meta whose tensors are assigned can be loaded into as any other."""
    expected, x = trained(), torch.randn(3, 4)
    pl.save(expected, tmp_path / "digits.safetensors", "digits")
    model = on_meta()
    model.load_state_dict(pl.base_state_dict(expected), assign=True)
    pl.load(model, tmp_path / "digits.safetensors")
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "verb",
    [
        lambda m, path: pl.load_base_state_dict(m, plain().state_dict()),
        lambda m, path: pl.load_state_dict(m, pl.state_dict(trained(), "digits"), "digits"),
        lambda m, path: pl.load(m, path),
        lambda m, path: pl.load(m, path, name="other"),
        lambda m, path: pl.save(m, path.with_name("new.safetensors"), "digits"),
    ],
    ids=["load_base_state_dict", "load_state_dict", "load", "load a new one", "save"],
)
def test_what_would_be_lost_is_refused(
    verb: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    """Values are not loaded into, or saved from, tensors that hold none; and nothing changes."""
    pl.save(trained(), tmp_path / "digits.safetensors", "digits")
    model = on_meta()
    pl.attach(model, pl.LoRA(2), name="digits")
    before = str(pl.summary(model))
    with pytest.raises(pl.StateError, match=r"'0\..*' is on the meta device .* materialise"):
        verb(model, tmp_path / "digits.safetensors")
    assert str(pl.summary(model)) == before
    assert all(p.is_meta for p in model.parameters())
    assert not (tmp_path / "new.safetensors").exists()
