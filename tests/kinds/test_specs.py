"""Settings of specs: the accepted ones, and the error of each invalid one."""

import math
from collections.abc import Callable

import pytest
import torch

import paramlora as pl
from paramlora import IA3, DoRA, LoHa, LoKr, LoRA
from paramlora.kinds.fields import rank_limit
from tests.support.helpers import pattern

RANK = "rank must be a whole number of at least 1, got "
ALPHA = "alpha must be a finite number or None, got "
DROPOUT = "dropout must be at least 0 and below 1, got "
BATCH_DIMS = "batch_dims must be a whole number of at least 0, got "
# A function that makes an invalid spec, and the message of its ValueError.
INVALID: dict[str, tuple[Callable[[], pl.kinds.Spec], str]] = {
    "rank 0": (lambda: LoRA(rank=0), RANK + "0"),
    "negative rank": (lambda: LoRA(rank=-4), RANK + "-4"),
    "boolean rank": (lambda: LoRA(rank=True), RANK + "True"),
    "fractional rank": (lambda: LoRA(rank=2.5), RANK + "2.5"),  # type: ignore[arg-type]
    "infinite alpha": (lambda: LoRA(alpha=math.inf), ALPHA + "inf"),
    "alpha NaN": (lambda: LoRA(alpha=math.nan), ALPHA + "nan"),
    "alpha 0 of a start that divides by it": (
        lambda: LoRA(alpha=0, init="pissa"),
        "init='pissa' needs an alpha above 0, got 0",
    ),
    "boolean alpha": (lambda: LoRA(alpha=True), ALPHA + "True"),
    "alpha a string": (lambda: LoRA(alpha="8"), ALPHA + "'8'"),  # type: ignore[arg-type]
    "unknown init": (
        lambda: LoRA(init="xavier"),
        "init must be one of 'kaiming', 'gaussian', 'gaussian/sqrt_r', 'uniform/sqrt_r', "
        "'orthogonal'[...] or a callable, got 'xavier'",
    ),
    "negative alpha for pissa": (
        lambda: LoRA(rank=3, alpha=-1, init="pissa"),
        "init='pissa' needs an alpha above 0, got -1",
    ),
    # The string "no" would count as true.
    "rank_stabilized a string, without a rank": (
        lambda: LoKr(rank=None, rank_stabilized="no"),  # type: ignore[arg-type]
        "rank_stabilized must be True or False, got 'no'",
    ),
    "rank_stabilized a string": (
        lambda: LoRA(4, rank_stabilized="no"),  # type: ignore[arg-type]
        "rank_stabilized must be True or False, got 'no'",
    ),
    "transposed a number": (
        lambda: LoRA(2, transposed=1),  # type: ignore[arg-type]
        "transposed must be True or False, got 1",
    ),
    "negative batch_dims": (lambda: LoRA(2, batch_dims=-1), BATCH_DIMS + "-1"),
    "boolean batch_dims": (lambda: LoRA(2, batch_dims=True), BATCH_DIMS + "True"),
    "batch_dims a float": (
        lambda: LoRA(2, batch_dims=1.0),  # type: ignore[arg-type]
        BATCH_DIMS + "1.0",
    ),
    "dropout of all": (lambda: LoRA(dropout=1), DROPOUT + "1"),
    "negative dropout": (lambda: LoRA(dropout=-0.1), DROPOUT + "-0.1"),
    "dropout NaN": (lambda: LoRA(dropout=math.nan), DROPOUT + "nan"),
    "boolean dropout": (lambda: LoRA(dropout=True), DROPOUT + "True"),
    "DoRA, rank 0": (lambda: DoRA(rank=0), RANK + "0"),
    "DoRA, alpha NaN": (lambda: DoRA(alpha=math.nan), ALPHA + "nan"),
    "DoRA, unknown init": (
        lambda: DoRA(init="kaimin"),
        "init must be one of [...] or a callable, got 'kaimin'",
    ),
    "DoRA, dim 2": (lambda: DoRA(dim=2), "dim must be 0 or 1, got 2"),
    "DoRA, boolean dim": (lambda: DoRA(dim=True), "dim must be 0 or 1, got True"),
    "DoRA, exact_gradient a string": (
        lambda: DoRA(2, exact_gradient="no"),  # type: ignore[arg-type]
        "exact_gradient must be True or False, got 'no'",
    ),
    "LoHa, rank 0": (lambda: LoHa(rank=0), RANK + "0"),
    "LoKr, negative rank": (lambda: LoKr(rank=-1), RANK + "-1"),
    "LoKr, alpha without a rank": (
        lambda: LoKr(rank=None, alpha=2),
        "[...]so rank=None allows no alpha; got 2",
    ),
    "LoKr, factor 0": (
        lambda: LoKr(factor=0),
        "factor must be a whole number of at least 1, or -1, got 0",
    ),
    "LoKr, decompose_both a number": (
        lambda: LoKr(2, decompose_both=1),  # type: ignore[arg-type]
        "decompose_both must be True or False, got 1",
    ),
    "IA3, negative dim": (lambda: IA3(dim=-1), "dim must be 0 or 1, got -1"),
}


@pytest.mark.parametrize(("make", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_settings(make: Callable[[], pl.kinds.Spec], message: str) -> None:
    """An invalid setting raises ValueError when the spec is made."""
    with pytest.raises(ValueError, match=pattern(message)):
        make()


def test_defaults() -> None:
    """LoRA has rank 8 by default, and alpha = rank, so that the scale is 1."""
    spec = LoRA()
    factors = spec.create(torch.zeros(16, 12))
    assert (spec.rank, spec.alpha, factors["A"].shape) == (8, None, (8, 12))
    assert spec.scaling == 1


def test_default_ranks() -> None:
    """The other kinds with a rank have rank 8 by default, too."""
    kinds = (DoRA, LoHa, LoKr, pl.HiRA, pl.LoRAXS)
    assert [kind().rank for kind in kinds] == [8] * len(kinds)


def test_rank_limit_of_a_batch() -> None:
    """The limit of a rank is the smaller side of each matrix, however many matrices there are."""
    assert rank_limit("this", 4, torch.zeros(2, 5, 4)) is None
    assert "at most 4" in str(rank_limit("this", 5, torch.zeros(9, 5, 4)))


def test_only_lora_has_dropout() -> None:
    """LoRA takes a dropout; a kind whose update has no input to drop says that it has none."""
    assert (LoRA(dropout=0).dropout, LoRA(dropout=0.5).dropout) == (0.0, 0.5)
    for spec in (DoRA, pl.Delta):
        make: Callable[..., pl.kinds.Spec] = spec
        with pytest.raises(TypeError, match="no argument 'dropout': this kind has no dropout"):
            make(dropout=0.1)


def test_positional_settings() -> None:
    """LoRA and LoRA-XS take rank and alpha by position; every other setting needs its name."""
    for kind in (LoRA, pl.LoRAXS):
        make: Callable[..., pl.kinds.Spec] = kind
        assert make(2, 4) == kind(rank=2, alpha=4)
        with pytest.raises(TypeError, match="positional argument"):
            make(2, 4, True)


def test_numpy_scalars() -> None:
    """NumPy scalars are accepted and become Python numbers, which a file can hold."""
    numpy = pytest.importorskip("numpy")
    spec = pl.LoRA(numpy.int64(4), numpy.float32(2))
    assert (type(spec.rank), type(spec.alpha), spec) == (int, float, pl.LoRA(4, 2.0))
