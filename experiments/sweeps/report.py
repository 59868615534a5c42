"""The report of a sweep, from its rows alone: a table and the fronts of learning and forgetting."""

from pathlib import Path
from statistics import mean

from ..analysis.task_metrics import hypervolume, pareto_front
from ..digits.data import small_note
from ..harness.loggers import rows_to_csv
from ..harness.rundir import Row, RunDirectory, replace_file
from ..report.figures import Figure, plt, png
from ..report.style import looks
from ..report.table import Sample, Table, key_value_table
from .ranks import CAPTION, rank_figure, rank_table, series

SIDES = ("accuracy", "tuned_accuracy", "other_accuracy")


def cells_in(run: RunDirectory) -> list[str]:
    """Return the names of the cells, in the order of the rows."""
    return list(dict.fromkeys(row["cell"] for row in run.rows))


def on(run: RunDirectory, cell: str) -> dict[float, list[Row]]:
    """Return a cell's fine-tuned rows by strength, ascending."""
    rows = [row for row in run.rows if row["cell"] == cell and row["stage"] == "on"]
    return {
        λ: [r for r in rows if r["strength"] == λ] for λ in sorted({r["strength"] for r in rows})
    }


def table(run: RunDirectory) -> Table:
    """Return accuracies in % by cell and strength, mean ± sd over all adapters on all bases."""
    rows = []
    for cell in cells_in(run):
        for strength, tuned in on(run, cell).items():
            bands = [Sample(tuple(100 * row[side] for row in tuned)) for side in SIDES]
            rows.append([cell, f"{strength:g}", *(b.mean_sd(2) for b in bands), str(len(tuned))])
    return Table(["cell", "λ", "all, %", "tuned, %", "other, %", "n"], rows)


def points(run: RunDirectory, cell: str) -> list[tuple[float, float]]:
    """Return a cell's mean accuracies on tuned and on other digits, one point per strength."""
    return [
        (mean(row[SIDES[1]] for row in tuned), mean(row[SIDES[2]] for row in tuned))
        for tuned in on(run, cell).values()
    ]


def fronts(run: RunDirectory) -> Figure:
    """Draw accuracy on other digits against tuned digits: a line per cell, a point per strength."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for cell, look in looks(cells_in(run)).items():
        base = [row for row in run.rows if row["cell"] == cell and row["stage"] == "base"]
        origin = (mean(row[SIDES[1]] for row in base), 0.0)
        means = points(run, cell)
        x, y = zip(*((100 * a, 100 * b) for a, b in means), strict=True)
        size, area = len(pareto_front(means)), hypervolume(means, origin)
        name = f"{cell}: {size} on the front, area {area:.3f}"
        axes.plot(x, y, marker="o", ms=4, lw=1, label=name, **look)
    axes.set(xlabel="accuracy on tuned digits, %", ylabel="accuracy on other digits, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


def write_sweep_report(run: RunDirectory) -> None:
    """Write sweep.md, fronts.png and results.csv beside the rows, and ranks.png if ranks vary."""
    replace_file(run.folder / "results.csv", rows_to_csv(run.rows).encode())
    replace_file(run.folder / "fronts.png", png(fronts(run)))
    caption = "Accuracy on other against tuned digits, means over all adapters, one point per λ."
    parts = [
        f"# Sweep, preset {run.settings['preset']}",
        f"{run.environment['data']}; mean ± sd over all adapters on all bases."
        f"{small_note(run.environment['data'])}",
        table(run).markdown(),
        f"![{caption}](fronts.png)\n\n{caption} Area: the area that the front dominates, to the "
        "right of the base's accuracy on the tuned digits. The unit square has area 1.",
        *_of_ranks(run),
        "## Settings",
        key_value_table(run.settings).markdown(),
    ]
    replace_file(Path(run.folder) / "sweep.md", ("\n\n".join(parts) + "\n").encode())


def _of_ranks(run: RunDirectory) -> list[str]:
    """Draw accuracy against rank and return its section of the report, if ranks were varied."""
    if not series(run):
        return []
    replace_file(run.folder / "ranks.png", png(rank_figure([run])))
    note = "Points: paired differences from the lowest rank, same base and seed; mean ± sd."
    return ["## Rank", f"![{CAPTION}](ranks.png)\n\n{CAPTION}", rank_table(run).markdown(), note]
