"""Bytes that are not a whole file of paramlora: each one raises, and nothing is unpickled."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import pattern, refuses_file, unchanged
from tests.support.models import plain


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2, bias=False))


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """A file of a few hundred bytes, with an adapter of the model of `small`."""
    model = small()
    pl.attach(model, LoRA(rank=1))
    pl.save(model, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def write_byte(path: Path, position: int, value: int) -> None:
    """Write a byte in place: writing the whole file thousands of times is slow on a busy disk."""
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([value]))


@pytest.mark.parametrize("refresh", [False, True])
def test_truncated_file(small_file: Path, refresh: bool) -> None:
    """A file cut off at any length raises CheckpointError with its name."""
    size, model = small_file.stat().st_size, small()
    if refresh:
        pl.attach(model, LoRA(rank=1))
    damaged = pattern(f"{small_file} is damaged or not a .safetensors file ([...]); save the[...]")
    with unchanged(model):
        for length in reversed(range(size)):
            os.truncate(small_file, length)
            with pytest.raises(pl.CheckpointError, match=damaged):
                pl.load(model, small_file)


def test_flipped_bit(small_file: Path) -> None:
    """A file with any one bit flipped raises, or loads exactly as it was saved."""
    whole, model, other = small_file.read_bytes(), small(), small()
    pl.load(other, small_file)
    expected, rows = pl.state_dict(other), pl.summary(other).sites
    read = set()
    with unchanged(model):
        for position, byte in enumerate(whole):
            for bit in range(8):
                write_byte(small_file, position, byte ^ 1 << bit)
                try:
                    pl.load(model, small_file)
                except pl.CheckpointError as error:
                    refusal = str(error)
                else:
                    read.add(position)
                    assert pl.summary(model).sites == rows
                    torch.testing.assert_close(pl.state_dict(model), expected, rtol=0, atol=0)
                    pl.detach(model)
                    continue
                assert refusal.startswith(f"{small_file} ")
            write_byte(small_file, position, byte)
        assert small_file.read_bytes() == whole
    # Only the metadata entry for other libraries may change without an error.
    start = whole.index(b'"format":"pt"')
    assert read <= set(range(start, start + len(b'"format":"pt"')))


def test_safetensors_file_of_another_library(tmp_path: Path) -> None:
    """A .safetensors file that paramlora did not write raises, and its metadata is named."""
    path = tmp_path / "model.safetensors"
    save_file(dict(plain().state_dict()), path)
    refuses_file(
        path,
        "{path} was not written by paramlora.save: its metadata has no 'paramlora', only []; "
        "load_peft reads PEFT's folders, load_diffusers files of diffusers",
    )
    save_file(dict(plain().state_dict()), path, {"format": "pt", "epoch": "3"})
    refuses_file(
        path,
        "{path} was not written by paramlora.save: its metadata has no 'paramlora', only "
        "['epoch', 'format']; load_peft reads PEFT's folders, load_diffusers files of diffusers",
    )


OTHER_BYTES = {
    "empty": b"",
    "one byte": b"\0",
    "text": b"fc1.weight.A",
    "braces": b"{}" * 99,
    "random": random.Random(0).randbytes(4096),
}


@pytest.mark.parametrize("content", OTHER_BYTES.values(), ids=OTHER_BYTES.keys())
def test_other_bytes(tmp_path: Path, content: bytes) -> None:
    """A file that is not in the .safetensors format raises CheckpointError."""
    path = tmp_path / "digits.safetensors"
    path.write_bytes(content)
    refuses_file(
        path, "{path} is damaged or not a .safetensors file ([...]); save the adapter again"
    )


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_nothing_is_unpickled(tmp_path: Path, protocol: int | str) -> None:
    """A pickle, also one of torch.save, raises and is never unpickled."""
    path, trace = tmp_path / "digits.bin", tmp_path / "trace"
    if protocol == "torch":
        torch.save({"fc1.weight.A": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=int(protocol)))
    refuses_file(
        path, "{path} is damaged or not a .safetensors file ([...]); save the adapter again"
    )
    assert not trace.exists()
    # Unpickling it would have left the trace.
    if protocol == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists()


def test_folder_and_missing_file(tmp_path: Path) -> None:
    """A folder raises CheckpointError, a missing file FileNotFoundError."""
    refuses_file(
        tmp_path,
        "{path} is a folder; name the .safetensors file in it, or use load_peft for PEFT's",
    )
    path = str(tmp_path / "no")
    refuses_file(tmp_path / "no", f"[...]No such file[...]{path!r}[...]", FileNotFoundError)
