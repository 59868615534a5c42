"""docs/cuda-graphs.md: its Python blocks compile, and run on a GPU."""

import re
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "cuda-graphs.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_blocks_compile() -> None:
    """The document has code, and each block is valid Python."""
    blocks = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(blocks) == 5
    for block in blocks:
        compile(block, str(DOCUMENT), "exec")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_blocks_run() -> None:
    """The blocks run, each after those before it, and their assertions pass."""
    text = DOCUMENT.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # Empty lines, so that a traceback shows the line number in the document.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(DOCUMENT), "exec"), namespace)
