"""The report of a sequence of tasks, from its rows alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..analysis.task_metrics import Matrix
from ..digits.data import small_note
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Axes, Figure, plt, png
from ..report.table import Sample, Table, key_value_table
from .tasks import COMBINE

METRICS = ("ACC", "BWT", "forgetting", "LA", "WC-ACC of the first", "stability gap of the first")


def table(run: RunDirectory) -> Table:
    """Return the metrics of each method, mean ± sd over the adapter seeds, in points."""
    rows = []
    for combine in methods_in(run):
        learned = rows_of(run, combine)
        bands = [Sample(tuple(100 * row[name] for row in learned)) for name in METRICS]
        rows.append([combine, *(band.mean_sd(1) for band in bands), str(len(learned))])
    return Table(["adapters", *METRICS, "n"], rows)


def methods_in(run: RunDirectory) -> list[str]:
    """Return the methods that have rows in the run, in the order of `COMBINE`."""
    return [combine for combine in COMBINE if rows_of(run, combine)]


def rows_of(run: RunDirectory, combine: str) -> list[Row]:
    """Return the rows of a method."""
    return [row for row in run.rows if row["method"] == combine]


def matrices(run: RunDirectory) -> Figure:
    """Draw the mean accuracy matrix of each method over the adapter seeds."""
    found = methods_in(run)
    figure, panels = plt.subplots(
        1, len(found), figsize=(3.1 * len(found), 4.0), layout="constrained", squeeze=False
    )
    for axes, combine in zip(panels[0], found, strict=True):
        learned = rows_of(run, combine)
        matrix_figure(
            axes, np.mean([row["matrix"] for row in learned], axis=0), learned[0]["tasks"]
        )
        axes.set_title(combine)
    panels[0][0].set_ylabel("after stage")
    return figure


def matrix_figure(axes: Axes, matrix: Matrix | np.ndarray, tasks: Sequence[str]) -> None:
    """Draw an accuracy matrix on `axes` in %, one row per stage and one column per task.

    Cell (i, j) is the accuracy on task j after stage i. The cell of the stage's own task is bold.
    """
    values = 100 * np.asarray(matrix)
    axes.imshow(values, cmap="viridis", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(values):
        colour = "black" if value > 70 else "white"
        weight = "bold" if i == j else "normal"
        text = f"{value:.0f}"
        axes.text(j, i, text, ha="center", va="center", color=colour, weight=weight, fontsize=8)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, fontsize=8)
    axes.set_yticks(range(len(values)), map(str, range(1, len(values) + 1)), fontsize=8)
    axes.set_xlabel("accuracy on task, %")


def first_task_curve(run: RunDirectory) -> Figure:
    """Draw accuracy on the first task during all later stages, to show the stability gap."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for combine in methods_in(run):
        learned = rows_of(run, combine)
        curves = 100 * np.array([row["way"]["first"] for row in learned])
        axes.plot(learned[0]["way"]["steps"], curves.mean(0), label=combine)
    steps = run.settings["steps"]
    for stage in range(1, run.settings["tasks"] - 1):
        axes.axvline(stage * steps, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="optimizer step, all later stages",
        ylabel="accuracy on the first task, %",
        ylim=(0, 102),
    )
    axes.legend(frameon=False, ncols=4)
    return figure


def write_task_report(folder: Path) -> RunDirectory:
    """Write tasks.md and the figures of the run in `folder` from its rows; return the run."""
    run = RunDirectory.read(folder)
    captions = {
        "accuracy-matrix.png": (matrices, "Mean accuracy on each task after each stage."),
        "first-task.png": (
            first_task_curve,
            "Mean accuracy on the first task while later tasks are learned.",
        ),
    }
    parts = [
        f"# Tasks: {run.settings['stream']}, {run.settings['scenario']}-incremental",
        f"{run.environment['data']}; points, mean ± sd over adapter seeds on one base."
        f"{small_note(run.environment['data'])}",
        table(run).markdown(),
        "`experiments/analysis/task_metrics.py` defines ACC, BWT, forgetting, LA and WC-ACC, with "
        "sources. The first stage is the pre-training of the base.",
    ]
    for name, (make, caption) in captions.items():
        replace_file(folder / name, png(make(run)))
        parts.append(f"![{caption}]({name})\n\n{caption}")
    parts += ["## Settings", key_value_table(run.settings).markdown()]
    replace_file(folder / "tasks.md", ("\n\n".join(parts) + "\n").encode())
    return run
