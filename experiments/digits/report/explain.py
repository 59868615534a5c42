"""What a digit study's adapters did, on a page of their own: from its adapters and its base.

    python -m experiments report runs/digits-blog --explain

The adapters are loaded and evaluated, nothing is trained (a base that is gone is made again).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramlora as pl

from ...analysis.geometry import geometry
from ...analysis.insight import (
    Answers,
    answers_of,
    attribution,
    learning_and_forgetting,
    ledger,
    off_and_on,
    shapley,
    strength_curve,
)
from ...analysis.task_metrics import front
from ...harness.rundir import RunDirectory, replace_file
from ...harness.settings import replace
from ...report.figures import (
    confusion_panels,
    contact_sheet,
    geometry_table,
    ledger_bars,
    plt,
    png,
    shapley_bars,
    strength_front,
)
from ...report.page import figure_html, page, paragraph, table_html
from ...report.table import Table
from ..settings import DigitSettings
from ..shared import context_of, counted_images

STRENGTHS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5]
DIGITS = list("0123456789")


def settings_of(run: RunDirectory, **places: Any) -> DigitSettings:
    """Return the settings that a run was made with; `places` says where things lie now."""
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in run.settings.items()}
    return replace(DigitSettings(), **kept, **places)


def explain(folder: Path, seed: int = 0, **places: Any) -> Path:
    """Write explain.html beside a run's report, on its adapter of one seed; return where it is."""
    run = RunDirectory.read(folder)
    context = context_of(settings_of(run, **places))
    model, test = context.model(), [(context.test_inputs, context.test_labels)]
    pl.load(model, folder / "adapters" / f"lora-{seed}.safetensors", name="lora")
    images = counted_images(context.settings)
    off, on = off_and_on(model, test)
    book, curve = ledger(off, on), strength_curve(model, test, STRENGTHS)
    found = learning_and_forgetting(curve, context.tuned)
    values = every_set(model, test, context.tuned)

    figure, panels = plt.subplots(1, 3, figsize=(12.5, 3.6), layout="constrained")
    ledger_bars(panels[0], book, DIGITS)
    strength_front(panels[1], STRENGTHS, found)
    shapley_bars(panels[2], contributions(values))
    overview = figure_html(
        png(figure),
        "Left: images won and lost by digit. Middle: what the strength λ buys. Right: what each "
        "layer's update contributes, the mean over all orders of switching layers on.",
    )
    sheets = [
        figure_html(png(contact_sheet(book, images, (off, on), DIGITS, side)), said)
        for side, said in (
            ("lost", "Right with the adapter off, wrong with it on."),
            ("won", "Wrong with the adapter off, right with it on."),
        )
        if any(getattr(book, side).values())
    ]
    confusion = figure_html(
        png(confusion_panels(off, on, DIGITS, context.tuned)), "What each digit is mistaken for."
    )
    parts = [
        ("Overview", overview + paragraph(_said(found.points))),
        ("Updates", table_html(geometry_table(geometry(model))) + paragraph(GEOMETRY)),
        ("Confusion", confusion),
        ("Images", "\n".join(sheets)),
        ("Every set of layers", table_html(_layers(values))),
    ]
    name = f"What adapter {seed} of preset {context.settings.preset} did"
    digits = ", ".join(map(str, context.tuned))
    lead = f"{run.environment['data']}, {len(off.labels):,} images; tuned on {digits}."
    replace_file(folder / "explain.html", page(name, lead, parts).encode())
    return folder / "explain.html"


GEOMETRY = (
    "Angles, in degrees: between the columns of ΔW and as many of W's largest left-singular "
    "directions; amplified: ‖ΔW‖ by the size of W along ΔW's own directions."
)


def merit(answers: Answers, tuned: list[int]) -> dict[str, float]:
    """Return the accuracy on tuned and other classes."""
    new, right = torch.isin(answers.labels, torch.tensor(tuned)), answers.right.float()
    return {"tuned": float(right[new].mean()), "other": float(right[~new].mean())}


Sets = dict[frozenset[str], dict[str, float]]


def every_set(model: nn.Module, test: list[Any], tuned: list[int]) -> Sets:
    """Return the accuracies with the adapter on at each set of layers."""
    return attribution(model, lambda adapted: merit(answers_of(adapted, test), tuned))


def contributions(values: Sets) -> dict[str, dict[str, float]]:
    """Return each layer's Shapley value for tuned and for other classes, fractions."""
    return {
        side: shapley({sites: its[side] for sites, its in values.items()})
        for side in ("tuned", "other")
    }


def _layers(values: Sets) -> Table:
    rows = [
        [", ".join(sorted(sites)) or "none", *(f"{100 * its[s]:.2f}" for s in ("tuned", "other"))]
        for sites, its in values.items()
    ]
    return Table(["on at", "tuned, %", "other, %"], rows)


def _said(points: list[tuple[float, float]]) -> str:
    kept = len(front(points))
    return f"{kept} of {len(points)} strengths are on the front: no other is better on both sides."
