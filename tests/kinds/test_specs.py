"""Specs refuse unknown settings and settings of the wrong type."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramlora as pl
from paramlora import LoRA
from tests.support.helpers import Row, refuses
from tests.support.models import plain


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


SPECS: dict[str, Row] = {
    "rank 0": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=0)),
        ValueError,
        "rank must be a whole number of at least 1, got 0",
    ),
    "a negative rank": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=-4)),
        ValueError,
        "rank must be a whole number of at least 1, got -4",
    ),
    "a boolean rank": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=True)),
        ValueError,
        "rank must be a whole number of at least 1, got True",
    ),
    "a broken rank": (
        plain,
        lambda m: pl.attach(m, LoRA(rank=2.5)),  # type: ignore[arg-type]
        ValueError,
        "rank must be a whole number of at least 1, got 2.5",
    ),
    "an infinite alpha": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha=math.inf)),
        ValueError,
        "alpha must be a finite number or None, got inf",
    ),
    "an alpha that is no number": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha=math.nan)),
        ValueError,
        "alpha must be a finite number or None, got nan",
    ),
    "a boolean alpha": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha=True)),
        ValueError,
        "alpha must be a finite number or None, got True",
    ),
    "an alpha of letters": (
        plain,
        lambda m: pl.attach(m, LoRA(alpha="8")),  # type: ignore[arg-type]
        ValueError,
        "alpha must be a finite number or None, got '8'",
    ),
    "an unknown init": (
        plain,
        lambda m: pl.attach(m, LoRA(init="xavier")),
        ValueError,
        "init must be one of 'kaiming', 'gaussian', 'gaussian/sqrt_r', 'orthogonal'[...] or a "
        "callable, got 'xavier'",
    ),
}


@pytest.mark.parametrize("row", SPECS.values(), ids=SPECS.keys())
def test_settings(row: Row) -> None:
    """A bad attach says what was given, what there is and what to do, and changes nothing."""
    make, call, error, message = row
    refuses(make(), call, error, message)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class TestInputs:
    def test_a_typo_in_exclude_is_refused(self) -> None:
        """An exclude that matches nothing is an error that names what there is."""
        with pytest.raises(
            pl.TargetError, match=r"exclude= matches nothing: no '2.wieght'.*2.weight"
        ):
            pl.attach(net(), pl.LoRA(2), exclude="2.wieght")

    def test_an_init_that_returns_is_refused(self) -> None:
        """An init that returns a tensor, and leaves A as it was, is an error."""
        model = net()
        with pytest.raises(ValueError, match=r"in place, as torch.nn.init.normal_ does"):
            pl.attach(model, pl.LoRA(2, init=torch.randn_like))
        assert not pl.summary(model).sites

    def test_numbers_of_numpy(self) -> None:
        """numpy's numbers are numbers, and become Python's, which a file can hold."""
        numpy = pytest.importorskip("numpy")
        spec = pl.LoRA(numpy.int64(4), numpy.float32(2))
        assert (type(spec.rank), type(spec.alpha), spec) == (int, float, pl.LoRA(4, 2.0))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_strength_that_is_no_number(self, bad: float) -> None:
        """Strengths that are not finite are refused, given as a number or as a tensor."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        for factor in (bad, torch.tensor(bad)):
            with pytest.raises(ValueError, match="finite number"):
                pl.scale(model, factor)

    def test_names_in_a_list(self) -> None:
        """A list of names is refused in words: names are separate arguments."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        with pytest.raises(TypeError, match=r"separate arguments.*\['default'\]"):
            pl.disable(model, ["default"])  # type: ignore[arg-type]

    def test_assigning_a_tensor(self) -> None:
        """Assigning to an adapted tensor is refused with what to do in its place."""
        model = net()
        pl.attach(model, pl.LoRA(2))
        with pytest.raises(NotImplementedError, match="load_base_state_dict, or detach"):
            model[0].weight = torch.zeros(3, 4)
