"""Saving leaves a whole file, whatever happens in the middle of it."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import unchanged
from tests.support.mixed import mixed
from tests.support.models import attached, plain

ROOT = Path(__file__).parents[2]


def shake(model: nn.Module, *names: str) -> None:
    """Fill factors with random numbers."""
    with torch.no_grad():
        for parameter in pl.parameters(model, *names):
            parameter.normal_()


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    """Saving over a file replaces it, also by a smaller one, and leaves nothing else behind."""
    path = tmp_path / "digits.safetensors"
    for rank in (8, 1):
        model = plain()
        pl.attach(model, LoRA(rank=rank))
        pl.save(model, path)
        assert load_file(path)["fc1.weight.A"].shape == (rank, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_as_readable_as_others(tmp_path: Path) -> None:
    """A saved file gets the permissions that any new file gets here."""
    model = attached()
    pl.save(model, tmp_path / "digits", "digits")
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("digits", "other")]
    assert modes[0] == modes[1]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that is there already."""
    pl.save(attached(), tmp_path / "digits.safetensors", "digits")
    return tmp_path / "digits.safetensors"


@pytest.mark.parametrize("step", ["fsync", "replace", "write", "open"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    """Whatever step of saving fails, the old file is as it was, and nothing lies beside it."""
    before, model = old.read_bytes(), attached()
    shake(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    class Full:
        """A file on a disk that is full after some bytes."""

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


def test_data_is_on_the_disk_before_the_file_is_replaced(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is written whole and synced before it takes the old one's place."""
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """After a kill at any moment of saving, the file is whole: the old one or the new one."""
    program = "tests/support/crash.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, tmp_path / "a", "paramlora", "60"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    damaged, cut_off, generations = map(int, done.stdout.split())
    assert damaged == 0
    # The kills did hit saves, and others had succeeded.
    assert cut_off >= 3
    assert generations >= 3


def test_9_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving that fails at any step leaves the old file whole, and nothing beside it."""
    model, _ = mixed()
    pl.attach(model, pl.LoRA(rank=2), "head", name="low")
    path = tmp_path / "low.safetensors"
    pl.save(model, path, "low")
    good = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space left")

    for step in ("fsync", "replace"):
        shake(model)
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{step}", crash)
            with pytest.raises(OSError, match="no space left"):
                pl.save(model, path, "low")
        assert path.read_bytes() == good
        assert [found.name for found in tmp_path.iterdir()] == [path.name]
