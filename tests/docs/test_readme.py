"""The Python blocks of the README and of some documents run unchanged."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = (
    "README.md",
    "docs/kinds.md",
    "docs/train-many.md",
    "docs/combining.md",
    "docs/beyond-linear.md",
    "docs/coming-from-peft.md",
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python blocks of a document run, from top to bottom, as one program."""
    document = ROOT / name
    text = document.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"no Python block in {document}"
    if "\nimport peft\n" in text:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        # Empty lines, so that a traceback shows the line number in the document.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(document), "exec"), namespace)
