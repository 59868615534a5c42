"""The tables of remedies against forgetting in the digit study."""

from experiments.report.table import Table
from experiments.sweeps.remedies import Compared

from .registry import aligned, kept_run, table, with_minus


@table("remedies-lora")
def lora() -> Table:
    """Return the gains of all remedies with LoRA."""
    return _gains("LoRA")


@table("remedies-full")
def full() -> Table:
    """Return the gains of the remedies that were compared on full fine-tuning."""
    return _gains("full")


@table("sweeps-remedies")
def sweeps() -> Table:
    """Return some remedies with LoRA and the longer schedule."""
    shown = ("no remedy", "strength λ", "masked cross-entropy", "replay of 100 with a margin")
    found = _gains("LoRA")
    lines = [[*row[:2], *row[4:]] for row in found.rows if row[0] in shown]
    return aligned(["remedy", "old images", "all digits", "− no remedy"], lines)


def _gains(arm: str) -> Table:
    found = with_minus(Compared(kept_run("remedies-relu")).arm_table(arm))
    return aligned(found.head, found.rows)
