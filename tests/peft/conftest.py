"""Fixtures of the tests of PEFT's folders."""

from pathlib import Path

import pytest

import paramlora as pl
from tests.support.peft_layers import attached


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that paramlora saved, with a low-rank update, a bias and a whole module."""
    pl.save_peft(attached(), tmp_path / "digits")
    return tmp_path / "digits"
