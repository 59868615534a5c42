"""The CSV files of docs/data agree with the tables of the documents that link to them."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.digits.report.report import methods_compared
from experiments.digits.report.tables import seed_table
from experiments.harness.rundir import RunDirectory
from experiments.razor import report as razor
from experiments.sweeps import front, intruders
from experiments.sweeps.remedies import Compared, markdown

DOCS = Path(__file__).parents[2] / "docs"


def rows_of(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file in docs/data."""
    with (DOCS / "data" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table_rows(document: str) -> list[list[str]]:
    """Return the cells of all table rows of a document, without bold type."""
    lines = (DOCS / document).read_text(encoding="utf-8").replace("**", "").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


@pytest.mark.parametrize("data", ["imdb", "spam"])
def test_the_text_study_uses_the_best_rate_of_each_method(data):
    """The table over seeds has the rate with the highest held-out accuracy; ties: the lowest."""
    rates: dict[str, list[tuple[float, float]]] = {}
    for row in rows_of(f"text-{data}-rates.csv"):
        entry = (float(row["held out, %"]), -float(row["rate"]))
        rates.setdefault(row["method"], []).append(entry)
    text = (DOCS / "text-study.md").read_text(encoding="utf-8")
    section = text[text.index("## IMDb") : text.index("## SMS spam")]
    if data == "spam":
        section = text[text.index("## SMS spam") :]
    for method, entries in rates.items():
        line = re.search(rf"^\| {re.escape(method)} \| (\S+) \|", section, re.MULTILINE)
        assert line is not None, method
        assert float(line[1]) == -max(entries)[1], method


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("front-relu/front.md", lambda run: front.markdown(front.Front(run))),
        ("intruders-relu/intruders.md", lambda run: intruders.markdown(intruders.Intruders(run))),
        ("razor/razor.md", razor.markdown),
    ],
)
def test_a_kept_report_is_that_of_its_rows(name: str, made: Callable[[RunDirectory], str]) -> None:
    """Reports in docs/data are made from the rows beside them."""
    path = DOCS / "data" / name
    assert path.read_text(encoding="utf-8") == made(RunDirectory.read(path.parent))


@pytest.mark.parametrize("folder", sorted((DOCS / "data").glob("remedies-*")), ids=str)
def test_the_tables_of_remedies_are_made_of_their_rows(folder: Path) -> None:
    """The kept report is that of the rows beside it, and the guide has its tables."""
    compared = Compared(RunDirectory.read(folder))
    assert (folder / "remedies.md").read_text(encoding="utf-8") == markdown(compared)
    shown = table_rows("forgetting.md")
    for arm in compared.arms:
        for row in compared.arm_table(arm).rows:
            assert list(row) in shown
    longer = {row[0]: row[4:] for row in compared.arm_table("LoRA").rows}
    for name, old, *cells in table_rows("../experiments/sweeps/README.md"):
        assert name not in longer or [*cells] == longer[name], old
    study = (DOCS / "digit-study.md").read_text(encoding="utf-8")
    for name in ("no remedy", "masked cross-entropy"):
        assert longer[name][0].removeprefix("+") in study


def test_the_digit_study_of_the_documents_is_made_of_its_rows():
    """The tables of the study's README are those that its rows in docs/data give."""
    run = RunDirectory.read(DOCS / "data" / "digits-blog")
    _, differences, _, _ = methods_compared(run)
    shown = table_rows("../experiments/digits/README.md")
    for row in differences.rows:
        assert row[1] != "all" or row in shown
    for method, quantity, mean, interval, n, published, inside in seed_table(run).rows:
        if quantity == "all digits, %":
            assert [method, quantity, mean, interval, n, published, inside] in shown


def test_trainings_at_once_are_those_of_the_csv_file() -> None:
    """The table of train-many.md and the README's line have the figures of the CSV file."""
    rows = rows_of("training-at-once.csv")
    assert rows
    shown = table_rows("train-many.md")
    for row in rows:
        cells = [row[key] for key in ("model", "rank", "rows", "adapters")]
        cells += [row["separate_ms"], row["at_once_ms"], f"{row['ratio']} ± {row['sd']}"]
        assert [*cells, row["rounds"]] in shown
    few, many = (
        row["ratio"] for row in rows if row["model"] == "digit MLP" and row["adapters"] == "16"
    )
    readme = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"take {few} of the processor time" in readme
    assert f"10 rows a step, and {many} with 100" in readme
