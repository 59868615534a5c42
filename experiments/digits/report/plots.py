"""The figures of the digit study, drawn from a run's rows. One thing has one colour everywhere."""

from pathlib import Path

import matplotlib
import numpy as np

from ...harness.rundir import Row, RunDirectory
from ...report.style import COLOUR, STYLE
from ...report.table import Band
from .tables import LABEL, base_of, methods_in, published_for, rows_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(run: RunDirectory, folder: Path) -> dict[str, str]:
    """Draw all figures into `folder`; return what each shows, by file name."""
    figures = {
        "wrong-counts.png": wrong_counts,
        "confusion.png": confusion,
        "training-loss.png": training_loss,
    }
    if any("way" in row for row in rows_of(run, "lora")):
        figures["way.png"] = way
    captions = {}
    with plt.rc_context(STYLE):
        for name, make in figures.items():
            figure, captions[name] = make(run)
            # Without the version that matplotlib writes, the same rows give the same bytes.
            figure.savefig(folder / name, metadata={"Software": None})
            plt.close(figure)
    return captions


def wrong_counts(run: RunDirectory) -> tuple[Figure, str]:
    """Wrong answers by digit: a bar for off, on and wrapped, one standard deviation on each."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    tuned, seeds = base_of(run)["tuned"], len(rows_of(run, "lora"))
    series = [("off", rows_of(run, "lora", "off"))]
    series += [(LABEL[m], rows_of(run, m)) for m in methods_in(run)]
    width = 0.8 / len(series)
    for digit in tuned:
        axes.axvspan(digit - 0.5, digit + 0.5, color="#f0e9d2", zorder=0, linewidth=0)
    for number, (name, rows) in enumerate(series):
        bands = [Band(tuple(row["wrong_counts"][digit] for row in rows)) for digit in range(10)]
        places = np.arange(10) + (number - (len(series) - 1) / 2) * width
        axes.bar(places, [b.mean for b in bands], width * 0.92, color=COLOUR[name], label=name)
        errors = [b.sd or 0.0 for b in bands]
        if any(errors):
            means = [b.mean for b in bands]
            axes.errorbar(places, means, errors, fmt="none", ecolor="#333333", elinewidth=0.8)
        method = next((m for m in methods_in(run) if LABEL[m] == name), "base")
        if method in published_for(run):
            theirs = published_for(run)[method].wrong_counts
            axes.plot(places, theirs, "D", color=COLOUR["published"], ms=3)
    if published_for(run):
        axes.plot([], [], "D", color=COLOUR["published"], ms=3, label="published")
    axes.set(xlabel="digit (shaded: tuned)", ylabel="wrong answers, test images", xlim=(-0.6, 9.6))
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(10))
    axes.legend(frameon=False, ncols=5, loc="upper left", bbox_to_anchor=(0, 1.12))
    return figure, (
        "Wrong answers by digit with the adapter off and on, and by the other methods; mean ± sd "
        f"over {seeds} adapter seeds."
    )


def confusion(run: RunDirectory) -> tuple[Figure, str]:
    """What each digit is mistaken for: off, on, and on less off; means over the seeds."""
    off, on = (_mean_confusion(rows_of(run, "lora", stage)) for stage in ("off", "on"))
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    most = max(_mistakes(off).max(), _mistakes(on).max())
    for axes, matrix, name in zip(panels[:2], (off, on), ("off", "on"), strict=True):
        _matrix(axes, _mistakes(matrix), "Oranges", (0, most), f"adapter {name}: mistakes")
    change = _mistakes(on) - _mistakes(off)
    reach = max(abs(change).max(), 1)
    _matrix(panels[2], change, "RdBu_r", (-reach, reach), "on less off")
    for axes in panels:
        for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
            if int(label.get_text()) in base_of(run)["tuned"]:
                label.set_fontweight("bold")
    panels[0].set_ylabel("digit shown (bold: tuned)")
    return figure, (
        "What each digit is mistaken for with the adapter off and on, and the difference; test "
        f"images, mean over {len(rows_of(run, 'lora'))} adapter seeds, right answers left out."
    )


def training_loss(run: RunDirectory) -> tuple[Figure, str]:
    """The loss of pre-training, and of each method's fine-tuning, mean ± sd over the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    base = base_of(run)
    left.plot(*_curve([base])[:2], color=COLOUR["base"])
    for method in methods_in(run):
        steps, middle, spread = _curve(rows_of(run, method))
        colour, extent = COLOUR[LABEL[method]], (middle - spread, middle + spread)
        right.fill_between(steps, *extent, color=colour, alpha=0.15, linewidth=0)
        # on and wrapped all but coincide: dashes let the one below show.
        dashes = "--" if method == "wrapped" else "-"
        right.plot(steps, middle, dashes, color=colour, label=LABEL[method])
    left.set_title("pre-training, all digits")
    right.set_title("fine-tuning, tuned digits")
    for axes in (left, right):
        axes.set(xlabel="optimizer step", ylabel="cross-entropy, nats")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.0))
    right.set_ylim(top=right.get_ylim()[1] * 1.12)  # room for the legend
    return figure, (
        "Training loss, a running mean: pre-training, and fine-tuning by each method, mean ± sd "
        f"over {len(rows_of(run, 'lora'))} adapter seeds."
    )


def way(run: RunDirectory) -> tuple[Figure, str]:
    """Accuracy on tuned and other digits while each adapter trains, and the mean."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    ways = [row["way"] for row in rows_of(run, "lora")]
    for side, colour in (("tuned", COLOUR["on"]), ("other", COLOUR["off"])):
        curves = 100 * np.array([its[side] for its in ways])
        for curve in curves:
            axes.plot(ways[0]["steps"], curve, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(ways[0]["steps"], curves.mean(0), color=colour, label=f"{side} digits")
        axes.axhline(100 * base_of(run)[f"{side}_accuracy"], color=colour, linestyle=":")
    axes.set(xlabel="optimizer step", ylabel="% right, test images")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure, (
        f"Accuracy while the adapter trains: mean and each seed of {len(ways)}; dotted, the base's."
    )


def _mean_confusion(rows: list[Row]) -> np.ndarray:
    return np.mean([row["confusion"] for row in rows], axis=0)


def _mistakes(matrix: np.ndarray) -> np.ndarray:
    return matrix * (1 - np.eye(len(matrix)))


def _matrix(
    axes: Axes, values: np.ndarray, colours: str, extent: tuple[float, float], name: str
) -> None:
    """Draw the values with their numbers, the diagonal empty, the colours from `extent`."""
    # Colours by the square root: beside a few large counts all others would look like none.
    low, high = _root(np.array(extent))
    axes.imshow(_root(values), cmap=colours, vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        if row != column and round(value):
            colour = "white" if _root(abs(value)) > 0.75 * high else "black"
            text = f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes.set(title=name, xlabel="answer given")
    axes.set_xticks(range(10), map(str, range(10)))
    axes.set_yticks(range(10), map(str, range(10)))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _curve(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, and the mean and the standard deviation of the smoothed curves."""
    curves = np.array([row["train_curve"] for row in rows])
    window = max(1, curves.shape[1] // 20)
    kernel = np.ones(window) / window
    smooth = np.array([np.convolve(curve, kernel, mode="valid") for curve in curves])
    steps = (np.arange(smooth.shape[1]) + window) * rows[0]["train_curve_every"]
    return steps, smooth.mean(0), smooth.std(0, ddof=1) if len(rows) > 1 else 0 * smooth[0]
