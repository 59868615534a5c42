"""Figures over seeds, and tables, set as text or as Markdown: for the report of any study."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from ..harness.settings import listed


@dataclass(frozen=True)
class Band:
    """The same figure over several seeds. `sd` is the sample standard deviation, None for one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None

    def shown(self, digits: int) -> str:
        """Return `mean ± sd`, or the value alone where all are the same.

        >>> Band((1.0, 2.0)).shown(1), Band((2.0, 2.0)).shown(0)
        ('1.5 ± 0.7', '2')
        """
        one = len(set(self.values)) == 1
        return f"{self.mean:.{digits}f}" + ("" if one else f" ± {self.sd:.{digits}f}")

    def extent(self, digits: int) -> str:
        return f"{min(self.values):.{digits}f} to {max(self.values):.{digits}f}"


@dataclass(frozen=True)
class Table:
    """Cells under a head, the first column to the left and all others to the right.

    A line break in the head is kept in text, and is a space in Markdown.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        heads = [cell.split("\n") for cell in self.head]
        tall = max(map(len, heads))
        heads = [[""] * (tall - len(cell)) + cell for cell in heads]
        lines: list[Sequence[str]] = [*zip(*heads, strict=True), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        lines = [
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines
        ]
        return "\n".join("  ".join(line) for line in lines)

    def markdown(self) -> str:
        head = [cell.replace("\n", " ") for cell in self.head]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(fractions: tuple[float, ...]) -> str:
    """Return fractions in %: to two places where they are one figure, else mean ± sd to one."""
    band = Band(tuple(100 * value for value in fractions))
    return band.shown(2 if len(set(fractions)) == 1 else 1)


def pairs(values: dict[str, Any]) -> Table:
    """Return settings, or whatever else is plain, as a table of two columns."""
    return Table(["what", "value"], [[key, listed(value)] for key, value in values.items()])
