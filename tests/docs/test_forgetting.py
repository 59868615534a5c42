"""docs/forgetting.md: its Python blocks run, and its commands and options exist."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.__main__ import parser
from experiments.digits.settings import DigitSettings
from experiments.harness.settings import options

GUIDE = Path(__file__).parents[2] / "docs" / "forgetting.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python blocks of the guide run, each after those before it."""
    text = GUIDE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        # Empty lines, so that a traceback shows the line number in the guide.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(GUIDE), "exec"), namespace)
    assert (tmp_path / "mine.html").stat().st_size > 10_000


def test_commands_and_options() -> None:
    """Each command parses, and each option in the table of remedies is a setting."""
    text = GUIDE.read_text(encoding="utf-8")
    commands = re.findall(r"`python -m experiments ([a-z].*?)`", text)
    assert len(commands) >= 5
    for command in commands:
        assert parser().parse_args(command.split())
    known = {"--" + name.replace("_", "-") for name in options(DigitSettings)}
    table = text[text.index("| option |") : text.index("## What an adapter did")]
    used = set(re.findall(r"--[a-z][a-z-]+", table))
    assert used - known <= {"--floor", "--base-seeds", "--selection-bases", "--jobs"}
    assert len(used) > 10


@pytest.mark.parametrize("study", ["digits", "sweeps", "tasks", "text"])
def test_the_readme_of_a_study_has_its_parts_and_commands_that_exist(study: str) -> None:
    """Each study's README answers the same questions in 50 lines, and its commands parse."""
    text = (GUIDE.parents[1] / "experiments" / study / "README.md").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if not line.startswith("<!--")]) <= 50
    parts = re.findall(r"^\*\*(.*?)\.\*\*", text, re.MULTILINE)
    assert parts == ["Question", "Data", "Command", "Time", "Result", "Next"]
    commands = re.findall(r"^    python -m experiments (.*)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        assert parser().parse_args(shlex.split(command))
