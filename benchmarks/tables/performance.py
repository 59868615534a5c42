"""The tables of docs/performance.md: one for each device, from the files that `layers` wrote."""

from collections.abc import Sequence

from experiments.report.table import Table

from .registry import aligned, csv_rows, table

HEADS = {
    "floor_ms": "floor, ms",
    "paramlora_one_dtype": "one dtype: paramlora",
    "peft_one_dtype": "PEFT",
    "share_one_dtype": "share",
    "peft": "PEFT",
    "paramlora_dora": "DoRA: paramlora",
    "peft_dora": "PEFT, DoRA",
    "clock_ms": "clock, ms",
    "fastest_ms": "fastest",
    "slowest_ms": "slowest",
    "over_floor": "over floor",
    "host_ms": "host, ms",
    "gpu_ms": "GPU, ms",
}


@table("layers-gpu")
def layers_gpu() -> Table:
    """Return the times over the floor on a GPU."""
    columns = "model x work floor_ms paramlora peft share paramlora_one_dtype peft_one_dtype "
    return of_columns(csv_rows("layers-gpu"), f"{columns}share_one_dtype naive".split())


@table("layers-cpu")
def layers_cpu() -> Table:
    """Return the times over the floor on a CPU at rank 16."""
    rows = [row for row in csv_rows("layers-cpu") if row["rank"] == "16"]
    columns = "model x work floor_ms paramlora peft share naive paramlora_dora peft_dora"
    return of_columns(rows, columns.split())


@table("dora-gpu")
def dora_gpu() -> Table:
    """Return the times of DoRA over the floor on a GPU."""
    columns = "model x work floor_ms paramlora_dora peft_dora paramlora peft"
    return of_columns(csv_rows("dora-gpu"), columns.split())


@table("host-time")
def host_time() -> Table:
    """Return the encoder's steps under autocast with 128 sequences."""
    rows = [row for row in csv_rows("host-time") if row["x"].startswith("128×")]
    columns = (
        "work run contestant clock_ms fastest_ms slowest_ms over_floor host_ms gpu_ms launches"
    )
    return of_columns(rows, columns.split())


def of_columns(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> Table:
    """Return a table with some columns of the rows; a column that no row has is left out."""
    found = [column for column in columns if any(row.get(column) for row in rows)]
    lines = [[row.get(column) or "-" for column in found] for row in rows]
    return aligned([HEADS.get(column, column) for column in found], lines)
