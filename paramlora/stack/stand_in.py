"""Tensors without values, which code gets that reads a tensor whose W' does not exist."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import StateError

_T = TypeVar("_T", bound="StandIn")


class StandIn(Tensor):
    """A tensor that has the dtype, shape and device of another one, and no values.

    Code that asks for metadata gets an answer. T5, for example, casts its input to
    `self.wo.weight.dtype`. Every other function raises, except those in `answers`.

    Attributes:
        weight: the tensor whose metadata it has.
        answers: other functions that it knows; each is given the arguments of the call.
    """

    weight: Tensor
    answers: ClassVar[dict[Any, Callable[..., Any]]] = {}

    @classmethod
    def like(cls: type[_T], weight: Tensor) -> _T:
        # On the meta device, so that code which does not ask __torch_function__ finds no values.
        made = torch.empty(weight.shape, dtype=weight.dtype, device="meta").as_subclass(cls)
        made.weight = weight
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*(a.weight if isinstance(a, cls) else a for a in args), **kwargs)
        if func in cls.answers:
            return cls.answers[func](*args, **kwargs)
        found = [a for a in (*args, *kwargs.values()) if isinstance(a, cls)]
        raise StateError(cls.refusal(found[0] if found else None, func.__name__))

    @staticmethod
    def refusal(read: Any, asked: str) -> str:
        """Return the error for a function that asks for the values of `read`; None if nested."""
        raise NotImplementedError


_METADATA: set[Any] = {
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "itemsize")
    ),
    *(getattr(Tensor, f"is_{name}").__get__ for name in ("cuda", "cpu", "meta", "sparse", "leaf")),
    *(getattr(Tensor, f"is_{name}").__get__ for name in ("nested", "quantized")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.element_size,
    Tensor.is_floating_point,
    torch.is_floating_point,
    Tensor.is_complex,
    Tensor.is_contiguous,
}
