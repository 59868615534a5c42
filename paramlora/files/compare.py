"""Compare a given state dict with the expected one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError


def compare(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise a CheckpointError that lists every difference in keys and shapes.

    One message has all missing keys, then all unexpected keys, then each tensor of another shape:

        … does not fit: missing fc1.weight.A; unexpected fc1.A; fc2.weight.B: expected (3, 2), found
        (3, 4)

    Shapes are compared for tensors in `expected` only, because a state dict may also have other
    entries (a module's extra state). Dtypes may differ: values are cast when they are copied.

    Args:
        state: the given values, by key.
        expected: the values that the model needs, by key. Tensors may be on the meta device.
        what: a description of the given state, for the message.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    for key, tensor in expected.items():
        if key in state and isinstance(tensor, Tensor):
            found, shape = _shape_or_problem(state[key], tensor), tuple(tensor.shape)
            if found != shape:
                problems.append(f"{key}: expected {shape}, found {found}")
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def _shape_or_problem(value: Any, expected: Tensor) -> tuple[int, ...] | str:
    """Return a value's shape, or a description of it if it has nothing to copy."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} instead of a tensor"
    if value.is_meta and not expected.is_meta:
        return "a tensor on the meta device, which has no data"
    return tuple(value.shape)
