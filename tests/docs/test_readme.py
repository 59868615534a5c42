"""The Python blocks of the README and of some documents run unchanged, and print what is shown."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The output of a block, if the document shows it right below.
OUTPUT = re.compile(r"\n*```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = (
    "README.md",
    "docs/start.md",
    "docs/targets.md",
    "docs/adapters.md",
    "docs/save.md",
    "docs/exact.md",
    "docs/kinds.md",
    "docs/train-many.md",
    "docs/combining.md",
    "docs/beyond-linear.md",
    "docs/diffusers.md",
    "docs/trl.md",
    "docs/coming-from-peft.md",
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All Python blocks of a document run as one program, with the output shown below a block."""
    document = ROOT / name
    text = document.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"no Python block in {document}"
    for library in ("peft", "diffusers", "loralib", "trl"):
        if f"\nimport {library}\n" in text:
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        capsys.readouterr()
        # Empty lines, so that a traceback shows the line number in the document.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(document), "exec"), namespace)
        shown = OUTPUT.match(text, block.end())
        assert shown is None or capsys.readouterr().out == shown[1]


def test_the_readme_is_short() -> None:
    """It has at most 500 words."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 500
