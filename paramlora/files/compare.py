"""Comparing a given state dict with an expected one, and hashing tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError


def compare(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise a CheckpointError where keys or shapes differ; every difference is listed."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    wrong = [
        f"{key}: expected {tuple(tensor.shape)}, found {found}"
        for key, tensor in expected.items()
        if key in state
        and isinstance(tensor, Tensor)
        and (found := shown(state[key], tensor)) != tuple(tensor.shape)
    ]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    problems += wrong
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def shown(value: Any, expected: Tensor) -> tuple[int, ...] | str:
    """Return a value's shape, or what it is where it is no tensor to copy from."""
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}"
    if value.is_meta and not expected.is_meta:
        return "a tensor on the meta device, which has no data"
    return tuple(value.shape)
