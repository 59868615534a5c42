"""Printing a summary: alike sites in one row, as text and as HTML."""

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .summary import SiteSummary

# Two alike sites are printed in two rows.
_FEW = 2


def pattern_of(path: str) -> str:
    """Return a path with a `*` for each number in it, except for those of a block.

    >>> pattern_of("layers.3.experts.0.qkv.weight[:4]")
    'layers.*.experts.*.qkv.weight[:4]'
    """
    path, bracket, index = path.partition("[")
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path) + bracket + index


def grouped(rows: Sequence["SiteSummary"]) -> list[list["SiteSummary"]]:
    """Return rows in groups that differ in the numbers in their paths only, each at its first row.

    Sites of one group have the same shape, spec and state. So 32 blocks with 7 adapted layers each
    are 7 groups.
    """
    groups: dict[object, list[SiteSummary]] = {}
    alike = []
    for row in rows:
        key = dataclasses.replace(row, site=pattern_of(row.site))
        groups.setdefault(key, []).append(row)
        alike.append(groups[key])
    pairs = zip(rows, alike, strict=True)
    found = [[row] if len(group) <= _FEW else group for row, group in pairs]
    return [group for row, group in zip(rows, found, strict=True) if group[0] is row]


def cells(group: list["SiteSummary"]) -> dict[str, str]:
    """Return the cells of alike sites by column; the parameters of the sites are added up."""
    row, yes = group[0], {True: "yes", False: "no"}
    return {
        "site": row.site if len(group) == 1 else f"{pattern_of(row.site)} ({len(group)})",
        "adapter": row.adapter,
        "shape": "×".join(map(str, row.shape)),
        "kind": row.kind,
        "rank": "-" if row.rank is None else str(row.rank),
        "scale": f"{row.scale:g}",
        "active": yes[row.active],
        "trainable": yes[row.trainable],
        "merged": yes[row.merged],
        "parameters": f"{sum(one.parameters for one in group):,}",
        "share": f"{row.share:.2%}",
        "": row.note,
    }


def as_text(table: Sequence[tuple[str, ...]], notes: list[str], start: Sequence[str] = ()) -> str:
    """Return a table in columns, between lines before and after it."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    return "\n".join([*start, *lines, *notes])


def as_html(table: Sequence[tuple[str, ...]], notes: list[str], start: list[str]) -> str:
    """Return a table in HTML, in which everything from the model is escaped."""
    rows = [
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
        for tag, row in zip(["th"] + ["td"] * len(table), table, strict=False)
    ]
    body = f"<table>{''.join(rows)}</table>" if rows else ""
    before, after = ("<br>".join(map(html.escape, lines)) for lines in (start, notes))
    return f"<div>{before}{body}{after}</div>"
