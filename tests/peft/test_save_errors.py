"""Adapters that a PEFT folder cannot hold: each error word by word, with nothing written."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.nn.utils import parametrizations

import paramlora as pl
from paramlora import Delta, DoRA, LoHa, LoRA, TargetError
from paramlora.files.safetensors_file import temporary_path
from tests.support.helpers import pattern, refuses
from tests.support.peft_layers import attached, net


def cannot_hold(path: str, reason: str) -> str:
    return (
        f"a PEFT folder cannot store the adapter at {path!r}: {reason}; detach it from there, "
        "or use paramlora.save"
    )


PLACES = (
    "PEFT adapts the weights of Linear, Conv1d, Conv2d, Conv3d, Embedding and Conv1D submodules, "
    "the projections of a MultiheadAttention, and, without DoRA, other parameters of two or three "
    "dimensions"
)


# The adapter, and the message of saving it.
SPECS: dict[str, tuple[Any, str]] = {
    "a DoRA of a raw parameter": (
        {"rnn.weight_ih_l0": DoRA(2)},
        cannot_hold("rnn.weight_ih_l0", PLACES),
    ),
    "a parameter of the model itself": (
        {"gain": LoRA(2)},
        cannot_hold(
            "gain", "PEFT cannot adapt a parameter of the model itself, only those of submodules"
        ),
    ),
    "full updates alone": (
        {"head.weight": Delta()},
        cannot_hold("head.weight", "it is tied to tied.weight, and PEFT adapts only one of them"),
    ),
    "no low-rank update": (
        {"fc.bias": Delta()},
        "adapter 'digits' has no low-rank update, and a PEFT folder needs at least one",
    ),
    "a whole parameter of the model itself": (
        {"fc": LoRA(2), "gain": Delta()},
        cannot_hold("gain", "PEFT saves whole submodules, and the model itself has this tensor"),
    ),
    "an update and a whole tensor in one module": (
        {"mha.in_proj_weight": LoRA(2), "mha.in_proj_bias": Delta()},
        cannot_hold("mha", "PEFT does not adapt modules_to_save, here ['mha']"),
    ),
    "a whole module whose name is the end of another": (
        {"last_fc": LoRA(2), "fc.weight": Delta()},
        cannot_hold("last_fc", "PEFT does not adapt modules_to_save, here ['fc']"),
    ),
    "a block of a weight": (
        {"fc.weight[:2]": LoRA(1)},
        cannot_hold("fc.weight", "it adapts blocks of the tensor"),
    ),
    "projections of two ranks": (
        {"mha.in_proj_weight": LoRA(2), "mha.out_proj": LoRA(3)},
        cannot_hold("mha.out_proj.weight", "PEFT has one rank and one scale for both projections"),
    ),
    "separate projections": (
        {"cross.out_proj": LoRA(2)},
        cannot_hold(
            "cross.out_proj.weight",
            "PEFT needs queries, keys and values of the same size in a MultiheadAttention",
        ),
    ),
    "another kind": (
        {"fc": LoRA(2), "last_fc": LoHa(2)},
        cannot_hold("last_fc.weight", "LoHa is not a low-rank update of it"),
    ),
    "a DoRA beside a LoRA": (
        {"fc": LoRA(2), "last_fc": DoRA(2)},
        cannot_hold("last_fc.weight", "it is a DoRA, which PEFT needs at all sites or at none"),
    ),
    "a DoRA of projections": (
        {"mha.in_proj_weight": DoRA(2)},
        cannot_hold("mha.in_proj_weight", "PEFT does not support DoRA on a MultiheadAttention"),
    ),
    "a DoRA of a grouped convolution": (
        {"grouped": DoRA(2)},
        cannot_hold(
            "grouped.weight",
            "PEFT's DoRA of a grouped convolution divides by the norms of another matrix than "
            "W + s·BA",
        ),
    ),
    "magnitudes of rows of an embedding": (
        {"emb": DoRA(2)},
        cannot_hold(
            "emb.weight", "PEFT has the magnitudes of a DoRA along dimension 1 there, not 0"
        ),
    ),
    "a dilated convolution": (
        {"dilated": LoRA(2)},
        cannot_hold("dilated.weight", "PEFT ignores the dilation of a convolution"),
    ),
    "a circular convolution": (
        {"circular": LoRA(2)},
        cannot_hold("circular.weight", "PEFT pads with zeros and ignores padding_mode='circular'"),
    ),
    "a bounded embedding": (
        {"bounded": LoRA(2)},
        cannot_hold(
            "bounded.weight",
            "PEFT renormalises the factors of an Embedding that has max_norm",
        ),
    ),
}


@pytest.mark.parametrize(("spec", "message"), SPECS.values(), ids=SPECS.keys())
def test_unsupported_adapter(spec: Any, message: str, tmp_path: Path) -> None:
    """An adapter that PEFT does not support raises TargetError, and nothing is written."""
    model = net()
    pl.attach(model, spec, name="digits")
    refuses(model, lambda m: pl.save_peft(m, tmp_path / "a", "digits"), TargetError, message)
    assert not list(tmp_path.iterdir())


def test_other_parametrizations(tmp_path: Path) -> None:
    """Another parametrization on the same tensor raises: PEFT has none."""
    model = net()
    pl.attach(model, LoRA(2), "fc", name="digits")
    parametrizations.orthogonal(model.get_submodule("fc"))
    message = cannot_hold("fc.weight", "another parametrization comes after the adapter")
    refuses(model, lambda m: pl.save_peft(m, tmp_path / "a", "digits"), TargetError, message)
    other = net()
    parametrizations.orthogonal(other.get_submodule("fc"))
    pl.attach(other, {"last_fc": LoRA(2), "fc.weight": Delta()}, name="digits")
    message = cannot_hold("fc.weight", "it is parametrized, so that PEFT's model does not store it")
    refuses(other, lambda m: pl.save_peft(m, tmp_path / "a", "digits"), TargetError, message)


def test_existing_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an adapter is replaced whole; a folder with other files, or a file, stays."""
    model = attached()
    pl.scale(model, 0.5)
    pl.save_peft(model, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 1.5
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["digits"]
    before = (folder / "adapter_config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        pl.scale(model, 1)
        with pytest.raises(ZeroDivisionError, match="zero"):
            pl.save_peft(model, folder)
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["digits"]
    assert (folder / "adapter_config.json").read_bytes() == before
    (folder / "notes.txt").write_text("mine")
    message = f"cannot write {folder}: the folder exists and also has notes.txt, which would be "
    with pytest.raises(FileExistsError, match=pattern(message + "lost; choose another path")):
        pl.save_peft(model, folder)
    (folder.parent / "file").touch()
    with pytest.raises(FileExistsError, match="a file of that name exists"):
        pl.save_peft(model, folder.parent / "file")
    with pytest.raises(FileNotFoundError, match=r"the folder \S*nowhere does not exist"):
        pl.save_peft(model, folder.parent / "nowhere" / "digits")
    with pytest.raises(pl.AdapterNameError, match="no adapter 'letters' here"):
        pl.save_peft(model, folder.parent / "other", "letters")


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    """A folder of the name of one of the two files is not replaced, and keeps its content."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
        message = f"cannot write {folder}: the folder exists and also has {name}/, which would be "
        with pytest.raises(FileExistsError, match=pattern(message + "lost; choose another path")):
            pl.save_peft(attached(), folder)
        assert (folder / name / "notes.txt").read_text() == "mine"
        with pytest.raises(FileNotFoundError, match=pattern(f"{folder} has no {name}[...]")):
            pl.load_peft(net(), folder)
        (folder / name / "notes.txt").unlink()
        (folder / name).rmdir()
        (folder / name).touch()


class Killed(BaseException):
    """Ends a save as a kill does, without cleaning up."""


def kill(monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    """Let the given call of a function of `os` end this process, which is then another one."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    calls, function = itertools.count(1), getattr(os, step)

    def call(*given: Any) -> Any:
        if next(calls) == number:
            raise Killed("killed")
        return function(*given)

    monkeypatch.setattr(os, step, call)
    monkeypatch.setattr(os, "getpid", lambda: ended.pid)
    for removing in ("shutil.rmtree", "pathlib.Path.unlink"):
        monkeypatch.setattr(removing, lambda *given, **options: None)


STEPS = [("fsync", 1), ("replace", 1), ("replace", 2), ("rename", 1), ("rename", 2)]


@pytest.mark.skipif(os.name != "posix", reason="other systems keep what a killed save leaves")
@pytest.mark.parametrize(("step", "number"), STEPS)
def test_a_killed_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """What a killed save leaves is named if the folder is missing; the next save removes it."""
    with monkeypatch.context() as patch:
        kill(patch, step, number)
        with pytest.raises(Killed, match="killed"):
            pl.save_peft(attached(), folder)
    left = sorted(path.name for path in folder.parent.iterdir() if path != folder)
    if (step, number) == ("rename", 2):  # the old folder was moved away
        assert [Path(name).suffix for name in left] == [".old", ".tmp"]
        with pytest.raises(FileNotFoundError, match=re.escape(f"has left {', '.join(left)}")):
            pl.load_peft(net(), folder)
    else:
        assert [Path(name).suffix for name in left] == [".tmp"]
        pl.load_peft(net(), folder)
    pl.save_peft(attached(), folder)
    assert list(folder.parent.iterdir()) == [folder]
    pl.load_peft(net(), folder)


def test_files_that_are_not_left(folder: Path) -> None:
    """A save removes nothing of a process that runs, of another machine or of another name."""
    mine = temporary_path(folder)
    machine = mine.name.split(".")[2].partition("-")[0]
    others = [
        mine,
        mine.with_name(mine.name.replace(machine, "00000000")),
        mine.with_name(f".other{mine.name}"),
        mine.with_name(f".digits.{machine}-99999999-notes.tmp"),
    ]
    for path in others:
        path.write_text("kept")
    pl.save_peft(attached(), folder)
    assert all(path.read_text() == "kept" for path in others)


def test_meta_device(folder: Path, tmp_path: Path) -> None:
    """Saving from or loading into a model on the meta device raises StateError."""
    model = attached().to("meta")
    reason = "is on the meta device and holds no values: materialise the model first, [...]"
    refuses(
        model,
        lambda m: pl.save_peft(m, tmp_path / "a"),
        pl.StateError,
        f"'fc.lora_A.weight' {reason}",
    )
    refuses(
        net().to("meta"), lambda m: pl.load_peft(m, folder), pl.StateError, f"'fc.bias' {reason}"
    )
    pl.detach(model := attached(), "default")
    pl.attach(model, LoRA(2), "fc")
    pl.save_peft(model, tmp_path / "low")
    refuses(
        net().to("meta"),
        lambda m: pl.load_peft(m, tmp_path / "low"),
        pl.StateError,
        f"'fc.weight' {reason}",
    )
