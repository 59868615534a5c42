"""The learning-forgetting front, and the methods of a sweep's cells."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.analysis import front as analysis_module
from experiments.digits.settings import DigitSettings, preset
from experiments.digits.shared import context_of
from experiments.harness.rundir import Row, RunDirectory
from experiments.harness.settings import StudyError
from experiments.sweeps import front as front_module
from experiments.sweeps import front_tables as tables_module
from experiments.sweeps.cells import cells
from experiments.sweeps.front import run_front
from experiments.sweeps.front_report import markdown
from experiments.sweeps.front_tables import Front, with_interval
from experiments.sweeps.select import SELECTION, TEST
from experiments.sweeps.sweep import run_cell, tune_one_by_one, tune_together

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (16, 12),
    "base_steps": 150,
    "steps": 8,
    "seeds": 2,
}
RATES = (1.0, 10.0)
FEW = {name: front_module.ARMS[name] for name in ("LoRA r 1", "LoRA r 2", "full", "joint full")}


def small(folder: Path, **more: Any) -> DigitSettings:
    return preset("relu", **{**SMALL, **more}, bases=str(folder / "bases"))


@pytest.fixture
def few_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "ARMS", FEW)
    defaults = front_module.run_front.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "times", RATES)
    monkeypatch.setattr(front_module, "JOINT_TIMES", (1.0,))


@pytest.mark.parametrize("module", [analysis_module, tables_module])
def test_examples_in_docstrings_run(module):
    """The examples in the docstrings pass."""
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


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


@pytest.mark.usefixtures("few_arms")
def test_a_front_is_run_from_the_command_line_and_resumed(tmp_path, capsys):
    """It has every method, rate, base and seed, chooses by validation images, and resumes."""
    words = "sweep --preset front-relu --data digits --device cpu --hidden 16,12 --base-steps 150"
    words += f" --steps 8 --seeds 2 --base-seeds 2 --bases {tmp_path / 'bases'} --out "
    given = [*words.split(), str(tmp_path / "run")]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "# Learning and forgetting, preset relu" in shown
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").open()]
    tests = [r for r in rows if r["varied"]["part"] == TEST and r["stage"] == "on"]
    assert {(r["base_seed"], r["seed"]) for r in tests} == {(b, s) for b in (0, 1) for s in (0, 1)}
    assert len(tests) == 4 * (2 + 2 + 2 + 1)
    chosen = [r for r in rows if r["varied"]["part"] == SELECTION]
    assert {r["base_seed"] for r in chosen} == {2, 3}
    assert {r["varied"]["arm"] for r in chosen} == {"LoRA r 1", "LoRA r 2", "full"}
    assert {r["n"] for r in chosen} != {r["n"] for r in tests}
    assert main(given) == 0
    assert "cell  " not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"front.md", "front.png"}


@pytest.mark.parametrize("changes", [{"margin": 4.0}, {"methods": "lora"}])
def test_a_front_takes_no_remedy_and_no_methods(tmp_path, changes):
    """A front with a remedy, or with methods of its own, raises."""
    with pytest.raises(StudyError, match="own methods and rates"):
        run_front(small(tmp_path, **changes), tmp_path / "run")


def made_rows(points: dict[str, list[tuple[float, float]]], bases: int) -> list[Row]:
    """Return rows of two seeds with these gains (tuned, other) per rate, times b + 1 on base b.

    The seeds deviate by 1 point from the gain, in opposite directions.
    """
    rows: list[Row] = []
    for base in range(bases):
        about = {"base_seed": base, "stage": "base", "tuned_accuracy": 0.5, "other_accuracy": 0.5}
        for arm, gains in points.items():
            rows.append({**about, "varied": {"arm": arm, "lr": 1.0, "part": TEST}, "seed": None})
            for rate, gain in enumerate(gains, start=1):
                varied = {"arm": arm, "lr": float(rate), "part": TEST}
                for seed in (0, 1):
                    x, y = (0.5 + ((base + 1) * g + 2 * seed - 1) / 100 for g in gain)
                    row = {"stage": "on", "seed": seed, "tuned_accuracy": x, "other_accuracy": y}
                    rows.append({**about, **row, "varied": varied})
    return rows


def made_front(points: dict[str, list[tuple[float, float]]], bases: int = 3) -> Front:
    settings = {"preset": "relu", "chosen_on": 0, "digits": "2", "steps": 1, "batch": 1, "alpha": 1}
    return Front(RunDirectory(Path(), settings, {"data": "MNIST"}, made_rows(points, bases)))


def test_equal_learning_is_compared_per_base():
    """The difference at a share of full's learning is interpolated on each base, then averaged.

    full learns 4 points and loses 2 on base 0, twice and three times that on the others. LoRA
    loses three times as much per point learned, up to 3 points.
    """
    front = made_front({"LoRA r 1": [(1.0, -1.5), (3.0, -4.5)], "full": [(2.0, -1.0), (4.0, -2.0)]})
    assert front.seeds == 2
    assert front.kept("full", 0, 0.5) == pytest.approx(-1.0)
    assert front.kept("LoRA r 1", 2, 0.5) == pytest.approx(-9.0)
    assert front.kept("LoRA r 1", 0, 0.9) is None
    kept = {row[0]: row[1:] for row in front.kept_table().rows}
    assert kept["full"][:2] == ["+8.00 ± 4.00", "-1.00 ± 0.50"]
    assert kept["LoRA r 1"][-1] == "-"
    (row,) = front.difference_table().rows
    # −1 per base at 25 % on base 0: −1, −2, −3; t of 2 degrees of freedom is 4.303.
    assert row[1] == "-2.00 (-4.48 to +0.48)"
    # Over all that both learn, 0 to 3 points on base 0, the mean difference is −1.5.
    assert row[-1].startswith("-3.00 (")
    assert front.ratio_table().rows[0][1] == "3.00 (3.00 to 3.00)"


def test_a_report_follows_its_rows():
    """The report has n, the interval's meaning, and a note where no rate was chosen."""
    text = markdown(made_front({"LoRA r 1": [(1.0, -1.0)], "full": [(2.0, -1.0)]}))
    assert "n = 3 bases; each value is the mean over 2 adapter seeds" in text
    assert "clustered by base" in text
    assert "No rate was chosen" in text
    assert "| full | 1 | +4.00 ± 2.00 | -2.00 ± 1.00 |" in text


def test_an_interval_of_one_base_is_its_value():
    """With one base there is no interval."""
    front = made_front({"full": [(2.0, -1.0)]}, bases=1)
    assert with_interval(front.sample("full", 1.0, 0)) == "+2.00"
