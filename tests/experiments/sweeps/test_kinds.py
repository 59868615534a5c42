"""The comparison of kinds: what is trained, how a rate is chosen, and the tables."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from experiments.__main__ import main
from experiments.digits.methods import ADAPTER, factors_of
from experiments.digits.settings import preset
from experiments.digits.shared import context_of
from experiments.harness.rundir import RunDirectory
from experiments.sweeps import kinds as kinds_module
from experiments.sweeps import kinds_report
from experiments.sweeps.kinds import (
    KINDS,
    RATES,
    REFERENCE,
    SELECTION_BASES,
    best_rate,
    measured_cells,
    selection_cells,
)
from experiments.sweeps.kinds_report import Kinds
from experiments.sweeps.logits import spec_logits
from experiments.sweeps.select import SELECTION, TEST
from experiments.sweeps.sweep import tune_one_by_one, tune_together

SMALL: dict[str, Any] = {
    "data": "digits",
    "device": "cpu",
    "hidden": (24, 16),
    "base_steps": 60,
    "steps": 8,
    "seeds": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _bases(tmp_path_factory: pytest.TempPathFactory) -> None:
    SMALL["bases"] = str(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_of_a_kind_train_together(kind: str) -> None:
    """Stacked trainings of every kind end where separate ones do, and give the same logits."""
    context, spec = context_of(preset("small", **SMALL, lr=3e-3)), KINDS[kind]
    todo = [(context, seed) for seed in (0, 1)]
    for (ours, loss), (theirs, other) in zip(
        tune_together(todo, spec=spec), tune_one_by_one(todo, spec=spec), strict=True
    ):
        assert_close(loss, other, rtol=1e-5, atol=1e-5)
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        off, on = spec_logits(context, spec, theirs, [0.0, 1.0])
        assert torch.equal(off, context.base_logits)
        model = context.model()
        pl.attach(model, spec, nn.Linear, name=ADAPTER)
        with torch.no_grad():
            for name, factor in factors_of(model).items():
                factor.copy_(theirs[name])
        pl.bake(model)
        assert_close(on, context.evaluate(model), rtol=1e-4, atol=1e-4)
        assert not torch.equal(on, off)


def rows(gains: dict[str, dict[tuple[str, float], tuple[float, float]]]) -> RunDirectory:
    """Return a run with (learned, kept) in points by part, method and rate, on three bases."""
    made: list[dict[str, Any]] = []
    for part, of_part in gains.items():
        for (method, rate), (learned, kept) in of_part.items():
            for base in range(3):
                varied = {"part": part, "method": method, "lr": rate}
                half = {"base_seed": base, "varied": varied, "n": 100, "trained": 7}
                plain = {"accuracy": 0.5, "tuned_accuracy": 0.5, "other_accuracy": 0.5}
                tuned, other = learned + base / 10, kept
                right = {"tuned_accuracy": tuned, "other_accuracy": other}
                right["accuracy"] = (tuned + other) / 2
                on = {key: 0.5 + value / 100 for key, value in right.items()}
                made.append({**half, **plain, "stage": "base", "seed": None})
                made.append({**half, **on, "stage": "on", "seed": 0})
    settings = {"preset": "relu", "seeds": 1, "steps": 1}
    return RunDirectory(Path(), settings, {"data": "MNIST"}, made)


def measured() -> RunDirectory:
    """Return a run in which LoRA should choose 1e-3, and would choose 1e-2 on the test images."""
    held: dict[tuple[str, float], tuple[float, float]] = {
        (kind, rate): (0.0, 0.0) for kind in KINDS for rate in RATES
    }
    held |= {(REFERENCE, 1e-3): (3.0, -1.0), (REFERENCE, 1e-2): (4.0, -5.0)}
    held |= {("IA3", 1e-2): (1.0, 0.0)}
    test = {
        (REFERENCE, 1e-3): (2.0, -1.0),
        (REFERENCE, 1e-2): (4.0, -1.0),
        ("IA3", 1e-2): (2.0, 0.0),
    }
    return rows({SELECTION: held, TEST: test})


@pytest.mark.filterwarnings("ignore:Precision loss")  # equal differences
def test_validation_images_choose_the_rate() -> None:
    """The rate with the highest gain over all digits in the selection; test rows do not count."""
    run = measured()
    assert best_rate(run, REFERENCE) == 1e-3
    assert best_rate(run, REFERENCE, "tuned_accuracy") == 1e-2
    line = Kinds(run).chosen_table().rows[0]
    assert line[:6] == [REFERENCE, "7", "0.001", "+2.10 ± 0.10", "-1.00 ± 0.00", "+0.55 ± 0.05"]


@pytest.mark.filterwarnings("ignore:Precision loss")  # equal differences
def test_differences_are_paired_by_base() -> None:
    """IA3 is half a point above LoRA on every base, although the bases differ."""
    line = Kinds(measured()).chosen_table().rows[1]
    assert line[0] == "IA3"
    assert line[6].startswith("+0.50 (+0.50 to +0.50)")
    kept = Kinds(measured()).matched_table().rows[0]
    assert kept[1].startswith("+0.2")  # LoRA keeps −x/2 at x points learned, IA3 keeps all
    assert kept[-1] == "3"


def test_the_selection_sees_no_test_images_or_bases() -> None:
    """Its cells hold images out of pre-training, on bases and seeds that the test part lacks."""
    settings = preset("small", **SMALL)
    tried = list(selection_cells(settings, 2))
    tested = list(measured_cells(settings, measured(), 2))
    assert len(tried) == SELECTION_BASES * len(KINDS) * len(RATES)
    assert {cell.settings.seed for cell in tried} == {2, 3}
    assert {cell.settings.seed for cell in tested} == {0, 1}
    assert all(cell.settings.holdout.selection for cell in tried)
    assert not any(cell.settings.holdout.validation for cell in tested)
    seeds = [set(cell.settings.adapter_seeds) for cell in (tried[0], tested[0])]
    assert not set.intersection(*seeds)
    rates = [cell.settings.finetuning.lr for cell in tested if cell.varied["method"] == REFERENCE]
    assert rates == 2 * [1e-4, 3e-4, 1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command writes rows, report and figure; a second call trains nothing."""
    few = {kind: KINDS[kind] for kind in (REFERENCE, "IA3")}
    monkeypatch.setattr(kinds_module, "KINDS", few)
    for module in (kinds_module, kinds_report):
        monkeypatch.setattr(module, "RATES", (1e-3, 1e-2))
    small = ["--data", "digits", "--hidden", "24,16", "--base-steps", "60", "--steps", "8"]
    command = ["sweep", "--preset", "kinds-small", "--seeds", "2", "--base-seeds", "2", *small]
    command += ["--bases", SMALL["bases"], "--out", str(tmp_path)]
    assert main(command) == 0
    text = (tmp_path / "kinds.md").read_text(encoding="utf-8")
    assert "n = 2 bases" in text
    assert "| IA3 |" in text
    assert (tmp_path / "kinds.png").stat().st_size > 5000
    capsys.readouterr()
    assert main(command) == 0
    assert "8 cells, 8 of them done" in capsys.readouterr().out
