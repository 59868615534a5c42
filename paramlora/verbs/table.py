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


HEAD = (
    "site",
    "adapter",
    "shape",
    "kind",
    "rank",
    "scale",
    "active",
    "trainable",
    "merged",
    "parameters",
    "share",
    "",
)


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
    keys = [dataclasses.replace(row, site=pattern_of(row.site)) for row in rows]
    groups: dict[object, list[SiteSummary]] = {}
    for key, row in zip(keys, rows, strict=True):
        groups.setdefault(key, []).append(row)
    found = []
    for key, row in zip(keys, rows, strict=True):
        if len(groups[key]) <= _FEW:
            found.append([row])
        elif groups[key][0] is row:
            found.append(groups[key])
    return found


def cells(group: list["SiteSummary"]) -> tuple[str, ...]:
    """Return the cells of alike sites, of which the parameters are added up."""
    row, yes = group[0], {True: "yes", False: "no"}
    return (
        row.site if len(group) == 1 else f"{pattern_of(row.site)} ({len(group)})",
        row.adapter,
        "×".join(map(str, row.shape)),
        row.kind,
        "-" if row.rank is None else str(row.rank),
        f"{row.scale:g}",
        yes[row.active],
        yes[row.trainable],
        yes[row.merged],
        f"{sum(one.parameters for one in group):,}",
        f"{row.share:.2%}",
        row.note,
    )


def as_text(table: Sequence[tuple[str, ...]], notes: list[str], start: list[str]) -> str:
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
