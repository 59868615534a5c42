"""The table of LoRA beside full fine-tuning at equal learning, preset relu."""

from experiments.report.table import Table
from experiments.sweeps.front import Front

from .registry import kept_run, table


@table("front-matched")
def matched() -> Table:
    """Return LoRA's `kept` less that of full fine-tuning, by rank."""
    return Front(kept_run("front-relu")).matched_table()
