"""The site: its pages, its reference, and the page of the command line."""

import argparse
import importlib
import inspect
import re
from pathlib import Path

import pytest

import paramlora as pl
from paramlora.__main__ import parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
REFERENCE = "\n".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
ENTRIES = re.findall(r"^::: (paramlora\.\S+)$", REFERENCE, re.MULTILINE)


def test_every_page_is_in_the_navigation():
    """Each document of docs/ and each notebook is in the navigation of mkdocs.yml, once."""
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    pages = [page for page in pages if not page.startswith("data/")]
    pages += [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]
    listed = re.findall(r"(\S+\.md)$", NAV, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(pages) <= set(listed)


def test_every_public_name_is_in_the_reference():
    """The reference has each public name of paramlora and of paramlora.kinds, once."""
    assert len(ENTRIES) == len(set(ENTRIES))
    public = {f"paramlora.{name}" for name in pl.__all__ if name != "kinds"}
    own = {f"paramlora.kinds.{name}" for name in set(pl.kinds.__all__) - set(pl.__all__)}
    others = {one for one in ENTRIES if one.startswith("paramlora.integrations.")}
    assert set(ENTRIES) - others == public | own


@pytest.mark.parametrize("name", sorted(set(pl.__all__) - {"kinds"}))
def test_every_public_name_has_an_example(name):
    """Each public name has an example in its docstring, which pytest runs."""
    assert ">>> " in (inspect.getdoc(getattr(pl, name)) or "")


def test_integrations_of_the_reference_exist():
    """Each integration in the reference is defined in the module that it names."""
    for entry in ENTRIES:
        module, _, name = entry.rpartition(".")
        if ".integrations." in entry:
            source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
            assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), entry


def test_command_line_page():
    """docs/command-line.md has each command and option of paramlora, and each study."""
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert f"`paramlora {name} " in page
        for action in command._actions:
            assert not action.option_strings or f"`{action.option_strings[-1]}`" in page
    studies = importlib.import_module("experiments.__main__").parser()
    (commands,) = (a for a in studies._actions if isinstance(a, argparse._SubParsersAction))
    assert all(f"| `{name}` |" in page for name in commands.choices)
