"""The report of a sequence of tasks, from its rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.task_metrics import Matrix
from ..digits.data import small_note
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.document import Block, Picture, Sections, markdown
from ..report.figures import Axes, Figure, plt, png
from ..report.page import write_page
from ..report.style import looks
from ..report.table import Sample, Table, key_value_table
from .settings import METHODS

METRICS = ("ACC", "BWT", "forgetting", "LA", "WC-ACC", "stability gap")
COMPARED = ("ACC", "LA", "forgetting")
REFERENCE = "full"
METRICS_LEGEND = (
    "`experiments/tasks/learner.py` defines the methods, and "
    "`experiments/analysis/task_metrics.py` the metrics, with sources. WC-ACC and the stability "
    "gap count the evaluations during the later stages, on the first 1,000 test images of each "
    "earlier task; the gap is the mean over these tasks. The first stage is "
    "the pre-training of the base."
)
FIRST_TASK = "Mean accuracy on the first task while later tasks are learned."


def table(run: RunDirectory) -> Table:
    """Return the metrics of each method, mean ± sd over the bases, in points."""
    rows = []
    for method in methods_in(run):
        units = units_of(run, method)
        bands = [Sample(tuple(_mean(rows, name) for rows in units.values())) for name in METRICS]
        rows.append([method, *(band.mean_sd(1) for band in bands), str(len(units))])
    return Table(["method", *METRICS, "n"], rows)


def differences(run: RunDirectory, reference: str = REFERENCE) -> Table:
    """Return the differences of each method from another one, paired by base, in points.

    A cell has the mean difference and its 95 % interval over the bases.
    """
    theirs = units_of(run, reference)
    head = [f"difference from {reference}", *COMPARED, "n"]
    rows = []
    for method in (name for name in methods_in(run) if name != reference):
        ours = units_of(run, method)
        pairs = [(ours[unit], theirs[unit]) for unit in ours if unit in theirs]
        if not pairs:
            continue
        cells = []
        for name in COMPARED:
            found = Sample(tuple(_mean(a, name) - _mean(b, name) for a, b in pairs))
            cells.append(f"{found.mean:+.1f} ({found.interval(1)})")
        rows.append([method, *cells, str(len(pairs))])
    return Table(head, rows)


def units_of(run: RunDirectory, method: str) -> dict[int, list[Row]]:
    """Return the rows of a method by base, or by adapter seed in a run with a single base.

    Adapters on the same base resemble each other, so a base counts as one observation.
    """
    key = "base_seed" if run.settings.get("bases", 1) > 1 else "seed"
    found: dict[int, list[Row]] = {}
    for row in rows_of(run, method):
        found.setdefault(row[key], []).append(row)
    return found


def _mean(rows: list[Row], name: str) -> float:
    return 100 * sum(row[name] for row in rows) / len(rows)


def methods_in(run: RunDirectory) -> list[str]:
    """Return the methods that have rows in the run, in the order of `METHODS`."""
    return [method for method in METHODS if rows_of(run, method)]


def scenario_of(run: RunDirectory) -> str:
    """Return the scenario of a run: "task", "class" or "domain".

    Older runs of rotated and permuted tasks recorded "class", although all their tasks have the
    same classes.
    """
    scenario, stream = run.settings["scenario"], run.settings["stream"]
    return "domain" if scenario == "class" and stream != "split" else scenario


def units_name(run: RunDirectory) -> str:
    """Return the name of the observations that n counts."""
    return "bases" if run.settings.get("bases", 1) > 1 else "adapter seeds on one base"


def rows_of(run: RunDirectory, combine: str) -> list[Row]:
    """Return the rows of a method."""
    return [row for row in run.rows if row["method"] == combine]


def matrices(run: RunDirectory) -> Figure:
    """Draw the mean accuracy matrix of each method over all bases and adapter seeds."""
    found = methods_in(run)
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(2.4 * columns, 3.0 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    for axes, combine in zip(panels.flat, found, strict=False):
        learned = rows_of(run, combine)
        matrix_figure(
            axes, np.mean([row["matrix"] for row in learned], axis=0), learned[0]["tasks"]
        )
        axes.set_title(f"{combine}, n = {len(learned)}")
    for line in panels:
        line[0].set_ylabel("after stage")
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
    for combine, look in looks(methods_in(run)).items():
        learned = rows_of(run, combine)
        curves = 100 * np.array([row["way"]["first"] for row in learned])
        steps, mean = learned[0]["way"]["steps"], curves.mean(0)
        axes.plot(steps, mean, label=combine, **look)
        sd = curves.std(0, ddof=1) if len(curves) > 1 else 0 * mean
        axes.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.15, lw=0)
    for stage in range(1, run.settings["tasks"] - 1):
        axes.axvline(stage * run.settings["steps"], color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="optimizer step, all later stages",
        ylabel="accuracy on the first task, %",
        ylim=(0, 102),
    )
    title = f"mean ± sd, n = {len(learned)} adapters"
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 7}
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8, **place)
    return figure


def write_task_report(folder: Path) -> RunDirectory:
    """Write tasks.md, tasks.html and the figures of a run from its rows; return the run."""
    run = RunDirectory.read(folder)
    figures = {
        "accuracy-matrix.png": (matrices, "Mean accuracy on each task after each stage."),
        "first-task.png": (first_task_curve, FIRST_TASK),
    }
    pictures = [Picture(png(make(run)), text, name) for name, (make, text) in figures.items()]
    for picture in pictures:
        replace_file(folder / picture.file, picture.png)
    content = heading(run), lead(run), sections(run, pictures)
    replace_file(folder / "tasks.md", markdown(*content).encode())
    write_page(folder / "tasks.html", *content)
    return run


def heading(run: RunDirectory) -> str:
    """Return the report's title."""
    return f"Tasks: {run.settings['stream']}, {scenario_of(run)}-incremental"


def lead(run: RunDirectory) -> str:
    """Return the report's first paragraph: the data and the unit of n."""
    return (
        f"{run.environment['data']}; points, mean ± sample sd over n {units_name(run)}."
        f"{small_note(run.environment['data'])}"
    )


def sections(run: RunDirectory, pictures: Sequence[Picture]) -> Sections:
    """Return the report's tables, texts and figures, by heading."""
    found: dict[str, Sequence[Block]] = {"Metrics": [table(run), METRICS_LEGEND]}
    if REFERENCE in methods_in(run):
        pairs = (
            f"Mean and 95 % interval over n {units_name(run)}, paired: the methods have the same "
            "base and, except for the joint methods, the same images in the same order."
        )
        found["Differences"] = [differences(run), pairs]
    return found | {
        "Figures": pictures,
        "Settings": [key_value_table(run.settings)],
        "Environment": [key_value_table(run.environment)],
    }
