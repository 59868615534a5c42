"""The content of a report, independent of its format, and its rendering as Markdown.

A report has a title, a lead paragraph and sections. A section has a heading and blocks: paragraphs,
lists, tables and pictures. `page` renders the same content as one HTML file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .table import Table


@dataclass(frozen=True)
class Picture:
    """A figure with its caption. `file` is its name in the folder of the Markdown report."""

    png: bytes
    caption: str
    file: str = ""


Block = str | list[str] | Table | Picture  # a str is a paragraph, a list is a bullet list
Sections = Mapping[str, Sequence[Block]]  # by heading


def markdown(title: str, lead: str, sections: Sections) -> str:
    """Return a report as Markdown.

    >>> print(markdown("Study", "Ten runs.", {"Checks": [["2/2 passed", "1/1 passed"]]}))
    # Study
    <BLANKLINE>
    Ten runs.
    <BLANKLINE>
    ## Checks
    <BLANKLINE>
    - 2/2 passed
    - 1/1 passed
    <BLANKLINE>
    """
    parts = [f"# {title}", lead]
    for heading, blocks in sections.items():
        parts += [f"## {heading}", *map(_markdown, blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        return block.markdown()
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.file})\n\n{block.caption}"
    return block if isinstance(block, str) else "\n".join(f"- {line}" for line in block)
