"""Figures of what adapters did, for any model: drawn from `insight`, saved by whoever asks.

Each takes an axes or makes a figure, and returns it. One thing has one colour, as in `style`.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from torch import Tensor

from ..analysis.geometry import Geometry
from ..analysis.insight import Answers, Front, Ledger
from ..harness.loggers import Curve
from .table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OFF, ON, OTHER = "#0072B2", "#D55E00", "#555555"


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, the same bytes for the same figure, and close it."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def contact_sheet(
    ledger: Ledger,
    images: Tensor,
    answers: tuple[Answers, Answers],
    classes: Sequence[str],
    side: str = "lost",
    most: int = 12,
) -> Figure:
    """Draw the examples that changed sides, a row a class, each with its two answers.

    Args:
        ledger: which changed.
        images: (n, h, w) or (n, h, w, 3), in the data set's order.
        answers: before and after.
        classes: their names, by label.
        side: "lost" (right → wrong) or "won" (wrong → right).
        most: examples of a class that are shown.
    """
    its = {label: rows for label, rows in getattr(ledger, side).items() if rows}
    before, after = (a.given.tolist() for a in answers)
    figure, panels = plt.subplots(
        max(1, len(its)),
        most,
        figsize=(0.75 * most + 1, 0.95 * max(1, len(its)) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axes in panels.flat:
        axes.set_axis_off()
    for line, (label, rows) in zip(panels, its.items(), strict=False):
        for axes, row in zip(line, rows, strict=False):
            axes.imshow(images[row].numpy(), cmap="gray_r")
            axes.set_title(f"{classes[before[row]]} → {classes[after[row]]}", fontsize=7, pad=2)
        line[0].text(
            -0.15,
            0.5,
            f"{classes[label]}\n{len(rows)}",
            transform=line[0].transAxes,
            ha="right",
            va="center",
            fontsize=9,
        )
    words = {"lost": "right before, wrong after", "won": "wrong before, right after"}
    figure.suptitle(f"{words[side]}: class, how many, and answers before → after", fontsize=9)
    return figure


def ledger_bars(axes: Axes, ledger: Ledger, classes: Sequence[str]) -> None:
    """Draw how many examples of each class were won (up) and lost (down)."""
    counts = ledger.counts()
    places = range(len(counts))
    axes.bar(places, [won for _, won, _ in counts], color=OFF, label="wrong → right")
    axes.bar(places, [-lost for _, _, lost in counts], color=ON, label="right → wrong")
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(list(places), [classes[label] for label, _, _ in counts])
    axes.set_ylabel("examples")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def strength_front(
    axes: Axes, strengths: Sequence[float], found: Front, name: str = "", colour: str = ON
) -> None:
    """Draw accuracy on the other classes against that on the tuned ones, a point a strength."""
    x, y = (100 * np.array([point[side] for point in found.points]) for side in (0, 1))
    axes.plot(x, y, "-", color="#cccccc", zorder=1)
    label = f"{name} area {found.area:.3f}".strip()
    axes.scatter(x, y, color=colour, s=18, zorder=2, label=label)
    for strength, a, b in zip(strengths, x, y, strict=True):
        axes.annotate(f"{strength:g}", (a, b), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="tuned classes, % right", ylabel="other classes, % right")
    axes.legend(frameon=False, title="points: λ")


def training_curve(axes: Axes, curve: Curve) -> None:
    """Draw accuracies against the steps of a fine-tuning, as a `Curve` kept them."""
    colours = {"tuned": ON, "other": OFF, "all": OTHER}
    for name, values in curve.values.items():
        if name != "loss":
            points = 100 * np.array(values)
            axes.plot(curve.steps, points, label=name, color=colours.get(name))
    axes.set(xlabel="optimizer step", ylabel="% right")
    axes.legend(frameon=False)


def shapley_bars(
    axes: Axes, values: Mapping[str, Mapping[str, float]], unit: str = "points"
) -> None:
    """Draw each site's Shapley value, a group a figure of merit, such as tuned classes."""
    sites = list(next(iter(values.values())))
    width = 0.8 / len(values)
    colours = {"tuned": ON, "other": OFF, "all": OTHER}
    for number, (name, its) in enumerate(values.items()):
        places = np.arange(len(sites)) + (number - (len(values) - 1) / 2) * width
        heights = [100 * its[site] for site in sites]
        axes.bar(places, heights, width * 0.9, label=name, color=colours.get(name))
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(sites)), sites)
    axes.set_ylabel(f"Shapley value, {unit}")
    axes.legend(frameon=False)


def geometry_table(found: Mapping[str, Geometry]) -> Table:
    """Return rank, size and principal angles of each site's update as a table."""
    rows = []
    for site, its in found.items():
        angles = ", ".join(f"{angle:.0f}" for angle in its.angles[:4])
        angles += ", …" if len(its.angles) > 4 else ""
        rows.append([site, str(its.rank), f"{its.size:.3f}", f"{angles}°", f"{its.amplified:.1f}"])
    return Table(["site", "rank of ΔW", "‖ΔW‖/‖W‖", "angles to W", "amplified"], rows)


def confusion_panels(
    before: Answers, after: Answers, classes: Sequence[str], tuned: Sequence[int] = ()
) -> Figure:
    """Draw mistakes before and after, and the difference; right answers are left out."""
    off, on = (np.array(a.confusion, dtype=float) for a in (before, after))
    for matrix in (off, on):
        np.fill_diagonal(matrix, 0)
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    most, reach = max(off.max(), on.max(), 1), max(abs(on - off).max(), 1)
    drawn = [
        (off, "Oranges", (0, most), "off: mistakes"),
        (on, "Oranges", (0, most), "on: mistakes"),
        (on - off, "RdBu_r", (-reach, reach), "on less off"),
    ]
    for axes, (matrix, colours, (low, high), name) in zip(panels, drawn, strict=True):
        axes.imshow(matrix, cmap=colours, vmin=low, vmax=high)
        axes.set(title=name, xlabel="answer given")
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(range(len(classes)), classes, fontsize=7)
        axes.tick_params(length=0, axis="both")
        axes.tick_params(axis="x", rotation=90 if max(map(len, classes)) > 2 else 0)
        for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
            if label.get_text() in {classes[c] for c in tuned}:
                label.set_fontweight("bold")
        for (row, column), value in np.ndenumerate(matrix):
            if value and len(classes) <= 12:
                colour = "white" if abs(value) > 0.7 * high else "black"
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour
                )
    panels[0].set_ylabel("class (bold: tuned)" if tuned else "class")
    return figure
