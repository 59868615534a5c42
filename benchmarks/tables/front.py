"""The tables of LoRA beside full fine-tuning, and of the kinds of adapters, preset relu."""

from experiments.report.table import Table
from experiments.sweeps.front import Front
from experiments.sweeps.kinds_report import Kinds

from .registry import kept_run, table, with_minus


@table("front-matched")
def matched() -> Table:
    """Return LoRA's `kept` less that of full fine-tuning, by rank."""
    return Front(kept_run("front-relu")).matched_table()


@table("kinds-chosen")
def chosen() -> Table:
    """Return each kind's gains at its chosen rate, and its difference from LoRA."""
    return with_minus(Kinds(kept_run("kinds-relu")).chosen_table())


@table("kinds-matched")
def kinds_matched() -> Table:
    """Return `kept` of each kind less that of LoRA at equal learning."""
    return with_minus(Kinds(kept_run("kinds-relu")).matched_table())
