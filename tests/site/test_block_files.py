"""Files and state dicts of adapters of blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import paramlora as pl
from paramlora import Delta, LoRA
from paramlora.files.digest import digest
from tests.support.helpers import refuses, unchanged
from tests.support.mixed import assert_bits
from tests.support.models import fused
from tests.support.reference import shake


def test_save_and_load(tmp_path: Path) -> None:
    """State dicts and files have the index in their keys, and restore blocks bit for bit."""
    model, path = fused(), tmp_path / "a.safetensors"
    specs: Any = {"qkv[:4]": LoRA(2), "qkv[8:, 1:3]": Delta(), "experts[1]": LoRA(1)}
    pl.attach(model, specs, name="a")
    shake(model)
    keys = [f"{site}.{key}" for site in ("experts[1]", "qkv.weight[:4]") for key in "AB"]
    assert list(pl.state_dict(model, "a")) == [*keys, "qkv.weight[8:, 1:3].D"]
    pl.scale(model, 0.7)
    pl.save(model, path, "a")
    other = fused()
    assert pl.load(other, path) == pl.summary(model)
    assert_bits(pl.state_dict(other, "a"), pl.state_dict(model, "a"))
    assert_bits(other.qkv.weight, model.qkv.weight)
    shake(model)
    pl.scale(model, 0.2)
    pl.load(model, path)
    assert pl.summary(other) == pl.summary(model)
    assert_bits(other.experts, model.experts)
    pl.load_state_dict(other, pl.state_dict(model, "a"), "a")
    pl.load(other, path, name="b")
    third = fused()
    pl.attach(third, LoRA(2), "qkv[:4]", name="a")
    with (
        unchanged(third),
        pytest.raises(pl.AdapterNameError, match="its sites, kinds or ranks differ"),
    ):
        pl.load(third, path)


def rename_site(path: Path, old: str, new: str) -> None:
    """Rename a site in a file, and update the digest."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["paramlora"])
        tensors = {k.replace(old, new): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    content["sites"] = {k.replace(old, new): v for k, v in content["sites"].items()}
    del content["digest"]
    content["digest"] = digest(tensors.items(), json.dumps(content))
    save_file(tensors, path, {"paramlora": json.dumps(content)})


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "[0:4]",
            "[...] is damaged: the site 'qkv.weight[0:4]' must be written "
            "'qkv.weight[:4]'; save the adapter again",
        ),
        (
            "[:13]",
            "[...] is damaged: cannot take a block of 'qkv.weight'[...]:13 reaches outside[...]",
        ),
        ("[:5]", "[...] does not fit: qkv.weight[:5].B: expected (5, 2), found (4, 2)"),
        ("[::2]", "[...] belongs to another model: it adapts qkv.weight[::2], which this [...]"),
        (
            "[4:9]",
            "[...] does not fit this model, in which 'qkv.weight[4:9]' and "
            "'qkv.weight[8:]' share elements",
        ),
        (
            "",
            "[...] does not fit this model, in which 'qkv.weight' and 'qkv.weight[8:]' "
            "share elements",
        ),
    ],
)
def test_files_with_wrong_blocks(tmp_path: Path, new: str, message: str) -> None:
    """A file whose blocks are invalid, overlap or have other shapes raises CheckpointError."""
    path = tmp_path / "a.safetensors"
    model = fused()
    pl.attach(model, LoRA(2), ["qkv[:4]", "qkv[8:]"])
    pl.save(model, path)
    rename_site(path, "[:4]", new)
    refuses(fused(), lambda model: pl.load(model, path), pl.CheckpointError, message)


def test_file_of_an_untied_model(tmp_path: Path) -> None:
    """A file with overlapping blocks of two tensors does not load if the model ties the tensors."""
    model: Any = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    pl.attach(model, LoRA(2), ["embed[:4]", "head[2:]"])
    pl.save(model, tmp_path / "a")
    pl.detach(model)
    model["head"].weight = model["embed"].weight
    message = (
        "[...] does not fit this model, in which 'embed.weight[:4]' and "
        "'head.weight[2:]' share elements"
    )
    refuses(model, lambda m: pl.load(m, tmp_path / "a"), pl.CheckpointError, message)


def test_file_of_another_tensor_shape(tmp_path: Path) -> None:
    """A block loads only into a tensor of the same shape, even if the block would fit."""
    model = nn.Sequential(nn.Linear(4, 6))
    pl.attach(model, LoRA(2), "0[:3]")
    pl.save(model, tmp_path / "a")
    message = (
        "belongs to another model: '0.weight' has shape [6, 4] in the file and [9, 4] in this model"
    )
    refuses(
        nn.Sequential(nn.Linear(4, 9)),
        lambda model: pl.load(model, tmp_path / "a"),
        pl.CheckpointError,
        f"{tmp_path / 'a'} {message}",
    )
