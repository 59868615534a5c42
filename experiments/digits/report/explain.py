"""A page on what one adapter of a digit run changed: predictions, layers, geometry.

    python -m experiments report runs/digits-blog --explain

The adapter is loaded and evaluated. Nothing is trained, unless the run's base is missing.
"""

from pathlib import Path
from typing import Any

import paramlora as pl

from ...analysis.geometry import geometry
from ...analysis.insight import (
    TradeOff,
    attribution,
    flips,
    predict,
    predict_off_and_on,
    shapley,
    strength_curve,
    trade_off,
)
from ...harness.rundir import RunDirectory, replace_file
from ...harness.settings import replace
from ...report.document import Picture, Sections
from ...report.figures import (
    confusion_panels,
    contact_sheet,
    flip_bars,
    geometry_table,
    plt,
    png,
    shapley_bars,
    trade_off_curve,
)
from ...report.page import page
from ...report.table import Table
from ..settings import DigitSettings
from ..shared import context_of, counted_images

STRENGTHS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5]
DIGITS = list("0123456789")


def settings_of(run: RunDirectory, **places: Any) -> DigitSettings:
    """Return a run's settings. `places`: new values of the settings that are folders."""
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in run.settings.items()}
    return replace(DigitSettings(), **kept, **places)


def explain(folder: Path, seed: int | None = None, **places: Any) -> Path:
    """Write explain.html, on a run's adapter of one seed (default: the first), into its folder.

    Returns:
        The path of the page.
    """
    run = RunDirectory.read(folder)
    context = context_of(settings_of(run, **places))
    seed = context.settings.seed_from if seed is None else seed
    model, test = context.model(), [(context.test_inputs, context.test_labels)]
    pl.load(model, folder / "adapters" / f"lora-{seed}.safetensors", name="lora")
    images = counted_images(context.settings)
    off, on = predict_off_and_on(model, test)
    flipped = flips(off, on)
    found = trade_off(strength_curve(model, test, STRENGTHS), context.tuned)
    subsets = attribution(model, lambda adapted: predict(adapted, test).accuracies(context.tuned))

    overview, panels = plt.subplots(1, 3, figsize=(12.5, 3.6), layout="constrained")
    flip_bars(panels[0], flipped, DIGITS)
    trade_off_curve(panels[1], found)
    shapley_bars(panels[2], contributions(subsets))
    sheets = {
        side: contact_sheet(flipped, images, (off, on), DIGITS, side)
        for side in ("negative", "positive")
        if any(getattr(flipped, side).values())
    }
    panels_confusion = confusion_panels(off.confusion, on.confusion, DIGITS, context.tuned)
    sections: Sections = {
        "Overview": [Picture(png(overview), OVERVIEW), _front(found)],
        "Updates": [geometry_table(geometry(model)), GEOMETRY],
        "Confusion": [Picture(png(panels_confusion), CONFUSION)],
        "Images": [Picture(png(sheet), SHEETS[side]) for side, sheet in sheets.items()],
        "Every subset of layers": [subset_table(subsets)],
    }
    title = f"What adapter {seed} of preset {context.settings.preset} changed"
    digits = ", ".join(map(str, context.tuned))
    lead = f"{run.environment['data']}, {len(off.labels):,} images; tuned on {digits}."
    replace_file(folder / "explain.html", page(title, lead, sections).encode())
    return folder / "explain.html"


OVERVIEW = (
    "Left: images whose answer became correct or wrong, by digit. Middle: accuracy on tuned and "
    "other digits as the strength λ grows. Right: contribution of each layer's update (Shapley "
    "value), the mean over all orders of switching layers on."
)
GEOMETRY = (
    "Principal angles, in degrees, between the columns of ΔW and as many leading left singular "
    "vectors of W. Amplification: ‖ΔW‖ divided by the norm of W in ΔW's directions."
)
CONFUSION = "Wrong answers with the adapter off, with it on, and the difference."
SHEETS = {
    "negative": "Correct with the adapter off, wrong with it on.",
    "positive": "Wrong with the adapter off, correct with it on.",
}
Subsets = dict[frozenset[str], dict[str, float]]  # accuracies by set of active layers


def contributions(subsets: Subsets) -> dict[str, dict[str, float]]:
    """Return each layer's Shapley value for the tuned and the other classes, as fractions."""
    return {
        group: shapley({sites: accuracies[group] for sites, accuracies in subsets.items()})
        for group in ("tuned", "other")
    }


def subset_table(subsets: Subsets) -> Table:
    """Return the accuracies with the adapter active at each subset of layers."""
    rows = [
        [", ".join(sorted(sites)) or "none", *(f"{100 * a[g]:.2f}" for g in ("tuned", "other"))]
        for sites, a in subsets.items()
    ]
    return Table(["active layers", "tuned, %", "other, %"], rows)


def _front(found: TradeOff) -> str:
    return (
        f"{len(found.front)} of {len(found.points)} strengths are on the Pareto front: no other "
        "strength is better on tuned and on other digits."
    )
