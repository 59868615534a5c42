"""The changes that adapters make in any classifier, as a report's sections with figures and tables.

It needs a model with adapters, a loader of inputs and labels, the images and the class names. The
model is evaluated and left unchanged. Nothing is trained.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..analysis.geometry import geometry
from ..analysis.insight import (
    Flips,
    Loader,
    Predictions,
    TradeOff,
    attribution,
    flips,
    predict,
    predict_off_and_on,
    shapley,
    strength_curve,
    trade_off,
)
from .document import Block, Picture, Sections
from .figures import (
    confusion_panels,
    contact_sheet,
    flip_bars,
    geometry_table,
    plt,
    png,
    shapley_bars,
    trade_off_curve,
)
from .table import Table

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5)
OVERVIEW = (
    "Left: images whose answer became correct or wrong, by class. Middle: accuracy on tuned and "
    "other classes as the strength λ grows. Right: contribution of each layer's update (Shapley "
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


def explanation(
    model: nn.Module,
    loader: Loader,
    classes: Sequence[str],
    *,
    tuned: Sequence[int],
    images: Tensor,
    strengths: Sequence[float] = STRENGTHS,
) -> Sections:
    """Return figures and tables of the changes that a model's adapters make.

    Args:
        model: with adapters at up to ten tensors, because all subsets of these are evaluated.
        loader: batches of inputs and labels, in the same order every time.
        classes: their names, by label.
        tuned: the labels that the adapters were trained on.
        images: uint8 (n, h, w) or (n, h, w, 3) in the loader's order, to show.
        strengths: values of λ.

    Raises:
        StudyError: the model has no adapter, or adapters at more than ten tensors.
    """
    off, on = predict_off_and_on(model, loader)
    flipped = flips(off, on)
    subsets = attribution(model, lambda adapted: predict(adapted, loader).accuracies(tuned))
    found = trade_off(strength_curve(model, loader, strengths), tuned)
    panels = confusion_panels(off.confusion, on.confusion, classes, tuned)
    return {
        "Overview": [_overview(flipped, found, subsets, classes), _front(found)],
        "Updates": [geometry_table(geometry(model)), GEOMETRY],
        "Confusion": [Picture(png(panels), CONFUSION)],
        "Images": _sheets(flipped, images, (off, on), classes),
        "Every subset of layers": [subset_table(subsets)],
    }


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


def _overview(flipped: Flips, found: TradeOff, subsets: Subsets, classes: Sequence[str]) -> Picture:
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 3.6), layout="constrained")
    flip_bars(panels[0], flipped, classes)
    trade_off_curve(panels[1], found)
    shapley_bars(panels[2], contributions(subsets))
    for axes in (panels[0], panels[2]):
        names = [label.get_text() for label in axes.get_xticklabels()]
        axes.tick_params(axis="x", rotation=90 if sum(map(len, names)) > 48 else 0)
    return Picture(png(figure), OVERVIEW)


def _sheets(
    flipped: Flips,
    images: Tensor,
    predictions: tuple[Predictions, Predictions],
    classes: Sequence[str],
) -> list[Block]:
    return [
        Picture(png(contact_sheet(flipped, images, predictions, classes, side)), caption)
        for side, caption in SHEETS.items()
        if any(getattr(flipped, side).values())
    ]


def _front(found: TradeOff) -> str:
    return (
        f"{len(found.front)} of {len(found.points)} strengths are on the Pareto front: no other "
        "strength is better on tuned and on other classes."
    )
