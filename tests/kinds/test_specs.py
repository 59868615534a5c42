"""Specs refuse unknown settings and settings of the wrong type."""

from collections.abc import Callable

import pytest

import paramlora as pl


def test_dropout_is_not_a_setting() -> None:
    """Specs have no dropout: dropout of a layer's input is not a function of its weight."""
    for spec in (pl.LoRA, pl.Delta):
        make: Callable[..., pl.kinds.Spec] = spec
        with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
            make(dropout=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pl.LoRA(4, rank_stabilized="no"),  # type: ignore[arg-type]
        lambda: pl.DoRA(2, exact_gradient="no"),  # type: ignore[arg-type]
        lambda: pl.LoKr(2, decompose_both=1),  # type: ignore[arg-type]
    ],
)
def test_flags_must_be_bools(make: Callable[[], pl.kinds.Spec]) -> None:
    """A flag that is not a bool raises ValueError: the string "no" would count as true."""
    with pytest.raises(ValueError, match="must be True or False, got"):
        make()
