"""The tables of remedies against forgetting in the digit study."""

from experiments.report.table import Table

from .registry import aligned, csv_rows, table


@table("sweeps-remedies")
def sweeps() -> Table:
    """Return some remedies, preset relu: all, tuned and other digits."""
    shown = (
        "no remedy",
        "strength λ",
        "masked, longer",
        "replay of 100 with a margin, longer",
    )
    cells: dict[tuple[str, str], str] = {}
    old: dict[str, str] = {}
    for row in csv_rows("remedies"):
        if row["preset"] == "relu":
            gain = f"{float(row['gain, points']):+.2f} ± {row['sd']}".replace("-", "−")
            cells[row["remedy"], row["digits"]] = gain
            old[row["remedy"]] = row["old images"]
    digits = ("all", "tuned", "other")
    lines = [[name, old[name], *(cells[name, group] for group in digits)] for name in shown]
    return aligned(["remedy", "old images", *digits], lines)
