"""A figure and a table of accuracy against rank, from a sweep's rows alone.

A series holds the rows that agree in every other setting that the sweep varied, such as the rule
that computes the update's scale from alpha and r. A series includes the adapters on all bases.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import StudyError
from ..report.figures import Axes, Figure, plt, png
from ..report.style import COLOUR, DASH, LINE, MARKS, SERIES
from ..report.table import Sample, Table

SIDES = {"tuned_accuracy": "tuned digits", "other_accuracy": "other digits"}
RULES = {
    "alpha/r": "fixed alpha: s = alpha/r",
    "alpha/sqrt_r": "rank-stabilized: s = alpha/√r",
    "alpha": "fixed alpha/r: s = alpha",
}
CAPTION = "Accuracy against rank, mean ± sd over all adapters on all bases. Dotted line: the bases."


def series(run: RunDirectory) -> dict[str, dict[int, list[Row]]]:
    """Return fine-tuned rows by series and by ascending rank; empty if the rank was not varied."""
    tuned = [r for r in run.rows if r["stage"] == "on" and "rank" in r.get("varied", {})]
    several = len({row["strength"] for row in tuned}) > 1
    found: dict[str, dict[int, list[Row]]] = {}
    for row in sorted(tuned, key=lambda row: row["varied"]["rank"]):
        by_rank = found.setdefault(_name(row, several), {})
        by_rank.setdefault(row["varied"]["rank"], []).append(row)
    return found


def rank_table(run: RunDirectory) -> Table:
    """Return accuracies by series and rank, and their differences from the lowest rank in points.

    Each difference is between two adapters with the same base and seed. The spread of these paired
    differences leaves out the effects of the base and of the order of the images.
    """
    head = ["series", "rank"]
    head += [f"{side}, {what}" for side in SIDES.values() for what in ("%", "points")]
    rows = []
    for name, by_rank in series(run).items():
        lowest = {_pair(row): row for row in next(iter(by_rank.values()))}
        for rank, ranked in by_rank.items():
            cells = [name, str(rank)]
            for side in SIDES:
                gained = [100 * (r[side] - lowest[_pair(r)][side]) for r in ranked]
                cells.append(Sample(tuple(100 * r[side] for r in ranked)).mean_sd(2))
                cells.append(Sample(tuple(gained)).mean_sd(2))
            rows.append([*cells, str(len(ranked))])
    return Table([*head, "n"], rows)


def rank_figure(runs: Sequence[RunDirectory]) -> Figure:
    """Draw accuracy on tuned and on other digits against rank, one column per run."""
    figure, panels = plt.subplots(
        2, len(runs), figsize=(2 + 3 * len(runs), 6), squeeze=False, layout="constrained"
    )
    for column, run in zip(panels.T, runs, strict=True):
        for axes, side in zip(column, SIDES, strict=True):
            _draw(axes, run, side)
        column[0].set_title(_title(run))
        column[-1].set_xlabel("rank r")
    for line, side in zip(panels, SIDES.values(), strict=True):
        line[0].set_ylabel(f"accuracy on {side}, %")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        frameon=False,
        ncols=2 if len(runs) == 1 else 4,
        loc="outside upper center",
    )
    return figure


def write_rank_figure(folders: Sequence[Path], out: Path) -> None:
    """Draw the sweeps in these folders side by side into a PNG.

    Raises:
        StudyError: If a folder has no run, or its run did not vary the rank.
    """
    runs = [RunDirectory.read(folder) for folder in folders]
    for run in runs:
        if not series(run):
            raise StudyError(
                f"{run.folder} has no rows by rank: run a sweep with --vary rank=1,2,4"
            )
    replace_file(out, png(rank_figure(runs)))


def _draw(axes: Axes, run: RunDirectory, side: str) -> None:
    found = series(run)
    for number, (name, by_rank) in enumerate(found.items()):
        bands = [Sample(tuple(100 * row[side] for row in ranked)) for ranked in by_rank.values()]
        # Shift each series along the axis so that overlapping error bars stay legible.
        places = [rank * 2 ** (0.14 * (number - (len(found) - 1) / 2)) for rank in by_rank]
        means, spreads = [b.mean for b in bands], [b.sd or 0.0 for b in bands]
        style = SERIES[number % len(SERIES)]
        size: Any = {"ms": 3.5, "lw": 1.2, "elinewidth": 0.8, "capsize": 2}
        look: Any = {
            "color": LINE[style],
            "linestyle": DASH[style],
            "marker": MARKS[number % len(MARKS)],
        }
        axes.errorbar(places, means, spreads, label=name, **look, **size)
    bases = [100 * row[side] for row in run.rows if row["stage"] == "base"]
    level = sum(bases) / len(bases)
    axes.axhline(level, color=COLOUR["base"], linestyle=":", label="base, adapter off")
    ranks = sorted({rank for by_rank in found.values() for rank in by_rank})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, map(str, ranks))
    axes.minorticks_off()


def _title(run: RunDirectory) -> str:
    counts = {len(rows) for by_rank in series(run).values() for rows in by_rank.values()}
    bases = len({row["base_seed"] for row in run.rows})
    count = "–".join(map(str, sorted({min(counts), max(counts)})))
    first = f"preset {run.settings['preset']}, A {run.settings['init']}"
    return f"{first}\nn = {count} per point, {bases} base{'s' * (bases > 1)}"


def _name(row: Row, with_strength: bool) -> str:
    varied = {k: v for k, v in row["varied"].items() if k not in ("rank", "seed")}
    parts = [RULES[varied.pop("scale_rule")]] if "scale_rule" in varied else []
    parts += [f"{key}={value}" for key, value in varied.items()]
    parts += [f"λ={row['strength']:g}"] if with_strength else []
    return " ".join(parts) or "plain"


def _pair(row: Row) -> tuple[int, int]:
    return row["base_seed"], row["seed"]
