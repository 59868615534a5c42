"""A report as one HTML file that works offline, with an explorer of the results.

`page.html` is the template. The style of `page.css` and the script of `page.js` are put into the
page, which refers to no other file and to no address.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..harness.rundir import replace_file
from .document import Block, Picture, Sections
from .style import COLOUR
from .table import Table

TEMPLATE = Path(__file__).with_name("page.html")
# A box that scrolls sideways on its own if it is wider than the page.
WIDE = '<div class="wide" role="group" aria-label="scrolls sideways">'
# These sections are folded. A reader seldom needs them, and they are long.
FOLDED = ("Settings", "Environment")
EXPLORER = """<section id="explorer" aria-label="explorer">
<div class="controls">
<fieldset id="adapters"><legend>adapter</legend></fieldset>
<fieldset id="layers"><legend>active layers</legend></fieldset>
<div class="slider"><label class="name" for="strength">strength λ =
<span id="shown-strength"></span></label>
<input id="strength" type="range" min="0" step="1">
<div class="ticks" id="ticks" aria-hidden="true"></div></div>
</div>
<p id="note" role="status"></p>
<p class="key" id="scope"></p>
<div class="totals" id="totals" aria-live="polite"></div>
<div class="panels">
<div><p class="key">accuracy by class: <i style="background:var(--fill)"></i> with these settings,
<i style="background:var(--mark)"></i> base; bold: tuned</p>
<div class="bars" id="bars"></div></div>
<div><p class="key" id="cells-key">images by true class (rows) and predicted class (columns)</p>
<div class="cells" id="cells" role="grid" aria-labelledby="cells-key"></div>
<div id="pictures" aria-live="polite"></div></div>
</div>
</section>"""


def page(
    title: str, lead: str, sections: Sections, explored: Mapping[str, Any] | None = None
) -> str:
    """Return the page.

    Args:
        title: plain text.
        lead: the paragraph below the title, plain text.
        sections: the blocks of each section, by heading; all text is plain.
        explored: the result of `explore`, or None for a page without an explorer. Its key "scope",
            if there, is a sentence below the explorer's controls.
    """
    body = "\n".join(_section(heading, blocks) for heading, blocks in sections.items())
    # Within a script element only "</" could end the element, as in "</script>".
    data = json.dumps(explored, separators=(",", ":")).replace("</", "<\\/")
    fields = {
        "TITLE": escape(title),
        "LEAD": escape(lead),
        "EXPLORER": EXPLORER if explored else "",
        "BODY": body,
        "DATA": data,
        "STYLE": _style(),
        "SCRIPT": TEMPLATE.with_suffix(".js").read_text(encoding="utf-8"),
    }
    # One pass over the template: text such as "@DATA@" in a lead is not replaced in turn.
    text = TEMPLATE.read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda field: fields[field[1]], text)


def write_page(
    path: Path, title: str, lead: str, sections: Sections, explored: Mapping[str, Any] | None = None
) -> None:
    """Write the page that `page` returns to a file, atomically."""
    replace_file(path, page(title, lead, sections, explored).encode())


def _style() -> str:
    """Return the style sheet, with the colours of the figures."""
    text = TEMPLATE.with_suffix(".css").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda field: COLOUR[field[1].lower()], text)


def _section(heading: str, blocks: Sequence[Block]) -> str:
    title, content = f"<h2>{escape(heading)}</h2>", "\n".join(map(_html, blocks))
    if heading in FOLDED:
        return f"<details><summary>{title}</summary>\n{content}</details>"
    return f"<section>{title}\n{content}</section>"


def _html(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        source = "data:image/png;base64," + base64.b64encode(block.png).decode()
        text = escape(block.caption)
        image = f'{WIDE}<img alt="{text}" src="{source}"></div>'
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
    if isinstance(block, str):
        text = re.sub("`([^`]+)`", r"<code>\1</code>", escape(block))
        return f"<p>{text}</p>"
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in block) + "</ul>"


def _table(table: Table) -> str:
    """Return a table that scrolls sideways on its own if it is wider than the page."""
    head = "".join(
        f'<th scope="col">{escape(cell).replace(chr(10), "<br>")}</th>' for cell in table.head
    )
    rows = (
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"{WIDE}<table><tr>{head}</tr>\n{chr(10).join(rows)}</table></div>"
