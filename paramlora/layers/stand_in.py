"""What code that reads an adapted tensor gets inside of `routed`, where there is no single W'.

Some code reads a weight only to ask for its dtype or device, before it calls the layer:

    hidden = hidden.to(self.wo.weight.dtype)        # transformers' T5
    hidden = self.wo(hidden)

So it gets a tensor that knows the dtype, shape and device of W', and raises an error when it is
used for anything else. Its values are NaN, for code that torch does not let a subclass watch.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import StateError


class StandIn(Tensor):
    """A tensor without values: it says dtype, shape and device, and raises on any other use."""

    path: str

    @classmethod
    def of(cls, weight: Tensor, path: str) -> "StandIn":
        """Return the stand-in for the tensor at a path, of which `weight` is the base's."""
        made = weight.new_full((), float("nan")).expand(weight.shape).as_subclass(cls)
        vars(made)["path"] = path
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        path = next((vars(arg)["path"] for arg in args if isinstance(arg, StandIn)), "a tensor")
        raise StateError(
            f"{path!r} was read inside of routed(), where each row of a batch has a tensor of its "
            f"own: read it outside, or give this adapter no rows ({func.__name__} was asked of it)"
        )


_METADATA = {
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    torch.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "shape")
    ),
}
