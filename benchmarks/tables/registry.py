"""The functions that make tables, and the rows in docs/data that they read."""

import csv
import importlib
import json
import lzma
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.rundir import Row, RunDirectory, replace_file
from experiments.report.table import Table

DATA = Path(__file__).parents[2] / "docs" / "data"
Maker = Callable[[], Table]
MAKERS: dict[str, Maker] = {}


def table(name: str) -> Callable[[Maker], Maker]:
    """Register a function without arguments that returns the table `name` of a document."""

    def registered(make: Maker) -> Maker:
        if name in MAKERS:
            raise ValueError(f"there are two functions for the table {name!r}")
        MAKERS[name] = make
        return make

    return registered


def makers() -> dict[str, Maker]:
    """Return the registered functions by name, those of all files of this folder."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return MAKERS


def found_table(name: str) -> Table:
    """Return the table that the function `name` makes, or that the file NAME.csv has.

    Raises:
        KeyError: there is neither a function nor a file of this name.
    """
    if name in makers():
        return makers()[name]()
    try:
        return table_of_csv(name)
    except FileNotFoundError:
        raise KeyError(
            f"no table {name!r}: register a function by @table({name!r}) in benchmarks/tables/, "
            f"or write docs/data/{name}.csv"
        ) from None


def csv_path(name: str) -> Path:
    """Return the path of NAME.csv in docs/data, or in docs/data/means, which has no raw rows."""
    path = DATA / f"{name}.csv"
    return path if path.exists() else DATA / "means" / path.name


def csv_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of NAME.csv by the names of its columns."""
    with open(csv_path(name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def json_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of docs/data/NAME.jsonl.xz."""
    text = lzma.decompress((DATA / f"{name}.jsonl.xz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows with equal values of some keys, by these values, in order of appearance.

    >>> grouped([{"a": 1, "n": 1}, {"a": 2, "n": 2}, {"a": 1, "n": 3}], "a")
    {(1,): [{'a': 1, 'n': 1}, {'a': 1, 'n': 3}], (2,): [{'a': 2, 'n': 2}]}
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def kept_run(name: str) -> RunDirectory:
    """Return the run that is kept in docs/data/NAME."""
    return RunDirectory.read(DATA / name)


def table_of_csv(name: str) -> Table:
    """Return the cells of NAME.csv as a table; columns of numbers are aligned right."""
    with open(csv_path(name), encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    return aligned(head, [[minus(cell) for cell in row] for row in rows])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose columns are aligned right if none of their cells starts with a letter.

    >>> aligned(["a", "b", "c"], [["x", "r", "1"], ["y", "r, s", "−2 ± 1"]]).left
    (0, 1)
    """
    words = [any(re.match(r"\W*[^\W\d]", row[i]) for row in rows) for i in range(len(head))]
    return Table(head, rows, tuple(i for i, word in enumerate(words) if word or not i))


def minus(cell: str) -> str:
    """Return a cell with a minus sign in place of the hyphen of each negative number.

    >>> minus("-0.3 ± 1.2"), minus("1.0 (-2 to -1)"), minus("6e-07"), minus("r-1")
    ('−0.3 ± 1.2', '1.0 (−2 to −1)', '6e-07', 'r-1')
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "−", cell)


def with_minus(found: Table) -> Table:
    """Return a table with minus signs in all cells but those of the header."""
    return Table(found.head, [list(map(minus, row)) for row in found.rows], found.left)


def keep_run(name: str, folder: Path, without: Sequence[str] = ()) -> Path:
    """Copy a run to docs/data/NAME with compressed rows; return the folder.

    Args:
        name: the name of the copy.
        folder: the run's folder.
        without: keys of rows to leave out.
    """
    run, target = RunDirectory.read(folder), DATA / name
    rows = [{key: row[key] for key in row if key not in without} for row in run.rows]
    lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
    replace_file(target / "results.jsonl.xz", packed)
    for part in ("settings.json", "environment.json"):
        values = json.loads((folder / part).read_text(encoding="utf-8"))
        text = json.dumps(without_paths(values), indent=2) + "\n"
        replace_file(target / part, text.encode())
    return target


def without_paths(value: Any) -> Any:
    """Return JSON values with the last part of each absolute path in place of the path.

    >>> without_paths({"why": "on disk, in /home/me/mnist", "n": [1]})
    {'why': 'on disk, in mnist', 'n': [1]}
    """
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(?<!\S)/\S*/", "", value)
    return value
