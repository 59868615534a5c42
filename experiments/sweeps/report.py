"""The report of a sweep: a table and the learning-forgetting fronts, from its rows alone."""

from pathlib import Path
from statistics import mean

from ..analysis.task_metrics import hypervolume, pareto_front
from ..harness.loggers import rows_to_csv
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Figure, plt, png
from ..report.table import Sample, Table, key_value_table
from .ranks import CAPTION, rank_figure, rank_table, series

SIDES = ("accuracy", "tuned_accuracy", "other_accuracy")


def cells_in(run: RunDirectory) -> list[str]:
    """Return the names of the cells, in the order of the rows."""
    return list(dict.fromkeys(row["cell"] for row in run.rows))


def on(run: RunDirectory, cell: str) -> dict[float, list[Row]]:
    """Return a cell's fine-tuned rows by strength, ascending."""
    its = [row for row in run.rows if row["cell"] == cell and row["stage"] == "on"]
    return {λ: [r for r in its if r["strength"] == λ] for λ in sorted({r["strength"] for r in its})}


def table(run: RunDirectory) -> Table:
    """Return each cell's accuracies at each strength, mean ± sd over adapters and bases, %."""
    rows = []
    for cell in cells_in(run):
        for strength, its in on(run, cell).items():
            bands = [Sample(tuple(100 * row[side] for row in its)) for side in SIDES]
            rows.append([cell, f"{strength:g}", *(b.mean_sd(2) for b in bands), str(len(its))])
    return Table(["cell", "λ", "all, %", "tuned, %", "other, %", "n"], rows)


def points(run: RunDirectory, cell: str) -> list[tuple[float, float]]:
    """Return a cell's mean accuracies on tuned and on other digits, a point a strength."""
    return [
        (mean(row[SIDES[1]] for row in its), mean(row[SIDES[2]] for row in its))
        for its in on(run, cell).values()
    ]


def fronts(run: RunDirectory) -> Figure:
    """Draw other against tuned digits, a line a cell and a point a strength, with the areas."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for cell in cells_in(run):
        base = [row for row in run.rows if row["cell"] == cell and row["stage"] == "base"]
        origin = (mean(row[SIDES[1]] for row in base), 0.0)
        its = points(run, cell)
        x, y = zip(*((100 * a, 100 * b) for a, b in its), strict=True)
        name = f"{cell}: {len(pareto_front(its))} on the front, area {hypervolume(its, origin):.3f}"
        axes.plot(x, y, "o-", ms=4, lw=1, label=name)
    axes.set(xlabel="tuned digits, % right", ylabel="other digits, % right")
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_sweep_report(run: RunDirectory) -> None:
    """Write sweep.md, fronts.png and results.csv beside the rows; ranks.png if ranks vary."""
    replace_file(run.folder / "results.csv", rows_to_csv(run.rows).encode())
    replace_file(run.folder / "fronts.png", png(fronts(run)))
    caption = "Other against tuned digits, mean over adapters and bases; a point a strength λ."
    parts = [
        f"# Sweep, preset {run.settings['preset']}",
        f"{run.environment['data']}; mean ± sd over adapters and bases together.",
        table(run).markdown(),
        f"![{caption}](fronts.png)\n\n{caption} Area: what the front dominates above the base's "
        "accuracy on the tuned digits, in fractions.",
        *_of_ranks(run),
        "## Settings",
        key_value_table(run.settings).markdown(),
    ]
    replace_file(Path(run.folder) / "sweep.md", ("\n\n".join(parts) + "\n").encode())


def _of_ranks(run: RunDirectory) -> list[str]:
    """Draw accuracy against rank, and return what the report says of it, if ranks were varied."""
    if not series(run):
        return []
    replace_file(run.folder / "ranks.png", png(rank_figure([run])))
    said = "Points: above the lowest rank, between adapters of the same base and seed; mean ± sd."
    return ["## Rank", f"![{CAPTION}](ranks.png)\n\n{CAPTION}", rank_table(run).markdown(), said]
