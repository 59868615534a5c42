"""Bytes that are no whole file of paramlora's are refused."""

import io
import itertools
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
from tests.support.helpers import refuses_file, pattern, unchanged
from tests.support.mixed import mixed
from tests.support.models import plain


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2, bias=False))


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """A file with an adapter of the model of `small`, a few hundred bytes long."""
    model = small()
    pl.attach(model, LoRA(rank=1))
    pl.save(model, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("refresh", [False, True])
def test_load_refuses_every_truncation(small_file: Path, refresh: bool) -> None:
    """A file that was cut off anywhere is refused with its name."""
    whole, model = small_file.read_bytes(), small()
    if refresh:
        pl.attach(model, LoRA(rank=1))
    damaged = pattern(f"{small_file} is damaged or no .safetensors file ([...]); save the[...]")
    with unchanged(model):
        for length in range(len(whole)):
            small_file.write_bytes(whole[:length])
            with pytest.raises(pl.CheckpointError, match=damaged):
                pl.load(model, small_file)


def test_load_refuses_every_flipped_bit(small_file: Path) -> None:
    """A file with one bit flipped, anywhere, is refused with its name, or loads as it was saved."""
    whole, model, other = small_file.read_bytes(), small(), small()
    pl.load(other, small_file)
    expected, rows = pl.state_dict(other), pl.summary(other).sites
    read = set()
    with unchanged(model):
        for position, bit in itertools.product(range(len(whole)), range(8)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            small_file.write_bytes(flipped)
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
    # Nothing but the entry that names the library for which the file was written.
    start = whole.index(b'"format":"pt"')
    assert read <= set(range(start, start + len(b'"format":"pt"')))


def test_load_refuses_files_of_others(tmp_path: Path) -> None:
    """A .safetensors file that paramlora did not write is refused with what its metadata has."""
    path = tmp_path / "model.safetensors"
    save_file(dict(plain().state_dict()), path)
    refuses_file(
        path,
        "{path} was not written by paramlora.save: its metadata has no 'paramlora', only []",
    )
    save_file(dict(plain().state_dict()), path, {"format": "pt", "epoch": "3"})
    refuses_file(
        path,
        "{path} was not written by paramlora.save: its metadata has no 'paramlora', only "
        "['epoch', 'format']",
    )


NO_SAFETENSORS = {
    "empty": b"",
    "one byte": b"\0",
    "text": b"fc1.weight.A",
    "braces": b"{}" * 99,
    "random": random.Random(0).randbytes(4096),
}


@pytest.mark.parametrize("content", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS.keys())
def test_load_refuses_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    """A file of any other bytes, or of none, is refused as no .safetensors file."""
    path = tmp_path / "digits.safetensors"
    path.write_bytes(content)
    refuses_file(path, "{path} is damaged or no .safetensors file ([...]); save the adapter again")


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, 2, 5, "torch"])
def test_load_never_unpickles(tmp_path: Path, protocol: int | str) -> None:
    """A pickle, also one of torch.save, is refused and never unpickled."""
    path, trace = tmp_path / "digits.bin", tmp_path / "trace"
    if protocol == "torch":
        torch.save({"fc1.weight.A": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=int(protocol)))
    refuses_file(path, "{path} is damaged or no .safetensors file ([...]); save the adapter again")
    assert not trace.exists()
    # The trace would be there had it been unpickled.
    if protocol == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists()


def test_load_refuses_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    """A folder is refused as such; a file that is not there is a FileNotFoundError."""
    refuses_file(tmp_path, "{path} is a folder; name the .safetensors file in it")
    refuses_file(tmp_path / "no", "[...]No such file[...]{path}[...]", FileNotFoundError)


def test_9_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    """A damaged, foreign or other model's file is refused by name, and the model is as it was."""
    model, _ = mixed()
    pl.attach(model, pl.LoRA(rank=2), "head", name="low")
    path = tmp_path / "low.safetensors"
    pl.save(model, path, "low")
    good = path.read_bytes()
    other = nn.ModuleDict({"head": nn.Linear(9, 3)})
    words = rf"{path}.*'head\.weight'.*\[3, 8\].*\[3, 9\]"
    with unchanged(other), pytest.raises(pl.CheckpointError, match=words):
        pl.load(other, path)
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "exploded"), bomb)
    for content in (
        good[: len(good) // 2],
        good[:-1] + bytes([good[-1] ^ 1]),
        b"",
        pickle.dumps(Bomb(tmp_path / "exploded")),
        bomb.getvalue(),
    ):
        path.write_bytes(content)
        with unchanged(model), pytest.raises(pl.CheckpointError, match=f"{path}.*damaged"):
            pl.load(model, path)
    assert not (tmp_path / "exploded").exists()
    save_file({"head.weight.A": torch.zeros(2, 8)}, path)
    with unchanged(model), pytest.raises(pl.CheckpointError, match="not written by paramlora"):
        pl.load(model, path)
    path.write_bytes(good)
    pl.load(model, path)
