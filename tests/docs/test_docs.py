"""The examples of docs/transformers.md, distributed.md, export.md and quantized.md run unchanged.

A Python block runs after those before it in its section; a block that begins with a file name in a
comment is written to that file instead. The commands of a `sh` block run unchanged, except for the
words that the reader replaces: MODEL, DIR and FILE.csv.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import quantized, tiny_text
from tests.support.processes import needs_sharding, run_python, torchrun

pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CASES = [
    pytest.param(
        name,
        match[1],
        id=f"{name} {match[1]}",
        marks=[needs_sharding] if match[1] in ("FSDP2", "The studies") else [],
    )
    for name in ("transformers.md", "distributed.md", "export.md", "quantized.md")
    for match in SECTION.finditer((ROOT / "docs" / name).read_text(encoding="utf-8"))
    if BLOCK.search(match[2]) or name != "quantized.md"
]
# Options that make a study short.
SHORT = "--epochs 1 --seeds 1 --batch 8 --device cpu --no-forgetting --max-length 16"


def section_of(name: str, title: str) -> tuple[str, str, int]:
    """Return the text of a document, the text of a section, and the offset of the section."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    match = next(m for m in SECTION.finditer(text) if m[1] == title)
    return text, match[2], match.start(2)


@pytest.fixture(scope="module")
def reader_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a reader: a checkpoint, IMDb as JSON lines, a table of texts."""
    folder = tmp_path_factory.mktemp("reader")
    tiny_text.checkpoint(folder / "bert")
    tiny_text.write_jsonl(folder / "train.jsonl", tiny_text.texts(40, 0))
    tiny_text.write_jsonl(folder / "test.jsonl", tiny_text.texts(16, 1))
    rows = [f'"{row["text"]}",{row["label"]}' for row in tiny_text.texts(40, 2)]
    (folder / "own.csv").write_text("\n".join(["review,verdict", *rows, ""]))
    return folder


def run_command(line: str, reader_files: Path) -> None:
    """Run a command on the files of the reader in this process, as a new one takes seconds."""
    words = {
        "MODEL": reader_files / "bert",
        "DIR": reader_files,
        "FILE.csv": reader_files / "own.csv",
    }
    parts = [str(words.get(part, part)) for part in shlex.split(line)]
    program, *arguments = parts
    if "experiments" in arguments:
        arguments += SHORT.split()
        if "--targets" not in arguments:
            arguments += ["--targets", "*.query,*.value"]
    {"python": run_python, "torchrun": lambda *given: torchrun(given)}[program](*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "title"), CASES)
def test_examples(
    name: str, title: str, reader_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a section run, and their assertions pass."""
    text, section, start = section_of(name, title)
    if "torchrun" in section and not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    if "torchao" in section or "BitsAndBytesConfig" in section:
        quantized.imported("torchao" if "torchao" in section else "bitsandbytes")
    blocks = list(BLOCK.finditer(section))
    assert blocks, f"no block in {title}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block[1] == "sh":
            for line in block[2].splitlines():
                run_command(line, reader_files)
        elif file := re.match(r"# (\w+\.py)\n", block[2]):
            (tmp_path / file[1]).write_text(block[2])
        else:
            # Empty lines, so that a traceback shows the line number in the document.
            padding = "\n" * text.count("\n", 0, start + block.start(2))
            exec(compile(padding + block[2], name, "exec"), namespace)
