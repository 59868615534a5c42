"""Inside `routed`: the tensor that code gets which reads an adapted tensor itself.

Each row of a batch has a tensor of its own there, so no ordinary tensor can be returned. A
`RoutedTensor` has the dtype, shape and device of W and no values. It has three kinds of readers:

- Code that asks for the dtype, the device or the shape gets an answer. T5 casts its input to
  `self.wo.weight.dtype`.
- torch's fused encoder layer and fused attention read the weights of the modules inside them
  without calling these. They leave the fused path if a weight has a `__torch_function__`.
- `F.multi_head_attention_forward` gets `out_proj.weight` of an attention. It runs once for each
  adapter, on the rows of that adapter.

Every other function raises.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..stack.stand_in import StandIn
from .split import refusal, split


class RoutedTensor(StandIn):
    """A stand-in for an adapted tensor inside `routed`.

    Attributes:
        route: the `Route`.
        path: the path of the site.
        build: returns W' for the index of an adapter, −1 for none.
    """

    route: Any
    path: str
    build: Callable[[int], Tensor]

    @staticmethod
    def refusal(read: Any, asked: str) -> str:
        return (
            f"{'a tensor' if read is None else repr(read.path)} was read inside of routed(), where "
            "each row of a batch has a tensor of its own: read it outside, or give this adapter no "
            f"rows ({asked} was asked of it)"
        )


def _attention(*args: Any, **kwargs: Any) -> Any:
    """Return what `F.multi_head_attention_forward` returns."""
    given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
    routed = [name for name in given if isinstance(given[name], RoutedTensor)]
    first, mask = given[routed[0]], given.get("attn_mask")
    if given["query"].dim() != 3 or (mask is not None and mask.dim() != 2):
        raise ValueError(refusal(first.path))

    def call(index: int, taken: dict[str, Any]) -> Any:
        for name in routed:
            taken[name] = taken[name].build(index)
        return F.multi_head_attention_forward(**taken)

    inputs = {"query": 1, "key": 1, "value": 1, "key_padding_mask": 0}
    return split(first.route, first.path, given, inputs, (1, 0), call)


# The names of the arguments of F.multi_head_attention_forward.
_ATTENTION = tuple(inspect.signature(F.multi_head_attention_forward).parameters)

RoutedTensor.answers = {F.multi_head_attention_forward: _attention}
