"""The example of adapters that are trained in one pass."""

import pytest

from experiments.examples import train_many


def test_factors_equal_those_of_separate_trainings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run ends within rounding of the separate trainings, and prints a line a rank."""
    monkeypatch.setattr(train_many, "BATCH", 3)
    assert train_many.run(base_steps=2, steps=4) < 1e-10
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[1:5]] == [
        f"rank {rank}" for rank in train_many.RANKS
    ]
