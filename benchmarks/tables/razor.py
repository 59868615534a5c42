"""The tables of RL's Razor on ParityMNIST."""

from experiments.razor.analysis import Found
from experiments.razor.report import (
    excess_table,
    explained_table,
    fit_table,
    least_table,
    method_table,
)
from experiments.report.table import Table

from .registry import kept_run, table, with_minus

KEPT = "razor"


@table("razor-fits")
def fits() -> Table:
    """Return R² of the fits of forgetting to KL, by arm."""
    return with_minus(fit_table(kept_run(KEPT)))


@table("razor-methods")
def methods() -> Table:
    """Return the excess of LoRA of rank 8 at equal KL, for each method alone."""
    found = method_table(Found(kept_run(KEPT)))
    rows = [[row[0], *row[2:]] for row in found.rows if row[1] == "lora-8"]
    return with_minus(Table([found.head[0], *found.head[2:]], rows))


@table("razor-least")
def least() -> Table:
    """Return the least forgetting at 94 % parity, and the differences of LoRA."""
    return with_minus(least_table(Found(kept_run(KEPT))))


@table("razor-explained")
def explained() -> Table:
    """Return what KL, the size of the update and KL on Fashion-MNIST explain."""
    return with_minus(explained_table(Found(kept_run(KEPT))))


@table("razor-layers")
def layers() -> Table:
    """Return the excess of the controls with the oracle, in the first parts of KL."""
    found = excess_table(Found(kept_run(KEPT)), "oracle")
    shown = [row for row in found.rows if row[0].startswith("lora-8") or "layer" in row[0]]
    return with_minus(Table(found.head[:4], [row[:4] for row in shown]))
