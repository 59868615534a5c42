"""Adapter files restore what was saved, and other programs can read them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import paramlora as pl
from paramlora import Delta, LoRA
from paramlora.stack.factors import Factors
from tests.support.helpers import bits, unchanged
from tests.support.models import Net, attached, plain
from tests.support.reference import shake


@dataclass(frozen=True)
class Half(pl.kinds.Spec):
    """A custom kind: W' = W + λ·H/share, H a full tensor."""

    share: float = 2.0
    note: str | None = None

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"H": torch.zeros_like(weight, dtype=pl.kinds.factor_dtype(weight))}

    def apply(self, weight: Tensor, factors: Any, strength: Any = 1.0) -> Tensor:
        return pl.kinds.add_update(weight, strength / self.share * factors["H"])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of the model as its attributes return them."""
    found = {}
    for path, _ in Net().named_parameters():
        owner, _, name = path.rpartition(".")
        found[path] = getattr(model.get_submodule(owner), name).detach()
    return found


SPECS: dict[str, Any] = {
    "kaiming": LoRA(rank=2),
    "gaussian": LoRA(rank=3, alpha=0.5, init="gaussian"),
    "gaussian/sqrt_r": LoRA(rank=1, init="gaussian/sqrt_r"),
    "orthogonal": LoRA(rank=2, alpha=4, init="orthogonal", rank_stabilized=True),
    "a callable": LoRA(rank=2, init=nn.init.xavier_normal_),
    "rank above the smaller side": LoRA(rank=9),
    "delta": Delta(),
    "a mapping": {
        "fc1": LoRA(rank=2),
        "fc?.bias": Delta(),
        "rnn.weight*": LoRA(rank=1),
        "gain": Half(share=4.0, note="as in the thesis"),
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_round_trip(tmp_path: Path, spec: Any, dtype: torch.dtype) -> None:
    """An adapter loads into a copy of the base bit for bit, with its settings and strength."""
    model, other = plain().to(dtype), plain().to(dtype)
    pl.attach(model, spec, name="digits")
    shake(model)
    pl.scale(model, 0.75)
    pl.save(model, tmp_path / "digits.safetensors", "digits")
    summary = pl.load(other, tmp_path / "digits.safetensors")
    assert summary == pl.summary(model)
    torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)
    expected = pl.state_dict(model, "digits")
    torch.testing.assert_close(pl.state_dict(other, "digits"), expected, rtol=0, atol=0)
    assert {p.dtype for p in pl.parameters(other)} == {p.dtype for p in pl.parameters(model)}
    assert all(p.requires_grad for p in pl.parameters(other))
    pl.detach(other)
    assert pl.fingerprint(other) == pl.fingerprint(model)


@pytest.mark.parametrize("peft", [False, True], ids=["file", "PEFT folder"])
def test_factors_that_share_memory(tmp_path: Path, peft: bool) -> None:
    """Factors that share memory are saved at each place, and loaded as factors of their own."""
    model, other = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    pl.attach(model, LoRA(rank=2))
    shake(model)
    first, second = (m for m in model.modules() if isinstance(m, Factors))
    second.A.data = first.A.data
    if peft:
        pl.save_peft(model, tmp_path / "tied")
        pl.load_peft(other, tmp_path / "tied")
    else:
        pl.save(model, tmp_path / "tied.safetensors")
        pl.load(other, tmp_path / "tied.safetensors")
    torch.testing.assert_close(pl.state_dict(other), pl.state_dict(model), rtol=0, atol=0)


def test_loading_draws_nothing(tmp_path: Path) -> None:
    """Loading calls no init and does not advance the global generator."""
    model, path = plain(), tmp_path / "digits.safetensors"
    pl.attach(model, LoRA(rank=2, init=nn.init.xavier_normal_))
    pl.save(model, path)
    other = plain()
    before = torch.get_rng_state()
    pl.load(other, path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(pl.state_dict(other), pl.state_dict(model), rtol=0, atol=0)


def test_several_adapters(tmp_path: Path) -> None:
    """Several adapters, one file each, load in any order and add up to the same weights."""
    model, other = attached(), plain()
    pl.enable(model)
    pl.scale(model, -0.5, "letters")
    for name in ("letters", "digits"):
        pl.save(model, tmp_path / name, name)
        pl.load(other, tmp_path / name, activate="also")
    torch.testing.assert_close(weights(other), weights(model))
    assert {(row.site, row.adapter, row.scale) for row in pl.summary(other).sites} == {
        (row.site, row.adapter, row.scale) for row in pl.summary(model).sites
    }


def test_other_names(tmp_path: Path) -> None:
    """One file can be loaded under two names."""
    model, other = attached(), plain()
    pl.save(model, tmp_path / "digits", "digits")
    pl.load(other, tmp_path / "digits", name="one")
    pl.load(other, tmp_path / "digits", name="two")
    digits = pl.state_dict(model, "digits")
    for name in ("one", "two"):
        torch.testing.assert_close(pl.state_dict(other, name), digits, rtol=0, atol=0)
    with pl.using(other, "two"):
        torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)


@pytest.mark.parametrize("state", ["off", "merged", "frozen"])
def test_saving_is_independent_of_state(tmp_path: Path, state: str) -> None:
    """The saved adapter is the same whether it is on, off, merged or frozen."""
    model = attached()
    pl.save(model, tmp_path / "on", "digits")
    {"off": pl.disable, "merged": pl.merge, "frozen": pl.freeze}[state](model, "digits")
    with unchanged(model):
        pl.save(model, tmp_path / state, "digits")
    other, third = plain(), plain()
    assert pl.load(other, tmp_path / "on") == pl.load(third, tmp_path / state)
    torch.testing.assert_close(weights(third), weights(other), rtol=0, atol=0)


def test_reading_without_torch(tmp_path: Path) -> None:
    """A file is plain safetensors: factors by site, and JSON with their settings."""
    model, path = attached(), tmp_path / "digits.safetensors"
    pl.scale(model, 0.5, "digits")
    pl.save(model, path, "digits")
    code = """
