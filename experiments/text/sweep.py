"""The text study over a grid of settings, in parallel; what is best is said by the validation rows.

    FOLDER/NAME/        a run of the text study for each choice of settings
    FOLDER/results.csv  all rows of fine-tuned models
    FOLDER/sweep.md     a line a choice and method, the best first

Each choice is an ordinary run, so a sweep that was stopped goes on, and a grid that grew trains
only what is new. Jobs go through joblib, as those of the digit study's sweep.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..harness.grid import Grid, check_grid
from ..harness.loggers import rows_to_csv
from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import listed, replace
from ..report.table import Table
from .report import percent2, tuned_rows, write_text_report
from .settings import TextSettings


def text_cells(settings: TextSettings, grid: Grid, folder: Path) -> dict[str, TextSettings]:
    """Return the settings of each choice of the grid, by its name, each with a folder of its own.

    Raises:
        StudyError: a name that no result depends on, or a value that is not allowed.
    """
    check_grid(grid, settings)
    found = {}
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        name = " ".join(f"{key}={listed(value)}" for key, value in changes.items()) or "plain"
        out = folder / re.sub(r"[^\w.,=-]+", "_", name)
        found[name] = replace(settings, **changes, out=str(out))
    return found


def run_text_sweep(
    settings: TextSettings,
    grid: Grid,
    folder: Path,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> Table:
    """Run what is left of a sweep, write its files, and return its table.

    Args:
        settings: what the grid changes.
        grid: values by the name of a setting; every combination is a choice.
        folder: the sweep's.
        jobs: processes at a time; a back end chosen by `joblib.parallel_config` is obeyed.
        say: gets each line of what happens.
    """
    from joblib import Parallel, delayed

    cells = text_cells(settings, grid, folder)
    say(f"sweep    {folder}: {len(cells)} choices of settings")
    pool = Parallel(n_jobs=jobs, return_as="generator")
    rows: list[Row] = []
    made = pool(delayed(_run)(cell) for cell in cells.values())
    for name, its in zip(cells, made, strict=True):
        rows += [{"cell": name, **row} for row in its]
        say(f"cell     {name}")
    table = text_table(rows)
    replace_file(folder / "results.csv", rows_to_csv(rows).encode())
    replace_file(folder / "sweep.md", f"# Sweep\n\n{table.markdown()}\n\n{CHOSEN}\n".encode())
    return table


CHOSEN = "Accuracies in %, mean ± sample sd over the seeds; ordered by that on the validation rows."


def text_table(rows: Sequence[Row]) -> Table:
    """Return a line a choice and method, the highest accuracy on the validation rows first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["cell"]), []).append(row)

    def validation(its: list[Row]) -> float:
        return sum(row["validation_accuracy"] for row in its) / len(its)

    ordered = sorted(groups.items(), key=lambda item: -validation(item[1]))
    lines = [
        [
            method,
            cell,
            f"{its[0]['trainable']:,}",
            percent2([row["validation_accuracy"] for row in its]),
            percent2([row["accuracy"] for row in its]),
            str(len(its)),
        ]
        for (method, cell), its in ordered
    ]
    return Table(["method", "settings", "trained", "validation", "test", "n"], lines)


def _run(settings: TextSettings) -> list[Row]:
    """Run one choice; everything is made from its settings, in any process."""
    from .study import run_text

    run: RunDirectory = run_text(settings, lambda line: None)
    write_text_report(run.folder)
    return tuned_rows(run)
