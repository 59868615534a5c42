"""Find and replace the tables of the Markdown documents."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.report.table import Table

ROOT = Path(__file__).parents[2]
# The comment, an optional empty line, and the lines of the table, which all start with a bar.
MARKED = re.compile(
    r"^<!-- table: (?P<name>[\w-]+) -->\n(?P<gap>\n?)(?P<table>(?:\|.*\n)*)", re.MULTILINE
)
LINES = re.compile(r"^(?:\|.*\n)+", re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
# A decimal number at the start of a cell, but no version such as 2.14.1; or a spread.
MEASURED = re.compile(r"^\W*\d[\d,]*\.\d+(?![\d.])|±")


def paths() -> list[Path]:
    """Return the documents whose tables are made from rows."""
    patterns = ("README.md", "docs/*.md", "experiments/*/README.md")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def rewritten(text: str, make: Callable[[str], Table]) -> str:
    """Return a document with each marked table replaced by the table that `make` returns.

    >>> text = "<!-- table: two -->\\n| old |\\n| --- |\\nEnd.\\n"
    >>> print(rewritten(text, lambda name: Table(["new"], [["1"], ["2"]])))
    <!-- table: two -->
    | new |
    | --- |
    | 1 |
    | 2 |
    End.
    <BLANKLINE>
    """

    def replaced(match: re.Match[str]) -> str:
        comment = f"<!-- table: {match['name']} -->\n{match['gap']}"
        return f"{comment}{make(match['name']).markdown()}\n"

    return MARKED.sub(replaced, text)


def marked_names(text: str) -> list[str]:
    """Return the names of the marked tables of a document, in order."""
    return [match["name"] for match in MARKED.finditer(text)]


def unmarked_measurements(text: str) -> Iterator[str]:
    """Yield the header of each table without a comment that seems to have measurements.

    A table seems to have them if a fifth of its cells have a decimal number or a ±.
    """
    marked = {match.start("table") for match in MARKED.finditer(text)}
    for match in LINES.finditer(text):
        head, _, *rows = match[0].splitlines()
        cells = [cell for row in rows for cell in row.strip("|").split("|")]
        measured = sum(bool(MEASURED.search(CODE.sub("", cell))) for cell in cells)
        if match.start() not in marked and 5 * measured >= len(cells) > 0:
            yield head
