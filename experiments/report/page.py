"""A report as one HTML file that works offline: figures, tables, and an explorer of the results.

`page.html` is the template, style and script included; it names no other file and no address.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..harness.rundir import replace_file
from .table import Table

TEMPLATE = Path(__file__).with_name("page.html")
EXPLORER = """<section id="explorer" aria-label="explorer">
<div class="controls">
<fieldset id="adapters"><legend>adapter</legend></fieldset>
<fieldset id="layers"><legend>layers it is on at</legend></fieldset>
<label><span class="name">strength λ = <output id="shown-strength"></output></span><br>
<input id="strength" type="range" min="0" step="1"></label>
</div>
<div class="totals" id="totals"></div>
<div class="panels">
<div><p class="key"><i style="background:var(--on)"></i> right answers now,
<i style="background:var(--off)"></i> of the base; bold: tuned</p>
<div class="bars" id="bars"></div></div>
<div><p class="key">rows: shown; columns: answered</p>
<div class="cells" id="cells"></div><div id="pictures"></div></div>
</div>
</section>"""


def page(
    title: str,
    lead: str,
    parts: Sequence[tuple[str, str]],
    explored: Mapping[str, Any] | None = None,
) -> str:
    """Return the page.

    Args:
        title: of the page, plain text.
        lead: a paragraph below it, plain text.
        parts: headings, plain text, and what stands below each, HTML.
        explored: what `explore` returned, or None for a page without an explorer.
    """
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{html}</section>" for name, html in parts)
    # In a script element only "</" could end it early.
    data = json.dumps(explored, separators=(",", ":")).replace("</", "<\\/")
    fields = {
        "TITLE": escape(title),
        "LEAD": escape(lead),
        "EXPLORER": EXPLORER if explored else "",
        "BODY": body,
        "DATA": data,
    }
    # In one pass, so that an @ in what is filled in is left alone.
    text = TEMPLATE.read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda found: fields[found[1]], text)


def write_page(path: Path, *given: Any, **named: Any) -> None:
    """Write the page that `page` returns to a file, at once."""
    replace_file(path, page(*given, **named).encode())


def table_html(table: Table) -> str:
    """Return a table as HTML, which scrolls by itself where it is too wide."""
    head = "".join(f"<th>{escape(cell).replace(chr(10), '<br>')}</th>" for cell in table.head)
    rows = (
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{chr(10).join(rows)}</table></div>'


def figure_html(png: bytes, caption: str) -> str:
    """Return a figure with its image inside."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def list_html(lines: Sequence[str]) -> str:
    """Return lines as a list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
