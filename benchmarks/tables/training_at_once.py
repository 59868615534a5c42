"""The table of docs/train-many.md: adapters trained at once, compared with separate trainings."""

from experiments.report.table import Table

from .registry import aligned, csv_rows, table

HEAD = [
    "model",
    "rank",
    "rows of each",
    "adapters",
    "separate, ms",
    "at once, ms",
    "ratio ± sd",
    "rounds",
]


@table("training-at-once")
def training_at_once() -> Table:
    """Return times and ratios on the CPU."""
    keys = ("model", "rank", "rows", "adapters", "separate_ms", "at_once_ms")
    return aligned(
        HEAD,
        [
            [*(row[key] for key in keys), f"{row['ratio']} ± {row['sd']}", row["rounds"]]
            for row in csv_rows("training-at-once")
        ],
    )
