"""Quantized linear layers: their weight is stored in a form that only their own code can read.

    y = module(x) + s · B (A x)        A: (r, in), B: (out, r)

Such a layer is recognised by what it has, not by its class, so no library is imported:

    `in_features` and `out_features`, and                                   for example
    a weight of a tensor subclass that wraps other tensors                  torchao, quanto
    a forward of its own, and a weight of another dtype or parameter class  bitsandbytes
    a forward of its own, and a `qweight` beside a float weight             quanto before `freeze`
    no weight, and a matrix of integers                                     HQQ, GPTQ, AWQ

The site is `weight` in every case, with shape (out, in). So an adapter's file fits the quantized
model and the model that it was made from. A kind gets an `UnreadWeight` in place of W.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import StateError
from ..kinds.spec import FLOATS, Spec
from ..stack.stand_in import StandIn

# accelerate's hooks replace the forward of an instance, and call the one that they keep there.
BELOW_HOOK = "_old_forward"


class UnreadWeight(StandIn):
    """The weight of a quantized layer as kinds see it: its shape (out, in), and no values.

    Views of it, such as a block or the transpose, are of this class as well.
    """

    @classmethod
    def of(cls, stored: Tensor, shape: Sequence[int]) -> "UnreadWeight":
        """Return the weight of this shape that `stored` packs."""
        dtype = stored.dtype if stored.dtype in FLOATS else torch.float32
        # All elements share the memory of one.
        return cls.like(torch.zeros((), dtype=dtype, device=stored.device).expand(*shape))

    @staticmethod
    def refusal(read: Any, asked: str) -> str:
        return (
            f"the weight of a quantized layer is never read, and {asked} was asked of it. To merge "
            "or to compute with it, dequantize the model, load the adapter's file there, and do it "
            "there; docs/quantized.md has the steps"
        )


def _view(function: Callable[..., Tensor]) -> Callable[..., UnreadWeight]:
    return lambda of, *args, **kwargs: UnreadWeight.like(function(of.weight, *args, **kwargs))


_VIEWS: tuple[Any, ...] = (
    *(Tensor.view, Tensor.reshape, Tensor.detach, Tensor.t, Tensor.to, Tensor.__getitem__),
    *(Tensor.mT.__get__, Tensor.T.__get__),  # type: ignore[attr-defined]
)
UnreadWeight.answers = {function: _view(function) for function in _VIEWS}


def packed_tensor(module: nn.Module) -> Tensor | None:
    """Return what a quantized linear layer stores its weight in; None if it is no such layer.

    If the layer stores several tensors, it is the first one of integers.
    """
    own: Mapping[str, Any] = vars(module)
    if "in_features" not in own or "out_features" not in own:
        return None
    plists = own["_modules"].get("parametrizations")
    plist: Any = plists._modules.get("weight") if isinstance(plists, nn.ModuleDict) else None
    if plist is not None:
        return None if packed_shape(plist) is None else plist.original
    cls = parametrize.type_before_parametrizations(module)
    weight = own["_parameters"].get("weight")
    if weight is not None:
        return weight if _is_packed(weight, cls) else None
    if cls.__module__.startswith("torch.") or callable(getattr(cls, "weight", None)):
        return None
    stored = [t for t in (*own["_parameters"].values(), *own["_buffers"].values()) if t is not None]
    return next((t for t in stored if t.dim() > 1 and _is_integer(t)), None)


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether a tensor's class wraps other tensors, which hold its values.

    A sharded tensor, which FSDP has made of a plain one, does not count.
    """
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor")


def packed_shape(plist: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) for the list of parametrizations of a quantized weight, else None."""
    return getattr(plist, "packed_shape", None)


def refusal(spec: Spec, weight: Tensor, module: nn.Module) -> str | None:
    """Return why a kind cannot adapt the weight of a quantized layer, or None if it can."""
    if "forward" in vars(module) and BELOW_HOOK not in vars(module):
        return (
            "its layer is quantized, and has a forward of the instance, which would not compute "
            "the adapter; attach before the forward is replaced"
        )
    try:
        reason = spec.refusal(weight)
        factors = {} if reason else spec.create(weight.to("meta"))
        if reason or spec.low_rank(factors) is not None:
            return reason
    except StateError:
        pass
    return (
        "its layer is quantized, and these settings need the values of the weight. LoRA with an "
        "init that is not made from the weight works there"
    )


def _is_packed(weight: Tensor, cls: type[nn.Module]) -> bool:
    # The attention reads the weight of its projection and never calls the module.
    if nn.parameter.is_lazy(weight) or issubclass(cls, _READ_FROM_OUTSIDE):
        return False
    if is_wrapper(weight):
        return True
    foreign = type(weight) is not nn.Parameter or weight.dtype not in FLOATS
    return cls.forward is not nn.Linear.forward and (foreign or hasattr(cls, "qweight"))


_READ_FROM_OUTSIDE = nn.modules.linear.NonDynamicallyQuantizableLinear


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
