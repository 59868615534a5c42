"""The tables of the text study."""

from experiments.report.table import Table

from .registry import aligned, csv_rows, table


@table("text-imdb-summary")
def imdb_summary() -> Table:
    """Return the main methods on IMDb, for the study's README."""
    names = {
        "full": "full",
        "last-layers": "last two layers",
        "lora, query and value, r 8": "LoRA, query and value, rank 8",
        "lora, all linear, r 8": "LoRA, all linear layers, rank 8",
    }
    rows = {row["method"]: row for row in csv_rows("text-imdb")}
    head = ["method", "trained", "share", "test, %"]
    keys = ("trained parameters", "share", "test, %")
    return aligned(head, [[name, *(rows[key][k] for k in keys)] for key, name in names.items()])
