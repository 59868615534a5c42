"""Files with values of other dtypes, NaN and infinity, and files that cannot be read."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paramlora as pl
from paramlora.files.metadata import digest_of
from tests.support.helpers import bits, refuses

Change = Callable[[Tensor], Tensor]
KEY = "0.weight.A"


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2))


def adapted() -> nn.Module:
    model = plain()
    pl.attach(model, {"*.weight": pl.LoRA(2, init="gaussian"), "*.bias": pl.Delta()})
    return model


def changed_file(path: Path, change: Change) -> Path:
    """Save an adapter to a file with one tensor changed, and with the digest of its content."""
    pl.save(adapted(), path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["paramlora"])
    tensors[KEY] = change(tensors[KEY])
    content["digest"] = digest_of(tensors, content)
    save_file(tensors, path, {"paramlora": json.dumps(content)})
    return path


def changed_folder(path: Path, change: Change, key: str = "0.lora_A.weight") -> Path:
    """Save an adapter to PEFT's folder with one tensor changed."""
    pl.save_peft(adapted(), path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{key}"] = change(tensors[f"base_model.model.{key}"])
    save_file(tensors, file)
    return path


def with_value(value: float) -> Change:
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), value)


FOREIGN = [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
if tuple(map(int, version("safetensors").split(".")[:2])) >= (0, 7):
    FOREIGN.append(torch.complex64)  # older files have no complex numbers


@pytest.mark.parametrize("dtype", FOREIGN, ids=str)
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Factors that are not floating tensors of 16 to 64 bits are refused, by name."""
    file = changed_file(tmp_path / "a.safetensors", lambda tensor: tensor.to(dtype))
    message = "{} is damaged: {} has dtype {}; factors are floating tensors of 16 to 64 bits"
    for make in (plain, adapted):
        said = message.format(file, KEY, dtype)
        refuses(make(), lambda m: pl.load(m, file, name="default"), pl.CheckpointError, said)
    folder = changed_folder(tmp_path / "a", lambda tensor: tensor.to(dtype))
    said = message.format(folder, "0.lora_A.weight", dtype)
    refuses(plain(), lambda m: pl.load_peft(m, folder), pl.CheckpointError, said)
    bias = changed_folder(tmp_path / "b", lambda tensor: tensor.to(dtype), "0.base_layer.bias")
    said = message.format(bias, "0.bias", dtype)
    refuses(plain(), lambda m: pl.load_peft(m, bias), pl.CheckpointError, said)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_floating_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Factors of another floating dtype are cast to that of the factors here."""
    model = plain()
    pl.load(model, changed_file(tmp_path / "a.safetensors", lambda tensor: tensor.to(dtype)))
    assert pl.state_dict(model)[KEY].dtype is torch.float32


VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "cast": 1e300}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    """NaN and infinite values are refused by name, and load with a warning on request."""

    def change(tensor: Tensor) -> Tensor:
        return with_value(value)(tensor.double())

    file = changed_file(tmp_path / "a.safetensors", change)
    folder = changed_folder(tmp_path / "a", change)
    calls: list[tuple[Path, Callable[..., Any]]] = [(file, pl.load), (folder, pl.load_peft)]
    for path, load in calls:
        said = f"{path} has NaN or infinite values in {KEY}"
        for make in (plain, adapted):
            refuses(
                make(),
                functools.partial(load, path=path, name="default"),
                pl.CheckpointError,
                f"{said}; pass finite=False to load them nevertheless",
            )
            model = make()
            with pytest.warns(UserWarning, match=re.escape(said)) as caught:
                load(model, path, name="default", finite=False)
            assert caught[0].filename == __file__
            wanted = torch.full((3,), value, dtype=torch.float64).float()
            assert bits(pl.state_dict(model)[KEY][1]) == bits(wanted)


@contextmanager
def without_permission(*paths: Path) -> Iterator[None]:
    """Take away the permission to read files, also from root."""
    for path in paths:
        path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o644)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs permissions of POSIX")
def test_files_without_permission(tmp_path: Path) -> None:
    """A file that cannot be read raises PermissionError with its path, not that it is damaged."""
    model, file, folder = plain(), tmp_path / "a.safetensors", tmp_path / "a"
    pl.save(adapted(), file)
    pl.save_peft(adapted(), folder)
    tmp_path.chmod(0o755)
    with without_permission(file), pytest.raises(PermissionError, match=r"denied: '.*a\.safe"):
        pl.load(model, file)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        # Root reads this as another user, who may not even look into the folder.
        with without_permission(folder / name), pytest.raises(PermissionError, match=r"'.*/a"):
            pl.load_peft(model, folder)
    pl.load(model, file)
