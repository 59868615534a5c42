"""Which modes of torch are active: autocast, tracing, dispatch modes, compiling, transforms."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..kinds.spec import LowRank
from ..native import load

# The native extension reads only tensors of exactly these types. A subclass may keep its values
# elsewhere.
ORDINARY_TYPES = {Tensor, nn.Parameter}


def autocast_dtype(x: Tensor, W: Tensor, b: Tensor | None) -> torch.dtype | None:
    """Return the dtype in which torch.autocast would compute x Wᵀ + b.

    None if autocast is off for the device, or if it does not cast one of the tensors, such as a
    float64 or an integer one.
    """
    if not torch._C._is_any_autocast_enabled() or x.is_meta:
        return None
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return None
    for tensor in (x, W) if b is None else (x, W, b):
        if not tensor.is_floating_point() or tensor.dtype is torch.float64:
            return None
    return torch.get_autocast_dtype(device)


def plain_ops_only(x: Tensor) -> bool:
    """Return whether a layer's output for x must be computed with plain torch operations.

    The faster paths use a custom node of the autograd graph and change tensors in place. Neither
    works while a tracer, a dispatch mode or a transform records the operations one by one:

    - torch.jit.trace cannot export a Function written in Python.
    - A dispatch mode does not see what the native extension does.
    - Selective checkpointing is a dispatch mode that keeps the outputs of some operations. An
      `addmm_` afterwards would change an output that it has kept.

    They do not work on all tensors, either. A nested or sparse tensor supports few operations, a
    meta tensor has no values, and a 1-D tensor is not a matrix of rows.
    """
    if x.dim() < 2 or x.is_meta or x.layout is not torch.strided or x.is_nested:
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    return transforms_active()


def transforms_active() -> bool:
    """Return whether torch.compile, torch.func or forward-mode differentiation is active."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def native_for(
    x: Tensor, W: Tensor, b: Tensor | None, terms: Sequence[tuple[int, LowRank]]
) -> ModuleType | None:
    """Return the compiled twin where it can take this: float32 on a CPU, without gradients."""
    if torch.is_grad_enabled() or type(x) is not Tensor or plain_ops_only(x):
        return None
    tensors = [x, W, *([] if b is None else [b]), *(t for _, term in terms for t in term[:2])]
    fits = all(type(t) in ORDINARY_TYPES and t.is_cpu and t.dtype is torch.float32 for t in tensors)
    plain = all(isinstance(term.scale, float) for _, term in terms)
    return load.module() if fits and plain and autocast_dtype(x, W, b) is None else None
