"""Tables, statistics over seeds, checks, and reports as Markdown."""

import pytest
import torch

from experiments.report.checks import any_failed, check_lines
from experiments.report.document import Picture, markdown
from experiments.report.table import Sample, Table, key_value_table, percent


def test_a_sample_is_mean_and_sample_deviation():
    """Mean and sd are those of the statistics module; equal values are shown as one number."""
    sample = Sample((1.0, 2.0, 4.0))
    assert sample.mean_sd(2) == "2.33 ± 1.53"
    assert sample.min_max(1) == "1.0 to 4.0"
    assert Sample((3.0,)).sd is None
    assert Sample((3.0,)).mean_sd(0) == "3"


def test_intervals_cover_as_often_as_they_say():
    """Of 2,000 samples of 8 normal values, 95 % of intervals have the mean, or a further value."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 9, generator=generator, dtype=torch.float64).tolist()
    samples = [(Sample(tuple(values)), further) for *values, further in draws]
    for of_one in (False, True):
        ends = [sample.bounds(of_one=of_one) for sample, _ in samples]
        hit = [
            low <= (further if of_one else 0.0) <= high
            for (low, high), (_, further) in zip(ends, samples, strict=True)
        ]
        assert 0.935 < sum(hit) / len(hit) < 0.965
    assert Sample((3.0,)).interval(1) == "-"


@pytest.mark.parametrize(
    ("fractions", "text"),
    [((0.5,), "50.00"), ((0.5, 0.5), "50.00"), ((0.5, 0.6), "55.0 ± 7.1")],
)
def test_percent_has_fewer_digits_with_a_spread(fractions, text):
    """One value has two decimal digits, mean ± sd has one."""
    assert percent(fractions) == text


def test_a_table_as_text_is_aligned():
    """The first column is aligned left, others right; short headers end on the last line."""
    table = Table(["digit", "images", "published\nbase"], [["0 tuned", "9", "33"], ["1", "10", ""]])
    assert table.text().split("\n") == [
        "                 published",
        "digit    images       base",
        "0 tuned       9         33",
        "1            10           ",
    ]
    assert Table(["a", "b"], []).text() == "a  b"


def test_a_table_as_markdown_has_one_header_line():
    """A line break in a header becomes a space; columns after the first are aligned right."""
    table = Table(["digit", "published\nbase"], [["0", "33"]])
    assert table.markdown() == "| digit | published base |\n| --- | ---: |\n| 0 | 33 |"
    settings = key_value_table({"hidden": [24, 16], "steps": 30})
    assert settings.rows == [["hidden", "24,16"], ["steps", "30"]]


def test_checks_say_how_many_passed():
    """A line has passed and all fine-tunings; a failure begins with FAILED."""
    checks = [("weights unchanged", [True, True]), ("logits unchanged", [True, False, True])]
    assert check_lines(checks) == [
        "2/2 passed: weights unchanged",
        "FAILED, 2/3 passed: logits unchanged",
    ]
    assert any_failed(checks)
    assert not any_failed(checks[:1])


def test_a_report_as_markdown_has_every_block():
    """Paragraphs, lists, tables and pictures appear in order below their headings."""
    blocks = ["Text.", ["one", "two"], Table(["a"], [["1"]]), Picture(b"", "Caption.", "a.png")]
    text = markdown("Title", "Lead.", {"First": blocks, "Empty": []})
    expected = ["# Title", "Lead.", "## First", "Text.", "- one\n- two", "| a |\n| --- |\n| 1 |"]
    expected += ["![Caption.](a.png)", "Caption.", "## Empty\n"]
    assert text.split("\n\n") == expected


def test_columns_are_aligned_left_as_asked():
    """The columns in `left` are aligned left, in Markdown and in the terminal, all others right."""
    table = Table(["a", "b", "c"], [["x", "y", "10"], ["xx", "yy", "9"]], (0, 1))
    assert table.text() == "a   b    c\nx   y   10\nxx  yy   9"
    assert table.markdown().splitlines()[1] == "| --- | --- | ---: |"
