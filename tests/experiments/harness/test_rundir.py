"""Run directories: which folders are runs."""

from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.harness.rundir import RunDirectory


def test_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a folder that has only runs in folders of its own says where they are."""
    for name in ("test", "seed"):
        RunDirectory.start(tmp_path / "remedies" / name, {"rank": 2}, {"study": "sweeps"}, ())
    assert main(["report", str(tmp_path / "remedies")]) == 2
    folder = tmp_path / "remedies"
    expected = f"settings.json is missing; there are runs in {folder / 'seed'}, {folder / 'test'}"
    assert f"no run in {folder}: {expected}" in capsys.readouterr().err


def test_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a folder without a run names the file that is missing."""
    assert main(["report", str(tmp_path)]) == 2
    assert f"no run in {tmp_path}: settings.json is missing\n" in capsys.readouterr().err
