"""Checks of the fields that several kinds share, and the scale s that follows from them."""

import math
from numbers import Integral
from typing import Any

from torch import Tensor

from .spec import is_finite


def check_rank(spec: Any) -> None:
    """Check rank, alpha and rank_stabilized; convert NumPy scalars to Python numbers."""
    alpha = spec.alpha
    check_flag(spec, "rank_stabilized")
    check_whole_number(spec, "rank", 1)
    if alpha is not None and not is_finite(alpha):
        raise ValueError(f"alpha must be a finite number or None, got {alpha!r}")
    if not isinstance(alpha, int | float | None):
        object.__setattr__(spec, "alpha", float(alpha))


def check_whole_number(spec: Any, name: str, least: int) -> None:
    """Check that the field `name` is a whole number of at least `least`; convert it to an int."""
    value = getattr(spec, name)
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    # A file stores fields as JSON, which has no NumPy numbers.
    object.__setattr__(spec, name, int(value))


def check_flag(spec: Any, name: str) -> None:
    """Check that the field `name` of a spec is a bool."""
    value = getattr(spec, name)
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_dropout(spec: Any) -> None:
    """Check that the field `dropout` is a probability below 1; convert it to a float."""
    if not is_finite(spec.dropout) or not 0 <= spec.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {spec.dropout!r}")
    object.__setattr__(spec, "dropout", float(spec.dropout))


def check_dim(dim: object) -> None:
    """Check that a dimension is 0 or 1."""
    if type(dim) is not int or dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim!r}")


def scaling_of(spec: Any) -> float:
    """Return s = alpha/r, or alpha/√r if `rank_stabilized`; alpha is r if it is None."""
    alpha = spec.rank if spec.alpha is None else spec.alpha
    return alpha / (math.sqrt(spec.rank) if spec.rank_stabilized else spec.rank)


def low_rank_refusal(weight: Tensor) -> str | None:
    """Return why a tensor cannot have a low-rank update, or None if it can."""
    if weight.dim() < 2:
        return f"a low-rank update needs two dimensions, it has {weight.dim()}; use Delta()"
    return None


def rank_limit(asked: str, rank: int, matrix: Tensor) -> str | None:
    """Return why a matrix, (…, out, in), cannot have the rank that `asked` needs, or None."""
    largest = min(matrix.shape[-2:])
    if rank > largest:
        return (
            f"{asked} needs a rank of at most {largest}, the smaller side of the matrix; got {rank}"
        )
    return None
