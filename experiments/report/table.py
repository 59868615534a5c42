"""Tables as plain text or Markdown, and the mean ± sd of a figure over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit

from ..harness.settings import listed


@dataclass(frozen=True)
class Sample:
    """The values of one figure over several seeds.

    `sd` is the sample standard deviation, with n - 1 in its denominator. It is None for n = 1.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None

    def mean_sd(self, digits: int) -> str:
        """Return "mean ± sd" with so many decimal digits, or one number if all values are equal.

        Equal values come from results that no seed changes, such as those of the base. "± 0" would
        suggest that a spread was measured.

        >>> Sample((1.0, 2.0)).mean_sd(1), Sample((2.0, 2.0)).mean_sd(0)
        ('1.5 ± 0.7', '2')
        """
        equal = len(set(self.values)) == 1
        return f"{self.mean:.{digits}f}" + ("" if equal else f" ± {self.sd:.{digits}f}")

    def interval(self, digits: int, *, of_one: bool = False) -> str:
        """Return a 95 % interval, "4.1 to 6.8", by Student's t with n - 1 degrees of freedom.

        Args:
            digits: decimal digits.
            of_one: return the predictive interval, in which one further value lies with a
                probability of 95 %, instead of the confidence interval of the mean.

        >>> Sample((1.0, 2.0, 3.0)).interval(1), Sample((1.0, 2.0, 3.0)).interval(1, of_one=True)
        ('-0.5 to 4.5', '-3.0 to 7.0')
        >>> Sample((1.0,)).interval(1)
        '-'
        """
        if self.sd is None:
            return "-"
        low, high = self.bounds(of_one=of_one)
        return f"{low:.{digits}f} to {high:.{digits}f}"

    def bounds(self, *, of_one: bool = False) -> tuple[float, float]:
        """Return the ends of `interval`; n must be at least 2."""
        n = len(self.values)
        assert self.sd is not None
        half = float(stdtrit(n - 1, 0.975)) * self.sd * sqrt((1 if of_one else 0) + 1 / n)
        return self.mean - half, self.mean + half

    def min_max(self, digits: int) -> str:
        """Return "lowest to highest" with so many decimal digits."""
        return f"{min(self.values):.{digits}f} to {max(self.values):.{digits}f}"


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method.

    >>> holm([0.01, 0.5, 0.04])
    [0.03, 0.5, 0.08]
    """
    found, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = highest
    return found


@dataclass(frozen=True)
class Table:
    """A header and rows of cells. The columns in `left` are aligned left, all others right.

    A line break in the header stays one in `text` and becomes a space in `markdown`.

    >>> print(Table(["layer", "rank of\\nupdate"], [["fc1", "2"], ["fc2", "10"]]).text())
           rank of
    layer   update
    fc1          2
    fc2         10
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = (0,)

    def text(self) -> str:
        """Return the table for a terminal, its columns two spaces apart."""
        cells = [cell.split("\n") for cell in self.head]
        height = max(map(len, cells))
        # Short headers get empty lines above them, so that all headers end on the same line.
        cells = [[""] * (height - len(lines)) + lines for lines in cells]
        rows: list[Sequence[str]] = [*zip(*cells, strict=True), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            padded = [
                cell.ljust(width) if i in self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded))
        return "\n".join(lines)

    def markdown(self) -> str:
        """Return the table as GitHub-flavoured Markdown."""
        head = [cell.replace("\n", " ") for cell in self.head]
        line = ["---" if i in self.left else "---:" for i in range(len(head))]
        rows = [head, line, *self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(fractions: tuple[float, ...]) -> str:
    """Return fractions in %: "mean ± sd" with one decimal digit, or one number with two."""
    sample = Sample(tuple(100 * fraction for fraction in fractions))
    return sample.mean_sd(2 if len(set(fractions)) == 1 else 1)


def key_value_table(values: Mapping[str, Any]) -> Table:
    """Return settings, or any other plain values by name, as a table of two columns."""
    return Table(["name", "value"], [[name, listed(value)] for name, value in values.items()])
