"""Rows of results: appended to a JSON Lines file, and shown as tables."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.report.table import Table

__all__ = ["Row", "Table", "append", "machine", "overhead_share", "read", "summarized"]

Row = dict[str, Any]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSON Lines file; create it and its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarized(seconds: list[float]) -> Row:
    """Return the figures that a row keeps of the seconds of each round."""
    return {"median_s": median(seconds), "min_s": min(seconds), "rounds": len(seconds)}


def overhead_share(ours: float, theirs: float) -> str:
    """Return our overhead divided by that of another contestant, as a cell of a table.

    Args:
        ours, theirs: times over the floor. There is no share if theirs does not exceed 1.

    >>> overhead_share(1.1, 1.4), overhead_share(1.1, 1.0)
    ('0.25', '-')
    """
    return f"{(ours - 1) / (theirs - 1):.2f}" if theirs > 1 else "-"


def machine(device: str) -> str:
    """Return the name of the GPU if `device` is "cuda", else that of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
