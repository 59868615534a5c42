"""`load(check_base=True)`: an adapter's file knows the base that it was saved with."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paramlora as pl
from paramlora.files.digest import checksum
from paramlora.files.metadata import ENTRY, digest_of, read
from tests.artefacts.make import HERE, Net
from tests.support.helpers import refuses


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 50), nn.BatchNorm1d(50), nn.Linear(50, 3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = net()
    pl.attach(model, pl.LoRA(2, init="gaussian"), "0", name="digits")
    with pl.merged(model):  # the original weights count
        pl.save(model, tmp_path / "digits.safetensors")
    return tmp_path / "digits.safetensors"


def changed(change: str) -> nn.Module:
    model: Any = net()
    with torch.no_grad():
        if change == "one element":
            model[2].weight[1, 7] += 1e-6
        elif change == "exchanged elements":
            model[0].weight[[0, 49]] = model[0].weight[[49, 0]].clone()
        elif change == "statistics":
            model[1].running_mean += 1
        elif change == "cast":
            model.bfloat16()
        elif change == "another layer":
            model.append(nn.Linear(3, 1))
    return model


CHANGES = {
    "one element": "2.weight",
    "exchanged elements": "0.weight",
    "statistics": "1.running_mean",
    "cast": "0.weight (float32 in the file, bfloat16 here)[...]",
    "another layer": "3.weight (missing in the file, float32 here)[...]",
}


@pytest.mark.parametrize(("change", "named"), CHANGES.items(), ids=CHANGES)
def test_another_base(file: Path, change: str, named: str) -> None:
    """Another base is refused if asked for, by the names of the tensors that differ."""
    message = (
        f"{file} was saved with another base: {named} differ. A base that was cast, quantized, "
        "resized or trained since differs too; load the adapter into the base that it was saved "
        "with, or pass check_base=False"
    )
    model = changed(change)
    refuses(model, lambda m: pl.load(m, file, check_base=True), pl.CheckpointError, message)
    pl.load(model, file)


def test_the_same_base(file: Path) -> None:
    """The base is the same with adapters on it, and in a copy."""
    model = copy.deepcopy(net())
    pl.attach(model, pl.LoRA(3, init="gaussian"), name="letters")
    pl.load(model, file, check_base=True)
    pl.load(model, file, check_base=True)  # into the attached adapter


def test_a_file_without_a_base() -> None:
    """A file that does not know its base loads, but not if the base is to be checked."""
    path = HERE / "1" / "LoRA.safetensors"
    message = (
        f"{path} has no checksums of its base: an older paramlora wrote it, or the base was on the "
        "meta device or sharded; save it again, or pass check_base=False"
    )
    refuses(Net(), lambda m: pl.load(m, path, check_base=True), pl.CheckpointError, message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_checksums(dtype: torch.dtype) -> None:
    """A checksum depends on values, shape and dtype, and not on how a tensor is stored."""
    tensor = torch.randn(91, 103, generator=torch.Generator().manual_seed(0)).gt(0).to(dtype)
    found = checksum(tensor)
    longer = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    assert checksum(longer[1:].view(91, 103)) == found  # not at a multiple of eight bytes
    assert checksum(tensor.T.contiguous().T) == found
    assert checksum(tensor.to_sparse()) == found
    assert checksum(tensor.view(103, 91)) != found
    assert checksum(tensor.roll(1, 0)) != found
    assert checksum(tensor[:, :0]).startswith(str(dtype).removeprefix("torch."))


def test_exchanged_words() -> None:
    """A checksum depends on the order of values, along rows of 1024 words and across them."""
    words = torch.arange(2048).view(2, 1024)
    found = {checksum(words), checksum(words.roll(1, 0)), checksum(words.roll(1, 1))}
    assert len(found) == 3


def test_small_changes_of_all_values() -> None:
    """Signs, and rows of an identity, count although their plain sums are equal."""
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    odd, fourth, eye = W.clone(), W.bfloat16(), torch.eye(2048)
    odd[:, 1::2] *= -1
    fourth[:, 3::4] *= -1
    exchanged = eye.clone()
    exchanged[[0, 2]] = eye[[2, 0]]
    for one, other in (
        (W.double(), -W.double()),
        (W, odd),
        (W.bfloat16(), fourth),
        (eye, exchanged),
    ):
        assert checksum(one) != checksum(other)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*nested:UserWarning")
def test_unusual_buffers(tmp_path: Path) -> None:
    """A base with a quantized, a conjugate or a nested tensor can be saved and checked."""
    path, x = tmp_path / "digits.safetensors", torch.randn(30, 50)
    model: Any = net()
    model.register_buffer("levels", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
    model.register_buffer("phases", torch.complex(x, x + 1).conj())
    model.register_buffer("ragged", torch.nested.nested_tensor([x, x[:2]]))
    pl.attach(model, pl.LoRA(2), "0", name="digits")
    pl.save(model, path)
    pl.load(model, path, check_base=True)
    model.phases = model.phases.conj()
    with pytest.raises(pl.CheckpointError, match="another base: phases differ"):
        pl.load(model, path, check_base=True)


@pytest.mark.parametrize("entry", ["", 3, None])
def test_a_damaged_checksum(file: Path, entry: object, tmp_path: Path) -> None:
    """A checksum that is not text is damage, and an empty one differs."""
    tensors, content = read(file)
    content["base"]["0.bias"] = entry
    content["digest"] = digest_of(tensors, content)
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed, {"format": "pt", ENTRY: json.dumps(content)})
    message = (
        "with another base: 0[.]bias" if entry == "" else "'base' in its .* must have '0.bias', and"
    )
    with pytest.raises(pl.CheckpointError, match=message):
        pl.load(net(), changed, check_base=True)


def test_a_sharded_base(tmp_path: Path) -> None:
    """`save` does not gather a sharded base for checksums; the file has none."""

    def gather() -> None:
        raise AssertionError("the base was gathered")

    model: Any = net()
    pl.attach(model, pl.LoRA(2), "0", name="digits")
    model[2].weight.full_tensor = gather
    pl.save(model, tmp_path / "digits.safetensors")
    assert read(tmp_path / "digits.safetensors")[1]["base"] == {}
