"""Run a function once for each adapter of a route, on the rows of that adapter."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def split(
    route: Any,
    path: str,
    given: Mapping[str, Any],
    inputs: Mapping[str, int],
    outputs: Any,
    call: Callable[[int, dict[str, Any]], Any],
) -> Any:
    """Return the outputs of `call` for each adapter, joined in the order of the rows.

    Args:
        route: a `Route`.
        path: the path of the adapted tensor, for messages.
        given: the arguments of the call by name; tensors, tuples of tensors, or anything else.
        inputs: the batch dimension of those that have one.
        outputs: the batch dimension of the output; a tuple if there are several.
        call: gets the index of an adapter, −1 for none, and the arguments for its rows.
    """
    sizes = {
        tensor.shape[dim] for name, dim in inputs.items() for tensor in _tensors_in(given.get(name))
    }
    # If one input has more rows than another, the larger number cannot be right.
    for size in sorted(sizes):
        route = route.repeated(size, path)
    found = []
    for index, rows in route.groups:
        taken, done = dict(given), {}
        for name, dim in inputs.items():
            value = taken.get(name)
            if value is not None:
                # Self-attention tests whether query, key and value are one object.
                key = id(value), dim
                if key not in done:
                    done[key] = _selected(value, dim, rows)
                taken[name] = done[key]
        found.append(call(index, taken))
    return _joined(found, outputs, route)


def refusal(path: str) -> str:
    """Return the message for a call whose arguments cannot be divided into rows."""
    return (
        f"cannot route the rows of this call of {path!r}: give it a batch as one dense tensor with "
        "a batch dimension, without a mask or offsets for each row"
    )


def _selected(value: Any, dim: int, rows: Tensor) -> Any:
    """Return these rows of a tensor, or of each tensor in a tuple."""
    if isinstance(value, tuple):
        return tuple(_selected(part, dim, rows) for part in value)
    return value.index_select(dim, rows.to(value.device))


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [] if value is None else [value]


def _joined(parts: list[Any], dims: Any, route: Any) -> Any:
    """Join the outputs of the groups, in the order of the rows."""
    if isinstance(dims, tuple):
        return tuple(_joined([part[i] for part in parts], dim, route) for i, dim in enumerate(dims))
    if parts[0] is None:
        return None
    return torch.cat(parts, dims).index_select(dims, route.on("back", parts[0].device))
