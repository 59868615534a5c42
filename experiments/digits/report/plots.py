"""The figures of the digit study, drawn from a run's rows."""

from collections.abc import Callable

import numpy as np

from ...harness.rundir import Row, RunDirectory
from ...report.document import Picture
from ...report.figures import Figure, confusion_panels, plt, png
from ...report.style import COLOUR, DASH, EDGE, LINE
from ...report.table import Sample
from .tables import LABEL, base_of, methods_in, published_for, rows_of


def draw(run: RunDirectory) -> list[Picture]:
    """Return all figures of the run, with their captions and file names."""
    figures: dict[str, Callable[[RunDirectory], tuple[Figure, str]]] = {
        "wrong-counts.png": wrong_counts,
        "confusion.png": confusion,
        "training-loss.png": training_loss,
    }
    if any("way" in row for row in rows_of(run, "lora")):
        figures["way.png"] = accuracy_curves
    pictures = []
    for file, make in figures.items():
        figure, caption = make(run)
        pictures.append(Picture(png(figure), caption, file))
    return pictures


def wrong_counts(run: RunDirectory) -> tuple[Figure, str]:
    """Draw the wrong answers by digit: one bar per stage or method, mean ± sd over the seeds."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    base, published = base_of(run), published_for(run)
    bars = {"off": ("base", rows_of(run, "lora", "off"))}  # label: method, rows
    bars |= {LABEL[method]: (method, rows_of(run, method)) for method in methods_in(run)}
    width = 0.8 / len(bars)
    for digit in base["tuned"]:
        axes.axvspan(digit - 0.5, digit + 0.5, color="#f0e9d2", zorder=0, linewidth=0)
    for number, (label, (method, rows)) in enumerate(bars.items()):
        counts = [Sample(tuple(row["wrong_counts"][digit] for row in rows)) for digit in range(10)]
        means, errors = [c.mean for c in counts], [c.sd or 0.0 for c in counts]
        # The bars of a digit stand side by side, centred on its tick.
        places = np.arange(10) + (number - (len(bars) - 1) / 2) * width
        axes.bar(places, means, width * 0.92, color=COLOUR[label], label=label, **EDGE)
        if any(errors):
            axes.errorbar(places, means, errors, fmt="none", ecolor="#333333", elinewidth=0.8)
        if method in published:
            theirs = published[method].wrong_counts
            axes.plot(places, theirs, "D", color=COLOUR["published"], ms=3)
    if published:
        axes.plot([], [], "D", color=COLOUR["published"], ms=3, label="published")
    axes.set(xlabel="digit (shaded: tuned)", ylabel="wrong answers, test images", xlim=(-0.6, 9.6))
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(10))
    title = f"mean ± sd, n = {len(rows_of(run, 'lora'))} adapter seeds"
    axes.legend(frameon=False, ncols=7, loc="lower left", bbox_to_anchor=(0, 1), title=title)
    return figure, (
        "Wrong answers by digit with the adapter off and on, and with the other methods. "
        f"{_over_seeds(run)}"
    )


def confusion(run: RunDirectory) -> tuple[Figure, str]:
    """Draw the wrong answers by digit and prediction, off, on and on − off, as means over seeds."""
    off, on = (
        np.mean([row["confusion"] for row in rows_of(run, "lora", stage)], axis=0)
        for stage in ("off", "on")
    )
    figure = confusion_panels(off, on, [str(digit) for digit in range(10)], base_of(run)["tuned"])
    return figure, (
        "Wrong answers by digit and prediction, with the adapter off and on, and the difference. "
        f"Test images, mean over {len(rows_of(run, 'lora'))} adapter seeds. Correct answers are "
        "left out. Colours follow the square root of the count."
    )


def training_loss(run: RunDirectory) -> tuple[Figure, str]:
    """Draw the loss of pre-training, and of each method's fine-tuning, mean ± sd over the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    steps, loss, _ = _loss_curve([base_of(run)])
    left.plot(steps, loss, color=COLOUR["base"])
    for method in methods_in(run):
        steps, loss, sd = _loss_curve(rows_of(run, method))
        name = LABEL[method]
        right.fill_between(steps, loss - sd, loss + sd, color=LINE[name], alpha=0.15, linewidth=0)
        # "wrapped" nearly coincides with "on"; its dashes leave the other line visible.
        right.plot(steps, loss, color=LINE[name], linestyle=DASH[name], label=name)
    left.set_title("pre-training, all digits")
    joint = " (joint: all digits)" if "joint" in methods_in(run) else ""
    right.set_title(f"fine-tuning, tuned digits{joint}")
    for axes in (left, right):
        axes.set(xlabel="optimizer step", ylabel="cross-entropy, nats")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.0))
    right.set_ylim(top=right.get_ylim()[1] * 1.12)  # room for the legend
    return figure, (
        "Training loss (running mean) of pre-training, and of fine-tuning by each method. "
        f"{_over_seeds(run)}"
    )


def accuracy_curves(run: RunDirectory) -> tuple[Figure, str]:
    """Draw accuracy on tuned and other digits during fine-tuning: each seed, and the mean."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    curves = [row["way"] for row in rows_of(run, "lora")]
    steps = curves[0]["steps"]
    for group, colour in (("tuned", COLOUR["on"]), ("other", COLOUR["off"])):
        accuracies = 100 * np.array([curve[group] for curve in curves])  # (seeds, steps)
        axes.plot(steps, accuracies.T, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, accuracies.mean(0), color=colour, label=f"{group} digits")
        base = 100 * base_of(run)[f"{group}_accuracy"]
        axes.axhline(base, color=colour, linestyle=":", label=f"{group} digits, base")
    axes.set(xlabel="optimizer step", ylabel="accuracy on test images, %")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure, (
        f"Accuracy during fine-tuning. Thick lines: mean over {len(curves)} adapter seeds. Thin "
        "lines: each seed."
    )


def _over_seeds(run: RunDirectory) -> str:
    return f"Mean ± sd over {len(rows_of(run, 'lora'))} adapter seeds."


def _loss_curve(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, and mean and standard deviation over the rows of their smoothed loss curves.

    A point of `train_curve` is the mean of `train_curve_every` steps. Each smoothed point is the
    mean of `window` such points, drawn at the last step of the last one.
    """
    curves = np.array([row["train_curve"] for row in rows])  # (seeds, points)
    window = max(1, curves.shape[1] // 20)
    kernel = np.ones(window) / window
    smooth = np.array([np.convolve(curve, kernel, mode="valid") for curve in curves])
    steps = (np.arange(smooth.shape[1]) + window) * rows[0]["train_curve_every"]
    return steps, smooth.mean(0), smooth.std(0, ddof=1) if len(rows) > 1 else 0 * smooth[0]
