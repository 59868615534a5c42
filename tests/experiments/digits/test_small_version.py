"""The small version of the study, for machines without MNIST: its settings and what it says."""

from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.digits import shared
from experiments.digits.data import SKLEARN, Data, load_data
from experiments.digits.report.findings import findings
from experiments.digits.report.report import markdown
from experiments.digits.settings import preset, small_version
from experiments.digits.shared import settings_and_data
from experiments.harness.rundir import Row, RunDirectory
from experiments.report.table import Sample
from experiments.sweeps.cells import cells
from experiments.sweeps.sweep import run_job

FEW = ["--data", "digits", "--device", "cpu", "--hidden", "8,8", "--seeds", "1"]


@pytest.fixture
def without_mnist(monkeypatch: pytest.MonkeyPatch) -> Data:
    """The data set of "auto" on a machine without MNIST."""
    digits = load_data("digits")
    monkeypatch.setattr(shared, "shared_data", lambda kind, data_dir: digits)
    return digits


@pytest.mark.parametrize("name", ["", "blog", "relu"])
def test_without_mnist_the_settings_are_those_of_the_small_version(without_mnist, name):
    """If "auto" finds no MNIST, the preset is "small", with the options given."""
    settings, data = settings_and_data(name, seeds=3, base_steps=9)
    assert settings == preset("small", seeds=3, base_steps=9)
    assert data is without_mnist


def test_the_small_version_of_nine_keeps_its_network(without_mnist):
    """Preset "nine" without MNIST keeps its network, digit, steps and rank."""
    settings, _ = settings_and_data("nine", data="auto")
    assert settings == small_version("nine")
    assert settings.network == preset("nine").network
    assert (settings.finetuning.digits, settings.finetuning.steps) == ("9", 100)
    assert settings.pretraining.base_steps == preset("small").pretraining.base_steps


def test_data_that_are_asked_for_change_no_preset():
    """`data="digits"` chooses "small" if no preset is given, and leaves a given one as it is."""
    assert settings_and_data(data="digits")[0] == preset("small")
    assert settings_and_data("relu", data="digits")[0] == preset("relu", data="digits")


@pytest.mark.slow
def test_the_small_version_shows_learning_and_forgetting(tmp_path):
    """Over 8 seeds, tuned digits gain and others lose more than twice the standard deviation."""
    settings = preset("small", device="cpu", bases=str(tmp_path))
    (cell,) = cells(settings, {})
    base, *adapters = run_job([cell])[0]
    assert base["accuracy"] > 0.9
    for group, sign in (("tuned", 1), ("other", -1)):
        key = f"{group}_accuracy"
        gains = Sample(tuple(sign * (row[key] - base[key]) for row in adapters))
        assert len(gains.values) == 8
        assert gains.sd is not None
        assert gains.mean > 0.04
        assert gains.mean > 2 * gains.sd


def test_the_small_version_says_so(tmp_path, capsys):
    """Terminal and report say that it is the small version and how to get MNIST."""
    places = ["--out", str(tmp_path / "run"), "--bases", str(tmp_path / "bases")]
    assert main(["digits", *FEW, "--steps", "10", "--base-steps", "50", *places]) == 0
    report = markdown(RunDirectory.read(tmp_path / "run"), [])
    for text in (capsys.readouterr().out, report):
        assert "This is the small version of the study, on scikit-learn's 1,797 digits" in text
        assert "--data-dir with a folder of MNIST's four archives" in text
        assert "published" not in text
    assert "E. Alpaydin and C. Kaynak" in report


def test_sequences_of_tasks_run_on_the_small_data(tmp_path, capsys):
    """`tasks` on scikit-learn's digits runs with its presets' settings, and says it is small."""
    words = ["tasks", *FEW, "--steps", "2", "--base-steps", "5"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "small    This is the small version" in capsys.readouterr().out
    assert "This is the small version" in (tmp_path / "run" / "tasks.md").read_text()


def made_up(tuned_accuracy: list[float], other_accuracy: list[float]) -> RunDirectory:
    """Return a run with a base at 0.9 and an adapter per seed, which takes 4s for 9s."""

    def row(method: str, stage: str, tuned: float, other: float, wrong: int) -> Row:
        confusion = torch.diag(torch.full((10,), 100 - wrong))
        confusion[4, 9] = wrong
        return {
            "method": method,
            "stage": stage,
            "tuned": [2, 9],
            "tuned_accuracy": tuned,
            "other_accuracy": other,
            "wrong_counts": [0, 0, 0, 0, wrong, 0, 0, 0, 0, 0],
            "confusion": confusion.tolist(),
        }

    rows = [row("base", "base", 0.9, 0.9, 1)]
    for tuned, other in zip(tuned_accuracy, other_accuracy, strict=True):
        rows.append(row("lora", "on", tuned, other, 30))
    return RunDirectory(Path(), {}, {"data": SKLEARN}, rows)


def test_findings_are_computed_from_the_rows():
    """The sentences have the rows' accuracies, direction, seeds, and the most forgotten digit."""
    learned, forgotten, off = findings(made_up([0.95, 0.97], [0.7, 0.74]), failed=False)
    assert learned == (
        "The adapter learns: 90.00 → 96.0 ± 1.4 % of the tuned digits (2, 9) are right "
        "(+6.0 points, 2 adapter seeds)."
    )
    assert forgotten == (
        "The adapter forgets: 90.00 → 72.0 ± 2.8 % of the other digits are right "
        "(-18.0 points, 2 adapter seeds); most is lost on 4, which is taken for 9."
    )
    assert off.endswith("nothing is lost.")


def test_findings_claim_no_direction_within_the_noise():
    """A change within one standard deviation has no direction, and a failed check is named."""
    learned, forgotten, off = findings(made_up([0.8, 0.99], [0.95, 0.97]), failed=True)
    assert learned.startswith("The adapter changes little: 90.00 → ")
    assert forgotten.startswith("The adapter gains: 90.00 → 96.0 ")
    assert off == "A check failed, so these figures are not reliable. See the checks."
