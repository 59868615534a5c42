"""The sweep of intruder dimensions: the rows of a training, and the report."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.testing import assert_close

import paramlora as pl
from experiments.digits.methods import ADAPTER, factors_of
from experiments.digits.settings import small_version
from experiments.digits.shared import context_of
from experiments.harness.rundir import RunDirectory
from experiments.sweeps.cells import Cell
from experiments.sweeps.intruders import SIZE, Intruders
from experiments.sweeps.spectra import STRENGTHS, deltas, measured

SMALL: dict[str, Any] = {"device": "cpu", "hidden": (24, 16), "base_steps": 60, "seeds": 1}


def test_the_row_of_a_training_has_its_sizes_similarities_and_scalings(tmp_path):
    """Sizes are those of W' - W; intruders of a large update are scaled beside a control."""
    settings = small_version("relu", **SMALL, bases=str(tmp_path), rank=2, init="kaiming")
    context = context_of(settings)
    torch.manual_seed(0)
    for spec, full in ((pl.LoRA(2, 1.0), False), (pl.Delta(), True)):
        model = context.model()
        before = [layer.weight.detach().clone() for layer in model.children()]
        pl.attach(model, spec, nn.Linear, name=ADAPTER)
        for factor in factors_of(model).values():
            nn.init.normal_(factor, std=1.0)
        cell = Cell("one", settings, (1.0,), full=full)
        row = measured(context, deltas(factors_of(model), cell))
        after = [layer.weight.detach() for layer in model.children()]
        sizes = [float((W1 - W0).norm() / W0.norm()) for W0, W1 in zip(before, after, strict=True)]
        assert_close(torch.tensor(row["sizes"]), torch.tensor(sizes), rtol=1e-5, atol=0)
        assert [len(part) for part in row["left"]] == [10, 10, 10]
        cosines = torch.linalg.svd(after[1])[0].T[:10] @ torch.linalg.svd(before[1])[0]
        expected = cosines.abs().amax(1)
        assert_close(torch.tensor(row["left"][1]), expected, rtol=0, atol=1e-3)
        names = [(one["of"], one["strength"]) for one in row["scaled"]]
        both = [(of, λ) for of in ("intruder", "neighbour") for λ in STRENGTHS]
        assert names == both


def test_the_report_ranks_predictors_within_each_base():
    """A size that falls with `kept` has a correlation of -1, also if bases differ in level."""
    rows: list[dict[str, Any]] = []
    for base in range(4):
        common = {"base_seed": base, "seed": 0}
        rows.append({**common, "stage": "base", "tuned_accuracy": 0.9, "other_accuracy": 0.9})
        for step, rate in enumerate((1e-3, 1e-2, 1e-1)):
            rows.append(
                {
                    **common,
                    "stage": "on",
                    "varied": {"method": "full", "lr": rate},
                    "tuned_accuracy": 0.95,
                    "other_accuracy": 0.8 - 0.1 * step,
                    "sizes": [10.0 * base + step],
                    "left": [[0.2 if step == 2 else 0.9]],
                    "right": [[0.9]],
                    "scaled": [
                        {"of": of, "strength": λ, "tuned": 0.95, "other": 0.81}
                        for of in ("intruder", "neighbour")
                        for λ in STRENGTHS
                    ],
                }
            )
    found = Intruders(RunDirectory(Path(), {}, {}, rows))
    assert list(found.correlation(found.rows, SIZE).values()) == [-1.0] * 4
    assert found.correlation(found.rows, "right, ε = 0.5") == {}
    lines = {line[0]: line[1:] for line in found.correlation_table().rows}
    assert lines[SIZE][0] == "-1.00 (-1.00 to -1.00)"
    assert lines["left, ε = 0.5"][0].startswith("-0.87")
    assert found.scaling_table().rows[0][-1] == "12"
    assert found.rate_table().rows[2][3] == "1.0"
