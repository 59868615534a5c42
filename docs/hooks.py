"""The site beside docs/: pages from other folders, formulas, a live report, a check of all links.

MkDocs calls the functions `on_...`. A page of the site has its path in the repository, without
"docs/", and the README is the first page. So links in the files stay as a code host reads them.
"""

import hashlib
import json
import logging
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "site"
REPORT = "live-report.html"
PAGES = ("README.md", "C*.md", "SECURITY.md", "notebooks/*.ipynb", "experiments/*/README.md")
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))|(<img [^>]*src=\")([^\"]+)(\")")
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.DOTALL)
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"


def site_path(path: str) -> str:
    """Return the path on the site of a file of the repository.

    >>> site_path("docs/kinds.md"), site_path("experiments/text/README.md")
    ('kinds.md', 'experiments/text/README.md')
    """
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def relinked(text: str, path: str) -> str:
    """Return Markdown of a file of the repository with the links that the site needs.

    >>> relinked("[a](../notebooks/1.ipynb#b)", "docs/kinds.md")
    '[a](notebooks/1.md#b)'
    """
    here, there = posixpath.dirname(path), posixpath.dirname(site_path(path))

    def link(match: re.Match[str]) -> str:
        start, target, end = match.groups()[:3] if match[2] else match.groups()[3:]
        if re.match(r"[a-z]+:", target):
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(here, target)))
        target = target.replace(".ipynb", ".md")
        return f"{start}{posixpath.relpath(target, there or '.')}{end}"

    return LINK.sub(link, text)


def formulas(text: str) -> str:
    """Return Markdown with its formulas as MathML, which browsers show without a script.

    Python-Markdown would end a paragraph at a `<math>` that begins a line; a span prevents that.

    >>> formulas("$r$ is the rank")[:11], formulas("$r$ is the rank")[-26:]
    ('<span><math', '</math></span> is the rank')
    """

    def formula(match: re.Match[str]) -> str:
        text = convert((match[1] or match[2]).strip(), display="block" if match[1] else "inline")
        return text if match[1] else f"<span>{text}</span>"

    parts = CODE.split(text)
    return "".join(part if i % 2 else MATH.sub(formula, part) for i, part in enumerate(parts))


def notebook(source: Path) -> str:
    """Return a notebook as Markdown: its cells with the saved outputs."""
    book = json.loads(source.read_text(encoding="utf-8"))
    # A page without a kernel shows a widget's first figure in the widget's place.
    widgets = book["metadata"].get("widgets", {})
    states = [model["state"] for kind in widgets.values() for model in kind["state"].values()]
    figures = [output for state in states for output in state.get("outputs", ())]
    parts = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(formulas(text).replace("<details>", "<details markdown>"))
            continue
        parts.append(f"```python\n{text}\n```")
        outputs = cell["outputs"]
        shown = figures if any(WIDGET in one.get("data", {}) for one in outputs) else outputs
        parts += [output_of(one) for one in shown]
    return "\n\n".join(parts)


def output_of(output: dict[str, Any]) -> str:
    """Return an output of a cell as Markdown.

    >>> output_of({"data": {"text/markdown": ["| a |"], "text/plain": ["<Markdown>"]}})
    '<div class="output" markdown>\\n\\n| a |\\n\\n</div>'
    """
    data = {key: "".join(value) for key, value in output.get("data", {}).items()}
    if "image/png" in data:
        image = data["image/png"].replace("\n", "")
        return f'<img alt="Figure that the cell above draws" src="data:image/png;base64,{image}">'
    if "text/html" in data:
        lines = (line.strip() for line in data["text/html"].splitlines())
        return f'<div class="output">{"".join(lines)}</div>'
    if "text/markdown" in data:
        return f'<div class="output" markdown>\n\n{data["text/markdown"]}\n\n</div>'
    text = "".join(output.get("text", "")) or data.get("text/plain", "")
    return f"```text {{ .output }}\n{text.rstrip()}\n```"


def live_report() -> Path:
    """Return the page of a small digit study, which runs if the studies' code has changed."""
    endings = (".py", ".html", ".css", ".js")
    code = [path for path in (ROOT / "experiments").rglob("*.*") if path.suffix in endings]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code)))
    folder = CACHE / digest.hexdigest()[:12]
    if not (folder / "report.html").exists():
        command = "-m experiments digits --preset small --data digits --seeds 2 --device cpu --out"
        subprocess.run([sys.executable, *command.split(), str(folder)], cwd=ROOT, check=True)
    return folder / "report.html"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        path = site_path(source.relative_to(ROOT).as_posix())
        if source.suffix == ".ipynb":
            page = File.generated(config, path.replace(".ipynb", ".md"), content=notebook(source))
        else:
            page = File.generated(config, path, abs_src_path=str(source))
        files.append(page)
    files.append(File.generated(config, REPORT, abs_src_path=str(live_report())))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Adapt the links of a page, and set pairs of code side by side."""
    uri = page.file.src_uri
    added = uri.startswith(("notebooks/", "experiments/")) or uri[0].isupper()
    path = "README.md" if uri == "index.md" else uri if added else f"docs/{uri}"
    return pairs(relinked(markdown, path))


def pairs(markdown: str) -> str:
    """Return Markdown with tables of two code blocks as divisions, which may contain Markdown.

    Other tables stay, such as a summary in a notebook:

    >>> row = "<tr><{0}>1</{0}><{0}>2</{0}><{0}>3</{0}></tr>".format
    >>> pairs(table := f"<table>{row('th')}{row('td')}</table>") == table
    True
    """
    heads, cells = "<th>([^<]*)</th><th>([^<]*)</th>", "<td>(.*?)</td><td>(.*?)</td>"
    table = f"<table><tr>{heads}</tr><tr>{cells}</tr></table>"
    pair = (
        r'<div class="pair" markdown><div markdown>\n\n**\1**\n\3\n</div>'
        r"<div markdown>\n\n**\2**\n\4\n</div></div>"
    )
    return re.sub(table, pair, markdown, flags=re.DOTALL)


class _Links(HTMLParser):
    """Collect the links and the anchors of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the targets of one tag."""
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        links = {given[key] for key in ("href", "src") if key in given}
        self.links |= links
        if tag in ("script", "img", "iframe", "link") and given.get("rel") != "canonical":
            self.loaded |= links


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Warn of links without a target, and of pages that load something from elsewhere."""
    site = Path(config.site_dir)
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    pages.pop(site / "404.html", None)  # its links start at the root of a server
    for path, page in pages.items():
        for link in page.loaded:
            if re.match(r"(https?:)?//", link):
                LOG.warning("%s loads %s", path.relative_to(site), link)
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else None
            if not target.exists() or (anchor and known is not None and anchor not in known):
                LOG.warning("%s links to %s, which does not exist", path.relative_to(site), link)


class Doctests(griffe.Extension):
    """Fence the examples of docstrings, which Markdown would read as quotations."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            example = r"(?m)((?:^>>> .*\n?)(?:^(?!\s*$).*\n?)*)"
            obj.docstring.value = re.sub(example, r"```pycon\n\1\n```\n", obj.docstring.value)
