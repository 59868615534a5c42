"""Saving is atomic: after an error or a kill, the file is the old one or the new one."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import unchanged
from tests.support.models import attached, plain
from tests.support.processes import output_of
from tests.support.reference import shake

ROOT = Path(__file__).parents[2]


def test_overwriting(tmp_path: Path) -> None:
    """Saving over a file replaces it, also by a smaller one, and leaves no other file."""
    path = tmp_path / "digits.safetensors"
    for rank in (8, 1):
        model = plain()
        pl.attach(model, LoRA(rank=rank))
        pl.save(model, path)
        assert load_file(path)["fc1.weight.A"].shape == (rank, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_permissions(tmp_path: Path) -> None:
    """A saved file has the permissions of any new file."""
    model = attached()
    pl.save(model, tmp_path / "digits", "digits")
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("digits", "other")]
    assert modes[0] == modes[1]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An existing file."""
    pl.save(attached(), tmp_path / "digits.safetensors", "digits")
    return tmp_path / "digits.safetensors"


@pytest.mark.parametrize("step", ["fsync", "replace", "write", "open"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failing_save(
    old: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    """If any step of saving fails, the old file keeps its bytes and no other file is left."""
    before, model = old.read_bytes(), attached()
    shake(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    class Full:
        """A file on a disk that is full after 100 bytes."""

        def __init__(self, path: Any, mode: str) -> None:
            self.file = os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY), mode)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:100])
            raise error

    if step in ("fsync", "replace"):
        monkeypatch.setattr(os, step, fail)
    else:
        monkeypatch.setattr("builtins.open", Full if step == "write" else fail)
    with pytest.raises(type(error), match=r"No space left|^$"), unchanged(model):
        pl.save(model, old, "digits")
    monkeypatch.undo()
    assert old.read_bytes() == before
    assert list(old.parent.iterdir()) == [old]
    pl.save(model, old, "digits")
    torch.testing.assert_close(load_file(old), pl.state_dict(model, "digits"), rtol=0, atol=0)


def test_sync_before_replace(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is written and synced completely before it replaces the old one."""
    before, steps = old.read_bytes(), []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        steps.append(("fsync", os.fstat(fd).st_size))
        assert old.read_bytes() == before
        fsync(fd)

    def replaced(source: Any, target: Any) -> None:
        steps.append(("replace", os.stat(source).st_size))
        assert old.read_bytes() == before
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    model = attached()
    shake(model)
    pl.save(model, old, "digits")
    size = old.stat().st_size
    assert steps == [("fsync", size), ("replace", size)]
    assert old.read_bytes() != before


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_killed_process(tmp_path: Path) -> None:
    """After a kill at any moment of saving, the file is whole: the old one or the new one."""
    program = ROOT / "tests" / "support" / "crash.py"
    printed = output_of(str(program), str(tmp_path / "a"), "paramlora", "60")
    damaged, interrupted, generations = map(int, printed.split())
    assert damaged == 0
    # Some kills interrupted a save, and some saves succeeded.
    assert interrupted >= 3
    assert generations >= 3
