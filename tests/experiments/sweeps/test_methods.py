"""The methods of a sweep's cells: LoRA, full fine-tuning, and joint training of both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from experiments.digits.settings import DigitSettings, preset
from experiments.digits.shared import context_of
from experiments.harness.settings import StudyError
from experiments.sweeps.cells import cells
from experiments.sweeps.sweep import run_cell, tune_one_by_one, tune_together

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (16, 12),
    "base_steps": 150,
    "steps": 8,
    "seeds": 2,
}


def small(folder: Path, **more: Any) -> DigitSettings:
    return preset("relu", **{**SMALL, **more}, bases=str(folder / "bases"))


@pytest.mark.parametrize("full", [True, False])
def test_joint_training_at_once_is_that_of_one_by_one(tmp_path, full):
    """Seeds of joint training that train together agree with separate ones, on all digits."""
    context = context_of(small(tmp_path))
    drawn = context.batches(torch.Generator(), joint=True).order
    assert set(context.labels[drawn].tolist()) == set(range(10))
    todo = [(context, 0), (context, 1)]
    together = tune_together(todo, full=full, joint=True)
    for (ours, our_loss), (theirs, their_loss) in zip(
        together, tune_one_by_one(todo, full=full, joint=True), strict=True
    ):
        assert our_loss == pytest.approx(their_loss, rel=1e-4)
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_the_methods_of_a_grid_train_different_parameters_and_images(tmp_path):
    """`methods` varies like any setting: full has its own rate, joint forgets less."""
    settings = small(tmp_path, steps=20, full_lr=0.003)
    todo = list(cells(settings, {"methods": ["lora", "full", "joint-lora", "joint"]}))
    assert [(c.full, c.joint) for c in todo] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert [cell.settings.finetuning.lr for cell in todo] == [0.001, 0.003, 0.001, 0.003]
    other = {
        cell.name: sum(row["other_accuracy"] for row in run_cell(cell)[1:]) / 2 for cell in todo
    }
    assert other["methods=joint"] > other["methods=full"]
    assert len(set(other.values())) > 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "wrapped"}, "one method out of lora, full, joint-lora, joint, got wrapped"),
        ({"methods": "lora,full"}, "got lora,full"),
        ({"methods": "joint", "margin": 4.0}, "--methods joint trains on all digits"),
    ],
)
def test_a_method_that_a_sweep_does_not_have_is_refused(tmp_path, changes, message):
    """A cell with several methods, with wrapped layers, or joint with a remedy raises."""
    with pytest.raises(StudyError, match=message):
        list(cells(small(tmp_path, **changes), {}))