import json, sys
from safetensors.numpy import load_file
from safetensors import safe_open
tensors = load_file(sys.argv[1])
with safe_open(sys.argv[1], framework="np") as file:
    content = json.loads(file.metadata()["paramlora"])
site = content["sites"]["fc2.weight"]
rank, alpha = site["fields"]["rank"], site["fields"]["alpha"]
scale = site["strength"] * (rank if alpha is None else alpha) / rank
print(json.dumps({
    "modules": sorted({"torch", "paramlora"} & set(sys.modules)),
    "content": content,
    "update": (scale * tensors["fc2.weight.B"] @ tensors["fc2.weight.A"]).tolist(),
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["modules"] == []
    content = found["content"]
    assert (content["version"], content["name"]) == (1, "digits")
    assert content["sites"]["fc2.weight"] == {
        "kind": "LoRA",
        "fields": {
            "rank": 2,
            "alpha": None,
            "init": "kaiming",
            "rank_stabilized": False,
            "batch_dims": 0,
            "transposed": False,
            "dropout": 0.0,
        },
        "strength": 0.5,
        "shape": [3, 4],
    }
    fc2 = model.get_submodule("fc2")
    update = fc2.weight - pl.base_state_dict(model)["fc2.weight"]
    torch.testing.assert_close(torch.tensor(found["update"]), update)


def test_loading_leaves_other_adapters(tmp_path: Path) -> None:
    """Loading a new or an existing adapter changes no other adapter, and no flags."""
    model, path = attached(), tmp_path / "digits.safetensors"
    pl.freeze(model, "letters")
    pl.save(model, path, "digits")

    def letters() -> Any:
        rows = [row for row in pl.summary(model).sites if row.adapter == "letters"]
        state = pl.state_dict(model, "letters").items()
        return rows, [(key, t.data_ptr(), bits(t)) for key, t in state], pl.fingerprint(model)

    before = letters()
    shake(model, "digits")
    pl.disable(model, "digits")
    pl.freeze(model, "digits")
    pl.scale(model, 3.0, "digits")
    identities = [id(parameter) for parameter in pl.parameters(model)]
    pl.load(model, path)
    assert letters() == before
    assert [id(parameter) for parameter in pl.parameters(model)] == identities
    digits = [row for row in pl.summary(model).sites if row.adapter == "digits"]
    assert [(row.active, row.trainable, row.scale) for row in digits] == [(False, False, 1.0)] * 2
    torch.testing.assert_close(pl.state_dict(model, "digits"), load_file(path), rtol=0, atol=0)
    pl.load_state_dict(model, load_file(path), "digits")
    assert letters() == before
    pl.load(model, path, name="numbers")
    assert letters() == before


def test_refresh_with_other_settings(tmp_path: Path) -> None:
    """Loading a file with another alpha into an adapter gives exactly the file's weights."""
    model, other, path = plain(), plain(), tmp_path / "digits.safetensors"
    pl.attach(model, LoRA(rank=2, alpha=16))
    pl.attach(other, LoRA(rank=2, alpha=1))
    shake(model)
    pl.save(model, path)
    pl.load(other, path)
    torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)


@pytest.mark.parametrize("as_type", [str, Path, os.fspath])
def test_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_type: Callable[[Any], Any]
) -> None:
    """A path can be a string or a Path, absolute or relative, with any name."""
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "äöü ß.safetensors", Path("no suffix")):
        pl.save(attached(), as_type(path), "digits")
        assert pl.load(plain(), as_type(path)).sites[0].adapter == "digits"
