"""The tables of intruder dimensions on the digits, preset relu."""

from experiments.report.table import Table
from experiments.sweeps.intruders import Intruders

from .registry import kept_run, table, with_minus

KEPT = "intruders-relu"


@table("intruders-correlations")
def correlations() -> Table:
    """Return the rank correlations with `kept`, by method."""
    return with_minus(Intruders(kept_run(KEPT)).correlation_table())


@table("intruders-scaling")
def scaling() -> Table:
    """Return the changes by scaling the top intruder and its control, over all trainings."""
    found = Intruders(kept_run(KEPT)).scaling_table()
    rows = [row[1:] for row in found.rows if row[0] == "all"]
    return with_minus(Table(found.head[1:], rows))
