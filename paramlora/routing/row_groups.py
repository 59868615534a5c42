"""Run a layer that is not factored once for each adapter, on the rows of that adapter."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..stack.overlay import Change, changed
from ..stack.stack import Stack
from .rows import read_by
from .split import refusal, split


def by_group(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a module's output, computed once for each adapter on the rows of that adapter.

    The arguments are bound to the names of the forward's parameters, because `_dimensions` gives
    the batch dimension of each argument by name. The outputs are joined in the order of the rows.
    """
    stack = next(stack for stack in read_by(module) if stack.state().route is not None)
    route = stack.state().route
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    path = route.paths[stack.key]
    inputs, outputs = _dimensions(module, bound.arguments, path)

    def call(index: int, taken: dict[str, Any]) -> Any:
        with only(module, route.names[index : index + 1] if index >= 0 else ()):
            return type(module).forward(**taken)

    return split(route, path, bound.arguments, inputs, outputs, call)


def only(module: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """Let these adapters alone contribute to a module inside the block, without a route."""
    states = {stack: stack.state() for stack in read_by(module)}
    live: dict[Stack, tuple[str, ...]] = {
        stack: tuple([name for name in state.live if name in names])
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
    dim = 0 if getattr(module, "batch_first", False) else 1
    if isinstance(module, nn.MultiheadAttention):
        mask = given.get("attn_mask")
        if given["query"].dim() == 3 and (mask is None or mask.dim() == 2):  # all rows share it
            return {"query": dim, "key": dim, "value": dim, "key_padding_mask": 0}, (dim, 0)
    elif isinstance(module, nn.RNNBase):
        if isinstance(given["input"], Tensor) and given["input"].dim() == 3:
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
    raise ValueError(refusal(path))
