"""Figures of the effect of adapters on any classifier, and the project's only matplotlib setup.

Functions that take `axes` draw on them; the others return a new figure. Nothing is saved here.
"""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from torch import Tensor

from ..analysis.geometry import Geometry
from ..analysis.insight import Flips, Predictions, TradeOff
from ..harness.loggers import Curve
from .style import COLOUR, EDGE, GROUP_COLOUR, STYLE
from .table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure

plt.rcParams.update(STYLE)


def png(figure: Figure, colours: int | None = None) -> bytes:
    """Return a figure as a PNG, and close it.

    matplotlib's version is left out of the file, so that the same figure gives the same bytes.

    Args:
        figure: the figure.
        colours: the size of a palette to reduce the colours to. A figure of thousands of
            translucent points then takes a third of the bytes.
    """
    file = io.BytesIO()
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)
    if colours:
        from PIL import Image

        reduced = Image.open(file).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        reduced.save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue()


def contact_sheet(
    flips: Flips,
    images: Tensor,
    predictions: tuple[Predictions, Predictions],
    classes: Sequence[str],
    side: str = "negative",
    per_class: int = 12,
) -> Figure:
    """Draw the examples that flipped, one row per class, each with both of its predictions.

    Args:
        flips: the examples.
        images: (n, h, w) or (n, h, w, 3), in the data set's order.
        predictions: before and after.
        classes: their names, by label.
        side: "negative" (correct before, wrong after) or "positive" (wrong before, correct after).
        per_class: examples shown for each class.
    """
    by_class = {label: rows for label, rows in getattr(flips, side).items() if rows}
    before, after = (p.predicted.tolist() for p in predictions)
    widest = min(per_class, max(map(len, by_class.values()), default=0))
    lines, columns = max(1, len(by_class)), max(6, widest)  # the title is six images wide
    figure = plt.figure(figsize=(0.75 * columns + 1, 0.95 * lines + 0.5), layout="constrained")
    grid = figure.add_gridspec(lines, columns)
    for line, (label, rows) in enumerate(by_class.items()):
        for column, row in enumerate(rows[:per_class]):
            axes = figure.add_subplot(grid[line, column])
            axes.set_axis_off()
            axes.imshow(images[row].numpy(), cmap="gray_r")
            axes.set_title(f"{classes[before[row]]} → {classes[after[row]]}", fontsize=7, pad=2)
            if column == 0:
                name = f"{classes[label]}\nn = {len(rows)}"
                axes.text(
                    -0.15, 0.5, name, fontsize=9, transform=axes.transAxes, ha="right", va="center"
                )
    title = {"negative": "correct before, wrong after", "positive": "wrong before, correct after"}
    figure.suptitle(f"{title[side]}; above each image: prediction before → after", fontsize=9)
    return figure


def flip_bars(axes: Axes, flips: Flips, classes: Sequence[str]) -> None:
    """Draw the number of positive (up) and negative (down) flips of each class."""
    counts = flips.counts()
    places = range(len(counts))
    axes.bar(
        places, [up for _, up, _ in counts], color=COLOUR["off"], label="wrong → correct", **EDGE
    )
    axes.bar(
        places, [-down for *_, down in counts], color=COLOUR["on"], label="correct → wrong", **EDGE
    )
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(list(places), [classes[label] for label, _, _ in counts])
    axes.yaxis.set_major_formatter(lambda count, _: f"{abs(count):g}")
    axes.set(xlabel="class", ylabel="images")
    _legend_above(axes)


def trade_off_curve(axes: Axes, found: TradeOff) -> None:
    """Draw accuracy on the other classes against the tuned ones, one point per strength."""
    x, y = (100 * np.array([point[side] for point in found.points]) for side in (0, 1))
    axes.plot(x, y, "-", color=COLOUR["base"], linewidth=0.8, zorder=1)
    axes.scatter(x, y, color=COLOUR["on"], s=18, zorder=2)
    for strength, a, b in zip(found.strengths, x, y, strict=True):
        axes.annotate(f"{strength:g}", (a, b), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="accuracy on tuned classes, %", ylabel="accuracy on other classes, %")
    axes.set_title(f"one point per strength λ; area {found.area:.3f}", fontsize=9)
    axes.margins(0.08)  # room for the labels of the outermost points


def training_curve(axes: Axes, curve: Curve) -> None:
    """Draw the accuracies that a `Curve` recorded during fine-tuning, against the step."""
    for name, values in curve.values.items():
        if name != "loss":
            colour, label = GROUP_COLOUR.get(name), f"{name} classes"
            axes.plot(curve.steps, 100 * np.array(values), label=label, color=colour)
    axes.set(xlabel="optimizer step", ylabel="accuracy, %")
    _legend_above(axes)


