"""A kind of adapter that a user writes outside of the package is a kind like the others."""

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


@dataclass(frozen=True)
class Shift(pl.kinds.Spec):
    """W' = W + λ·h·(u 1ᵀ): one learned number for each row, at a step of h."""

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
def _no_leftovers() -> Iterator[None]:
    """Leave no class of a test behind that other tests would find among the imported kinds."""
    yield
    gc.collect()


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Conv1d(1, 3, 2), nn.Flatten())


def test_it_loads_where_its_class_is_imported(tmp_path: Path) -> None:
    """Saved with its own fields, a kind of one's own loads by its class's name."""
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


@pytest.mark.usefixtures("_no_leftovers")
def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    """Where a file's kind could be either of two classes, loading says so and changes nothing."""
    net, other = model(), model()
    pl.attach(net, Shift(), "0")
    pl.save(net, tmp_path / "mine.safetensors")
    before = pl.fingerprint(other)
    # A class of the same name in another place, as a second library might have one.
    twin = type("Shift", (pl.Delta,), {"__module__": "another"})
    with pytest.raises(pl.CheckpointError, match=r"several classes of that name: another\.Shift, "):
        pl.load(other, tmp_path / "mine.safetensors")
    assert (pl.fingerprint(other), pl.summary(other).sites) == (before, ())
    del twin


def test_a_class_that_is_not_imported_is_named(tmp_path: Path) -> None:
    """Where no class has the name of a file's kind, the error names it and says what to do."""
    net = model()
    pl.attach(net, Shift(), "0")
    pl.save(net, tmp_path / "mine.safetensors")
    content = (tmp_path / "mine.safetensors").read_bytes().replace(b"Shift", b"Swift")
    (tmp_path / "mine.safetensors").write_bytes(content)
    message = "kind 'Swift' at '0.weight', and no imported class of that name .* Shift.*; import it"
    with pytest.raises(pl.CheckpointError, match=message):
        pl.load(model(), tmp_path / "mine.safetensors")


def test_it_stands_beside_others() -> None:
    """Without a factored form it goes by W': beside other kinds, merged, and switched off."""
    net, x = model(), torch.randn(4, 1, 6)
    base = net(x)
    pl.attach(net, pl.LoRA(rank=2), "0", name="lora")
    pl.attach(net, Shift(), ["0", "1"], name="mine")
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
