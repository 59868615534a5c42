"""The tables of the digit study, from the run of 60 adapter seeds in docs/data/digits-blog."""

from experiments.digits.report.report import methods_compared
from experiments.digits.report.tables import published_for, rows_of, seed_table
from experiments.harness.rundir import RunDirectory
from experiments.report.table import Table, percent

from .registry import kept_run, table

_KEYS = ("accuracy", "tuned_accuracy", "other_accuracy")


@table("digits-summary")
def summary() -> Table:
    """Return the accuracies of the study's methods over all seeds."""
    run = kept_run("digits-blog")
    head = ["accuracy, % (mean ± sd, 60 adapter seeds)", "all digits", "tuned digits"]
    names = {
        "base": "base; adapter off is bit-for-bit the same",
        "lora": "adapter on",
        "wrapped": "wrapped layers, with trained biases",
        "scrambled": "the update as published, with its bug",
    }
    lines = [[name, *_accuracies(run, method)] for method, name in names.items()]
    return Table([*head, "other digits"], lines)


def _accuracies(run: RunDirectory, method: str) -> list[str]:
    """Return the cells of a method, and the published accuracy beside the measured one."""
    rows = rows_of(run, method)
    cells = [percent(tuple(row[key] for row in rows)) for key in _KEYS]
    found = published_for(run).get(method)
    if found:
        correct = 100 * (1 - sum(found.wrong_counts) / rows[0]["n"])
        digits = 2 if method == "base" else 1
        cells[0] += f" (published {correct:.{digits}f})"
    return cells


@table("digits-seeds")
def seeds() -> Table:
    """Return the accuracies over all digits, with the predictive interval of one run."""
    found = seed_table(kept_run("digits-blog"))
    return Table(found.head, [row for row in found.rows if row[1] == "all digits, %"], (0, 1))


@table("digits-differences")
def differences() -> Table:
    """Return the paired differences between the methods over all digits."""
    _, found, _, _ = methods_compared(kept_run("digits-blog"))
    assert isinstance(found, Table)
    head = [cell if cell != "95 % interval" else "95 % interval of the mean" for cell in found.head]
    return Table(head, [row for row in found.rows if row[1] == "all"], (0, 1))
