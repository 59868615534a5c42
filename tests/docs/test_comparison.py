"""docs/comparison.md: its statements are backed by our tests and the sources of the peers."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
PEERS = {"PEFT": "peft", "LyCORIS": "lycoris_lora", "loralib": "loralib"}
MODULES = {"PEFT": "peft", "LyCORIS": "lycoris", "loralib": "loralib"}
ANSWERS = ("yes", "no", "in part")

TABLE, EVIDENCE = TEXT.split("## Evidence")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("| ") and "---" not in line
]
SECTIONS = {
    section.splitlines()[0]: section.splitlines()[1:] for section in EVIDENCE.split("\n### ")[1:]
}
LINE = re.compile(r"- (\w+) (yes|no|in part)\b(.*)")


def sources(peer: str) -> Path:
    """Return the source folder of a peer, of the version that the document names."""
    named = re.search(rf"\[{peer}\]\([^)]*\)\s+([\d.]+)\b", TABLE)
    assert named, f"no version of {peer} in the document"
    try:
        installed = version(PEERS[peer])
    except PackageNotFoundError:
        pytest.skip(f"no {peer} here")
    if installed != named[1].rstrip("."):
        pytest.skip(f"{peer} is {installed} here, the document is about {named[1]}")
    spec = find_spec(MODULES[peer])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_table_and_sections_agree() -> None:
    """Each row of the table has a section with the same answers, for each column."""
    head, *rows = ROWS
    assert [row[0] for row in rows] == list(SECTIONS)
    for row in rows:
        answers = dict(zip(head[1:], row[1:], strict=True))
        lines = [match for line in SECTIONS[row[0]] if (match := LINE.match(line))]
        assert {match[1]: match[2] for match in lines} == answers
        assert set(answers.values()) <= set(ANSWERS)


def test_tests_of_ours_exist() -> None:
    """Each answer of ours names an existing test, or says that there is nothing to test."""
    for title, lines in SECTIONS.items():
        (line,) = (line for line in lines if line.startswith("- paramlora"))
        named = re.findall(r"`tests/([\w/]+\.py)((?:::\w+)*)`", "\n".join(lines))
        assert named or line.startswith("- paramlora no"), title
        for file, path in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            for name in path.split("::")[1:]:
                assert re.search(rf"\b(?:def|class) {name}\b", text), f"{file}{path}"


@pytest.mark.parametrize("peer", PEERS)
def test_lines_of_peers_exist(peer: str) -> None:
    """Each quoted line of a peer is in the named file, and each missing feature is not found."""
    folder = sources(peer)
    files = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    for title, lines in SECTIONS.items():
        (line,) = (line for line in lines if line.startswith(f"- {peer} "))
        absent = re.search(r": nothing in (?:it|`(.+?)`) says `(.+)`$", line)
        if absent:
            where = [folder / absent[1]] if absent[1] else list(files)
            assert not any(absent[2].lower() in files[path].lower() for path in where), title
        else:
            quoted = re.search(r": `([\w/]+\.py)`: `(.+)`$", line)
            assert quoted, line
            assert quoted[2] in files[folder / quoted[1]], f"{title}: {line}"
