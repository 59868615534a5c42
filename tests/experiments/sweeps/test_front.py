"""Learning against forgetting: what is trained on what, and the comparison at equal learning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.digits.settings import preset
from experiments.digits.shared import context_of
from experiments.harness.rundir import RunDirectory
from experiments.sweeps import front as front_module
from experiments.sweeps.front import METHODS, Front, Method, front_cells
from experiments.sweeps.sweep import tune_one_by_one, tune_together

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (24, 16),
    "base_steps": 60,
    "steps": 8,
    "seeds": 2,
}


@pytest.fixture(autouse=True)
def _bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SMALL, "bases", str(tmp_path / "bases"))


def rows(points: dict[tuple[str, float], list[tuple[float, float]]]) -> RunDirectory:
    """Return a run whose bases are 50 % right, with (learned, kept) by method, rate and base."""
    made: list[dict[str, Any]] = []
    for base in range(2):
        half = {"base_seed": base, "tuned_accuracy": 0.5, "other_accuracy": 0.5}
        made.append({**half, "stage": "base"})
        for (method, rate), gains in points.items():
            learned, kept = gains[base]
            varied = {"method": method, "lr": rate}
            right = {"tuned_accuracy": 0.5 + learned / 100, "other_accuracy": 0.5 + kept / 100}
            made.append({**half, **right, "stage": "on", "seed": 0, "varied": varied})
    return RunDirectory(Path(), {"preset": "relu", "seeds": 1, "steps": 1}, {"data": "mnist"}, made)


def test_equal_learning() -> None:
    """At equal learning this LoRA keeps one point less, although it keeps more at every rate."""
    front = Front(
        rows(
            {
                ("LoRA r 1", 0.1): [(1.0, -3.0), (2.0, -6.0)],
                ("full", 0.1): [(4.0, -8.0), (4.0, -8.0)],
            }
        )
    )
    # LoRA keeps −3 a point learned and full fine-tuning −2: over 0 to 1, −0.5; over 0 to 2, −1.
    assert front.matched_table().rows == [["LoRA r 1", "-0.75 ± 0.35", "-3.93 to 2.43", "2"]]


def test_each_method_has_every_rate_on_every_base() -> None:
    """Cells differ in base, method and rate alone, and the joint ones train on all digits."""
    todo = list(front_cells(preset("small", **SMALL), 2))
    assert len(todo) == 2 * len(METHODS) * len(front_module.TIMES)
    assert {cell.joint for cell in todo if cell.name.startswith("joint")} == {True}
    assert {cell.full for cell in todo if "full" in cell.name} == {True}
    assert {cell.settings.finetuning.steps for cell in todo} == {8}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_together_equals_one_by_one(full: bool, joint: bool) -> None:
    """Stacked trainings end where separate ones do, up to rounding."""
    context = context_of(preset("small", **SMALL))
    todo = [(context, seed) for seed in (0, 1)]
    for (ours, loss), (theirs, other) in zip(
        tune_together(todo, full, joint), tune_one_by_one(todo, full, joint), strict=True
    ):
        assert_close(loss, other, rtol=1e-5, atol=1e-5)
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_joint_batches_have_all_digits() -> None:
    """Fine-tuning sees the tuned digits alone, joint training those and the others."""
    context = context_of(preset("small", **SMALL))
    for joint, expected in ((False, context.tuned), (True, list(range(10)))):
        batches = context.batches(torch.Generator().manual_seed(0), joint)
        seen = torch.cat([labels for _, labels in batches]).unique().tolist()
        assert set(seen) <= set(expected)
        assert (set(seen) == set(context.tuned)) != joint


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command writes rows, report and figure; a second call trains nothing."""
    monkeypatch.setattr(front_module, "METHODS", (Method(2), Method(None), Method(2, joint=True)))
    monkeypatch.setattr(front_module, "TIMES", (1.0, 5.0))
    small = ["--data", "digits", "--hidden", "24,16", "--base-steps", "60", "--steps", "8"]
    command = ["sweep", "--preset", "front-small", "--seeds", "2", "--base-seeds", "2", *small]
    command += ["--bases", str(tmp_path / "bases")]
    assert main([*command, "--out", str(tmp_path)]) == 0
    run = RunDirectory.read(tmp_path)
    assert len([row for row in run.rows if row["stage"] == "on"]) == 2 * 3 * 2 * 2
    assert (tmp_path / "front.png").stat().st_size > 5000
    text = (tmp_path / "front.md").read_text(encoding="utf-8")
    assert "n = 2 bases" in text
    assert "joint, LoRA r 2" in text
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "12 cells, 12 of them done" in capsys.readouterr().out
