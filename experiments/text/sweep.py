"""The text study over a grid of settings, in parallel.

    FOLDER/NAME/        a run of the text study for each combination of settings
    FOLDER/results.csv  all rows of fine-tuned models
    FOLDER/sweep.md     a line per combination and method, ordered by validation accuracy

Each combination is an ordinary run. An interrupted sweep therefore resumes, and a larger grid
trains only the new combinations. Jobs run through joblib, as in the digit study's sweep.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..harness.grid import Grid, check_grid
from ..harness.loggers import rows_to_csv
from ..harness.progress import progress
from ..harness.rundir import Row, RunDirectory, replace_file
from ..harness.settings import listed, replace
from ..report.table import Table
from .report import percent2, tuned_rows, write_text_report
from .settings import TextSettings


def text_cells(settings: TextSettings, grid: Grid, folder: Path) -> dict[str, TextSettings]:
    """Return the settings of each combination of the grid by name, each with its own folder.

    Raises:
        StudyError: a name in the grid does not affect results, or a value is not allowed.
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
    """Run a sweep, or the rest of an interrupted one, write its files, and return its table.

    Args:
        settings: the settings that the grid changes.
        grid: the values of each setting; every combination is run.
        folder: the folder of the sweep.
        jobs: number of parallel processes; `joblib.parallel_config` can choose another backend.
        say: receives each line of progress.
    """
    from joblib import Parallel, delayed

    cells = text_cells(settings, grid, folder)
    say(f"sweep    {folder}: {len(cells)} combinations of settings")
    pool = Parallel(n_jobs=jobs, return_as="generator")
    rows: list[Row] = []
    results = pool(delayed(_run)(cell) for cell in cells.values())
    pairs = zip(cells, results, strict=True)
    for name, cell_rows in progress(pairs, len(cells), "sweep", "combination"):
        rows += [{"cell": name, **row} for row in cell_rows]
        say(f"cell     {name}")
    table = text_table(rows)
    replace_file(folder / "results.csv", rows_to_csv(rows).encode())
    replace_file(folder / "sweep.md", f"# Sweep\n\n{table.markdown()}\n\n{CHOSEN}\n".encode())
    return table


CHOSEN = (
    "Accuracies in %, mean ± sample sd over the seeds; ordered by accuracy on the validation rows."
)


def text_table(rows: Sequence[Row]) -> Table:
    """Return one line per combination and method, ordered by validation accuracy."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["cell"]), []).append(row)

    def validation(group: list[Row]) -> float:
        return sum(row["validation_accuracy"] for row in group) / len(group)

    ordered = sorted(groups.items(), key=lambda item: -validation(item[1]))
    lines = [
        [
            method,
            cell,
            f"{group[0]['trainable']:,}",
            percent2([row["validation_accuracy"] for row in group]),
            percent2([row["accuracy"] for row in group]),
            str(len(group)),
        ]
        for (method, cell), group in ordered
    ]
    return Table(["method", "settings", "trained", "validation", "test", "n"], lines)


def _run(settings: TextSettings) -> list[Row]:
    """Run one combination and return its rows. It depends only on `settings`, in any process."""
    from .study import run_text

    run: RunDirectory = run_text(settings, lambda line: None)
    write_text_report(run.folder)
    return tuned_rows(run)
