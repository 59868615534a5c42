"""The tables of the documents are those that `python -m benchmarks tables` makes from docs/data."""

import doctest
import json
import lzma
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.__main__ import main
from benchmarks.tables import documents, registry
from benchmarks.tables.documents import ROOT, marked_names, rewritten, unmarked_measurements
from experiments.harness.rundir import RunDirectory

DOCUMENTS = {str(path.relative_to(ROOT)): path for path in documents.paths()}


@pytest.mark.parametrize("module", [documents, registry])
def test_examples_in_docstrings_run(module):
    """The examples in the docstrings pass."""
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_tables_of_a_document_are_made_from_its_rows(name: str) -> None:
    """Each marked table equals the one that `python -m benchmarks tables` writes."""
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    assert rewritten(text, registry.found_table) == text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_table_of_measurements_is_made_from_rows(name: str) -> None:
    """A table with measurements has a comment with its name."""
    assert list(unmarked_measurements(DOCUMENTS[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_table_ends_with_an_empty_line(name: str) -> None:
    """Without one, Markdown takes the next paragraph for a row."""
    lines = DOCUMENTS[name].read_text(encoding="utf-8").splitlines()
    for line, following in pairwise(lines):
        assert not line.startswith("|") or not following or following.startswith("|"), following


def test_every_function_and_file_of_means_makes_a_table_of_a_document() -> None:
    """Nothing is left over from a table that the documents no longer have."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS.values()]
    shown = {name for text in texts for name in marked_names(text)}
    assert set(registry.makers()) <= shown
    assert {path.stem for path in (registry.DATA / "means").iterdir()} <= shown


def test_the_rows_take_less_than_a_megabyte() -> None:
    """All files of docs/data together have at most 1 MB."""
    files = [path for path in registry.DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000


def test_an_unknown_table_names_both_ways_to_make_it() -> None:
    """The error says to register a function or to write a file."""
    with pytest.raises(KeyError, match=r"no table 'nothing'.*@table.*docs/data/nothing\.csv"):
        registry.found_table("nothing")


def test_a_changed_table_is_found_and_written_again(tmp_path, monkeypatch, capsys) -> None:
    """--check reports a document with another figure; without it the command restores the table."""
    name = "experiments/digits/README.md"
    right = DOCUMENTS[name].read_text(encoding="utf-8")
    path = tmp_path / "README.md"
    path.write_text(right.replace("74.59", "75.59"), encoding="utf-8")
    monkeypatch.setattr(tables, "paths", lambda: [path])
    assert main(["tables", "--check"]) == 1
    assert "differs" in capsys.readouterr().out
    assert main(["tables"]) == 0
    assert path.read_text(encoding="utf-8") == right
    assert main(["tables", "--check"]) == 0


def test_a_run_is_kept_without_the_paths_of_its_machine(tmp_path, monkeypatch, capsys) -> None:
    """--keep compresses the rows, drops the keys in --without and shortens absolute paths."""
    run = RunDirectory.start(tmp_path / "run", {"model": "/models/m"}, {"why": "in /data/x"}, ())
    run.record({"stage": "on", "seed": 1, "curve": [1, 2]})
    monkeypatch.setattr(registry, "DATA", tmp_path / "kept")
    words = ["tables", "--keep", f"one={tmp_path / 'run'}", "--without", "curve,commit"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "kept" / "one")
    kept = registry.kept_run("one")
    assert kept.rows == [{"stage": "on", "seed": 1}]
    assert (kept.settings, kept.environment) == ({"model": "m"}, {"why": "in x"})
    packed = Path(tmp_path / "kept" / "one" / "results.jsonl.xz").read_bytes()
    assert json.loads(lzma.decompress(packed)) == kept.rows[0]


def test_a_table_is_shown(capsys) -> None:
    """--show prints a table as text."""
    assert main(["tables", "--show", "digits-seeds"]) == 0
    assert "scrambled" in capsys.readouterr().out
