"""Checks of the fields that several kinds share, and the scale that they give."""

import math
from numbers import Integral
from typing import Any

from torch import Tensor

from .spec import is_finite


def check_rank(spec: Any) -> None:
    """Raise a ValueError where the rank or the alpha of a spec is none; make them Python's own."""
    rank, alpha = spec.rank, spec.alpha
    check_flag(spec, "rank_stabilized")
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if alpha is not None and not is_finite(alpha):
        raise ValueError(f"alpha must be a finite number or None, got {alpha!r}")
    # numpy's numbers, too: as Python's they can be saved.
    object.__setattr__(spec, "rank", int(rank))
    if not isinstance(alpha, int | float | None):
        object.__setattr__(spec, "alpha", float(alpha))


def check_flag(spec: Any, name: str) -> None:
    """Raise a ValueError where a spec's field of that name, if it has one, is no bool."""
    value = getattr(spec, name, False)
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_dim(dim: object) -> None:
    """Raise a ValueError where a dimension is not 0 or 1."""
    if type(dim) is not int or dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim!r}")


def scaling_of(spec: Any) -> float:
    """Return alpha/r, or alpha/√r where the spec is `rank_stabilized`; alpha None means r."""
    alpha = spec.rank if spec.alpha is None else spec.alpha
    return alpha / (math.sqrt(spec.rank) if spec.rank_stabilized else spec.rank)


def low_rank_refusal(weight: Tensor) -> str | None:
    """Return why a tensor has no low-rank update, None where it has."""
    if weight.dim() < 2:
        return f"a low-rank update needs two dimensions, it has {weight.dim()}; use Delta()"
    return None
