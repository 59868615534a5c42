"""Run a layer that is not factored once for each adapter, on the rows of that adapter."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..site.overlay import Change, changed
from ..site.stack import Stack
from .rows import Route, read_by


def by_group(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a module's output, computed once for each adapter on the rows of that adapter.

    The arguments are bound to the names of the forward's parameters, because `_dimensions` gives
    the batch dimension of each argument by name. The outputs are joined in the order of the rows.
    """
    stack = next(stack for stack in read_by(module) if stack.state().route is not None)
    route = stack.state().route
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    inputs, outputs = _dimensions(module, bound.arguments, route.paths[stack.key])
    sizes = {
        tensor.shape[dim]
        for name, dim in inputs.items()
        for tensor in _tensors_in(bound.arguments.get(name))
    }
    # If one input has more rows than another, the larger number cannot be right.
    for size in sorted(sizes):
        route = route.repeated(size, stack)
    found = []
    for index, rows in route.groups:
        taken = dict(bound.arguments)
        for name, dim in inputs.items():
            if taken.get(name) is not None:
                taken[name] = _mapped(taken[name], _select(dim, rows))
        with _only(module, None if index < 0 else route.names[index]):
            found.append(type(module).forward(**taken))
    return _joined(found, outputs, route)


def _only(module: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """Let one adapter, or none, contribute to a module inside the block, without a route."""
    states = {stack: stack.state() for stack in read_by(module)}
    live: dict[Stack, tuple[str, ...]] = {
        stack: (name,) if name is not None and name in state.live else ()
        for stack, state in states.items()
    }
    if torch.compiler.is_compiling():
        return _traced(live)
    changes = {}
    for stack, state in states.items():
        numbers = stack.numbers
        changes[stack] = Change(
            {numbers[other]: other in live[stack] for other in stack.names},
            {numbers[other]: strength for other, strength in (state.strengths or {}).items()},
            None,
        )
    return changed(changes)


@contextmanager
def _traced(live: dict[Stack, tuple[str, ...]]) -> Iterator[None]:
    before = [(stack, stack.traced_live, stack.traced_route) for stack in live]
    for stack, names in live.items():
        stack.traced_live, stack.traced_route = names, None
    try:
        yield
    finally:
        for stack, outer, route in before:
            stack.traced_live, stack.traced_route = outer, route


def _dimensions(module: nn.Module, given: dict[str, Any], path: str) -> tuple[Any, Any]:
    """Return the batch dimensions of a module's arguments, by name, and of its outputs.

    For an LSTM without `batch_first`, for example: {"input": 1, "hx": 1} and (1, (1, 1)), since it
    returns its output (time, batch, m) and the pair of states (layers, batch, m).
    """
    if isinstance(module, nn.MultiheadAttention):
        if given["query"].dim() == 3 and (given.get("attn_mask") is None or _is_shared(given)):
            dim = 0 if module.batch_first else 1
            return {"query": dim, "key": dim, "value": dim, "key_padding_mask": 0}, (dim, 0)
    elif isinstance(module, nn.RNNBase):
        if isinstance(given["input"], Tensor) and given["input"].dim() == 3:
            dim = 0 if module.batch_first else 1
            return {"input": dim, "hx": 1}, (dim, (1, 1) if isinstance(module, nn.LSTM) else 1)
    elif isinstance(module, nn.EmbeddingBag):
        if given["input"].dim() == 2:
            return {"input": 0, "per_sample_weights": 0}, 0
    elif isinstance(module, nn.Bilinear):
        return {"input1": 0, "input2": 0}, 0
    else:
        spatial = getattr(module, "kernel_size", None)
        if spatial is None or given["input"].dim() == len(spatial) + 2:
            return {"x" if "x" in given else "input": 0}, 0
    raise ValueError(
        f"cannot route the rows of this call of {path!r}: give it a batch "
        "as one dense tensor with a batch dimension, without a mask or offsets for each row"
    )


def _is_shared(given: dict[str, Any]) -> bool:
    return given["attn_mask"].dim() == 2


def _select(dim: int, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(dim, rows.to(tensor.device))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(part, function) for part in value)
    return function(value)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [] if value is None else [value]


def _joined(parts: list[Any], dims: Any, route: Route) -> Any:
    """Join the outputs of the groups, in the order of the rows."""
    if isinstance(dims, tuple):
        return tuple(_joined([part[i] for part in parts], dim, route) for i, dim in enumerate(dims))
    if parts[0] is None:
        return None
    return torch.cat(parts, dims).index_select(dims, route.on("back", parts[0].device))
