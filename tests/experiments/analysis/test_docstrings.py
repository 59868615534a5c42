"""The examples in the docstrings of experiments/analysis and experiments/report."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "analysis.evaluate",
        "analysis.insight",
        "analysis.task_metrics",
        "report.checks",
        "report.document",
        "report.table",
    ],
)
def test_examples_in_docstrings_run(name):
    """The examples give the output that they show."""
    result = doctest.testmod(importlib.import_module(f"experiments.{name}"))
    assert result.attempted
    assert not result.failed
