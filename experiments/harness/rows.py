"""The rows of results.jsonl: those that are whole, each once."""

import json
import lzma
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .settings import StudyError

Row = dict[str, Any]
FILE = "results.jsonl"
# Two rows with the same values of these keys are the same evaluation. No study uses all of them.
KEY = ("stage", "cell", "scenario", "method", "base_seed", "seed", "strength", "rate")
# Figures that differ if the same evaluation is made again.
MEASURED = ("commit", "seconds", "peak_bytes")


@dataclass
class Recorded:
    """The content of a results.jsonl.

    Args:
        rows: the whole rows in their order, each evaluation once.
        lines: their lines, as they are in the file.
        damaged: the numbers of the lines that are not rows, counted from 1.
        repeated: the numbers of the lines with an evaluation that an earlier line has.
        differing: those of `repeated` that have other results than the earlier line.
        tail: the incomplete last line, which an interrupted write leaves.
    """

    rows: list[Row] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    differing: list[int] = field(default_factory=list)
    tail: bytes = b""

    @property
    def content(self) -> bytes:
        """The content of a file with these rows alone."""
        return b"".join(line + b"\n" for line in self.lines)

    @property
    def left_out(self) -> bool:
        """Whether the file has anything else."""
        return bool(self.damaged or self.repeated or self.tail)

    def warn(self, folder: Path) -> None:
        """Warn about lines that are left out."""
        path = folder / FILE
        if self.damaged:
            warnings.warn(
                f"{path} has damaged rows, which are left out: {_lines(self.damaged)}. Run the "
                "command of the run again to evaluate them again",
                stacklevel=3,
            )
        if self.repeated:
            differ = f"; {_lines(self.differing)} with other results" if self.differing else ""
            warnings.warn(
                f"{path} has evaluations that are recorded more than once: "
                f"{_lines(self.repeated)}{differ}. The first row of each counts, once",
                stacklevel=3,
            )


def key_of(row: Row) -> tuple[Any, ...]:
    """Return the values that identify a row's evaluation."""
    return tuple(row.get(name) for name in KEY)


def differences(there: Row, row: Row) -> list[str]:
    """Return the names of the results that differ between two rows of the same evaluation."""
    # As text, in which NaN equals NaN.
    return [
        name
        for name in row
        if name not in MEASURED and json.dumps(there.get(name)) != json.dumps(row[name])
    ]


def read_rows(folder: Path) -> Recorded:
    """Return the rows in results.jsonl, or in results.jsonl.xz of a run that is kept compressed.

    Raises:
        StudyError: results.jsonl.xz is damaged.
    """
    path, compressed = folder / FILE, folder / f"{FILE}.xz"
    if path.exists() or not compressed.exists():
        return parsed(path.read_bytes() if path.exists() else b"")
    try:
        return parsed(lzma.decompress(compressed.read_bytes()))
    except lzma.LZMAError as error:
        raise StudyError(f"{compressed} is damaged ({error}): copy it again") from None


def parsed(content: bytes) -> Recorded:
    """Return the whole rows in the content of a results.jsonl, each evaluation once.

    >>> found = parsed(b'{"seed": 0, "n": 1}\\n{"seed": 0, "n": 2}\\nrubbish\\n{"seed')
    >>> found.rows, found.repeated, found.damaged, found.tail
    ([{'seed': 0, 'n': 1}], [2], [3], b'{"seed')
    """
    *lines, tail = content.split(b"\n")
    found, first = Recorded(tail=tail), dict[tuple[Any, ...], Row]()
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            found.damaged.append(number)
        elif (before := first.setdefault(key_of(row), row)) is not row:
            found.repeated.append(number)
            if differences(before, row):
                found.differing.append(number)
        else:
            found.rows.append(row)
            found.lines.append(line)
    return found


def _row(line: bytes) -> Row | None:
    """Return the row of a line, or None if the line is damaged."""
    try:
        row = json.loads(line)
        hash(key_of(row))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return row or None


def _lines(numbers: list[int]) -> str:
    """Return a count of lines and their numbers, the first five of them."""
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{len(numbers)}, in line{'s' if len(numbers) > 1 else ''} {shown}"
