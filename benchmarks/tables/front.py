"""The tables of LoRA and full fine-tuning at many learning rates, from docs/data/front-relu."""

from functools import lru_cache

from experiments.report.table import Table
from experiments.sweeps.front_tables import Front

from .registry import kept_run, minus, table


@lru_cache(maxsize=1)
def _front() -> Front:
    return Front(kept_run("front-relu"))


def _shown(found: Table) -> Table:
    """Return a table with minus signs, also at the ends of intervals."""
    rows = [[row[0], *(minus(cell).replace("(-", "(−") for cell in row[1:])] for row in found.rows]
    return Table(found.head, rows)


@table("front-relu-kept")
def kept() -> Table:
    """Return what each method learns at most, and the other digits at equal learning."""
    return _shown(_front().kept_table())


@table("front-relu-differences")
def differences() -> Table:
    """Return LoRA − full on the other digits at equal learning, in points."""
    return _shown(_front().difference_table())


@table("front-relu-ratios")
def ratios() -> Table:
    """Return how many times as much LoRA forgets as full fine-tuning at equal learning."""
    return _shown(_front().ratio_table())


@table("front-relu-chosen")
def chosen() -> Table:
    """Return the gains at the rate with which each method learns most."""
    return _shown(_front().chosen_table())
