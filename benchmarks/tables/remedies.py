"""The tables of remedies against forgetting in the digit study, preset relu."""

from experiments.report.table import Table
from experiments.sweeps.families import FULL, MASKED, NO_REMEDY
from experiments.sweeps.remedies import Compared

from .registry import kept_run, table

KEPT = "remedies-relu"


@table("remedies-lora")
def lora() -> Table:
    """Return the gains of all remedies with LoRA, and their differences from no remedy."""
    return Compared(kept_run(KEPT)).arm_table("LoRA")


@table("remedies-full")
def full() -> Table:
    """Return the same for full fine-tuning."""
    return Compared(kept_run(KEPT)).arm_table(FULL)


@table("sweeps-remedies")
def sweeps() -> Table:
    """Return some remedies with LoRA and the longer schedule."""
    found = lora()
    names = NO_REMEDY, "strength λ", MASKED, "replay of 100 with a margin"
    rows = [[name, old, *longer] for name, old, _, _, *longer in found.rows if name in names]
    return Table(["remedy", "old images", "all digits", "− no remedy"], rows, (0, 1))
