"""A kind of adapter defined outside the package works like the built-in ones."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import paramlora as pl
from tests.support.helpers import new_garbage_only


@dataclass(frozen=True)
class Shift(pl.kinds.Spec):
    """W' = W + λ·h·(u 1ᵀ): one learned number for each row, times a step h."""

    step: float = 0.5

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {
            "u": torch.zeros(len(weight), dtype=pl.kinds.factor_dtype(weight), device=weight.device)
        }

    def apply(
        self, weight: Tensor, factors: pl.kinds.Factors, strength: pl.kinds.Strength = 1.0
    ) -> Tensor:
        u = factors["u"].view(-1, *[1] * (weight.dim() - 1))
        return pl.kinds.add_update(weight, strength * self.step * u)


@pytest.fixture
def _collect_classes() -> Iterator[None]:
    """Delete the classes that a test defines: `load` looks for kinds among all classes."""
    with new_garbage_only():
        yield
        gc.collect()


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Conv1d(1, 3, 2), nn.Flatten())


def test_save_and_load(tmp_path: Path) -> None:
    """A custom kind is saved with its own fields and loads by the name of its class."""
    net, other, x = model(), model(), torch.randn(4, 1, 6)
    found = pl.attach(net, Shift(step=0.25), ["0", "1"], name="mine")
    assert [row.kind for row in found.sites] == ["Shift", "Shift"]
    with torch.no_grad():
        for factor in pl.parameters(net):
            factor.normal_()
    pl.scale(net, 0.7)
    pl.save(net, tmp_path / "mine.safetensors", "mine")
    pl.load(other, tmp_path / "mine.safetensors")
    assert_close(other(x), net(x))
    expected = net[0].parametrizations.weight.original + 0.7 * 0.25 * pl.parameters(net)[0][:, None]
    assert_close(net[0].weight, expected)


@pytest.mark.usefixtures("_collect_classes")
def test_two_classes_of_one_name(tmp_path: Path) -> None:
    """If two classes have the name of a file's kind, loading raises and changes nothing."""
    net, other = model(), model()
    pl.attach(net, Shift(), "0")
    pl.save(net, tmp_path / "mine.safetensors")
    before = pl.fingerprint(other)
    # A class of the same name in another module, as a second library may define it.
    namesake = type("Shift", (pl.Delta,), {"__module__": "another"})
    with pytest.raises(pl.CheckpointError, match=r"several classes of that name: another\.Shift, "):
        pl.load(other, tmp_path / "mine.safetensors")
    assert (pl.fingerprint(other), pl.summary(other).sites) == (before, ())
    del namesake


def test_beside_another_kind() -> None:
    """A custom kind without a factored form works together with LoRA: merged, off and detached."""
    net, x = model(), torch.randn(4, 1, 6)
    base = net(x)
    pl.attach(net, pl.LoRA(rank=2), "0", name="lora")
    pl.attach(net, Shift(), ["0", "1"], name="mine", activate="also")
    assert torch.equal(net(x), base)
    with torch.no_grad():
        for factor in pl.parameters(net):
            factor.normal_()
    on = net(x)
    with pl.merged(net):
        assert_close(net(x), on)
    with pl.disabled(net):
        assert torch.equal(net(x), base)
    pl.detach(net, "mine")
    assert not torch.allclose(net(x), on)
