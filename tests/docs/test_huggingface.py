"""The examples of docs/huggingface.md run unchanged, each section as one program."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DOC = Path(__file__).parents[2] / "docs" / "huggingface.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = DOC.read_text(encoding="utf-8")
SECTIONS = {match[1]: match for match in SECTION.finditer(TEXT)}


def test_sections_have_code() -> None:
    """Each section has code to run."""
    assert SECTIONS
    for title, match in SECTIONS.items():
        assert BLOCK.search(match[2]), title


# By other libraries, of torch.
@pytest.mark.filterwarnings(r"ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("title", SECTIONS)
def test_examples(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a section run, each after those before it, and their assertions pass."""
    section = SECTIONS[title]
    for package in re.findall(r"^(?:import|from) (\w+)", section[2], re.MULTILINE):
        if find_spec(package) is None:
            pytest.skip(f"no {package} here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(section[2]):
        # Empty lines, so that a traceback shows the line number in the document.
        padding = "\n" * TEXT.count("\n", 0, section.start(2) + block.start(1))
        exec(compile(padding + block[1], str(DOC), "exec"), namespace)