def shapley_bars(axes: Axes, values: Mapping[str, Mapping[str, float]]) -> None:
    """Draw each site's Shapley values in accuracy points, one bar per group of classes.

    Args:
        axes: to draw on.
        values: fractions by group ("tuned", "other", "all" or any name), then by site.
    """
    sites = list(next(iter(values.values())))
    width = 0.8 / len(values)
    for number, (group, by_site) in enumerate(values.items()):
        # The bars of a site stand side by side, centred on its tick.
        places = np.arange(len(sites)) + (number - (len(values) - 1) / 2) * width
        heights, colour = [100 * by_site[site] for site in sites], GROUP_COLOUR.get(group)
        axes.bar(places, heights, width * 0.9, label=f"{group} classes", color=colour, **EDGE)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(sites)), sites)
    axes.set_ylabel("Shapley value, accuracy points")
    _legend_above(axes)


def geometry_table(found: Mapping[str, Geometry]) -> Table:
    """Return rank, norm, principal angles and amplification of each site's update as a table."""
    rows = []
    for site, update in found.items():
        angles = ", ".join(f"{angle:.0f}" for angle in update.angles[:4])
        angles += ", …" if len(update.angles) > 4 else ""
        norm, amplification = f"{update.relative_norm:.3f}", f"{update.amplification:.1f}"
        rows.append([site, str(update.rank), norm, f"{angles}°", amplification])
    return Table(["site", "rank of ΔW", "‖ΔW‖/‖W‖", "principal angles", "amplification"], rows)


def confusion_panels(
    off: Sequence[Sequence[float]] | np.ndarray,
    on: Sequence[Sequence[float]] | np.ndarray,
    classes: Sequence[str],
    tuned: Sequence[int] = (),
) -> Figure:
    """Draw the wrong answers with the adapter off, with it on, and their difference.

    Args:
        off: confusion matrix with the adapter off, counts or means.
        on: confusion matrix with the adapter on.
        classes: their names, by label.
        tuned: the labels whose names are set in bold.
    """
    wrong = [_wrong(matrix) for matrix in (off, on)]
    highest = max(*(matrix.max() for matrix in wrong), 1)
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    for axes, matrix, state in zip(panels, wrong, ("off", "on"), strict=False):
        title = f"adapter {state}: wrong answers"
        _matrix(axes, matrix, "Oranges", (0, highest), title, classes, tuned)
    confusion_change(panels[2], off, on, classes, tuned)
    panels[0].set_ylabel("true class (bold: tuned)" if tuned else "true class")
    return figure


def confusion_change(
    axes: Axes,
    off: Sequence[Sequence[float]] | np.ndarray,
    on: Sequence[Sequence[float]] | np.ndarray,
    classes: Sequence[str],
    tuned: Sequence[int] = (),
) -> None:
    """Draw the difference of the wrong answers, the third panel of `confusion_panels`."""
    change = _wrong(on) - _wrong(off)
    reach = max(abs(change).max(), 1)
    _matrix(axes, change, "RdBu_r", (-reach, reach), "on − off", classes, tuned)


def _wrong(confusion: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Return a confusion matrix without its diagonal, the correct answers."""
    return np.array(confusion) * (1.0 - np.eye(len(confusion)))


def _legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it hides no bar or curve."""
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _matrix(
    axes: Axes,
    values: np.ndarray,
    colours: str,
    limits: tuple[float, float],
    title: str,
    classes: Sequence[str],
    tuned: Sequence[int],
) -> None:
    """Draw a matrix with its numbers, its colours spread over `limits`."""
    # Colours follow the square root of the count. On a linear scale a few counts in the hundreds
    # would make all others look like zero.
    root = FuncNorm((_signed_root, _signed_square), *limits)
    axes.imshow(values, cmap=colours, norm=root)
    for (row, column), value in np.ndenumerate(values):
        if round(value) and len(values) <= 12:
            dark = _signed_root(abs(value)) > 0.75 * _signed_root(limits[1])
            text, colour = f"{value:.0f}".replace("-", "−"), "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(range(len(classes)), classes, fontsize=8)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label in tuned:
            labels[label].set_fontweight("bold")
    axes.set(title=title, xlabel="predicted class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=90 if max(map(len, classes)) > 2 else 0)


def _signed_root(values: np.ndarray | float) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: np.ndarray | float) -> np.ndarray:
    return np.sign(values) * np.square(values)
