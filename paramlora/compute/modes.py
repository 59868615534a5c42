"""Detect the active modes of torch: autocast, tracers, dispatch modes, compiler, transforms."""

import torch
from torch import Tensor, nn

from ..private_torch import (
    any_autocast_enabled,
    dispatch_modes_active,
    forward_ad_active,
    functorch_active,
    tracing_state,
)

# The native extension reads only tensors of exactly these types. A subclass may keep its values
# elsewhere.
ORDINARY_TYPES = {Tensor, nn.Parameter}


def autocast_dtype(x: Tensor, W: Tensor, b: Tensor | None) -> torch.dtype | None:
    """Return the dtype in which torch.autocast would compute x Wᵀ + b.

    Return None if autocast is off for the device, or if it does not cast one of the tensors, such
    as a float64 or an integer one.
    """
    if not any_autocast_enabled() or x.is_meta:
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
    - A dispatch mode does not see the operations of the native extension.
    - Selective checkpointing is a dispatch mode that keeps the outputs of some operations. An
      `addmm_` afterwards would change an output that it has kept.

    They do not work on all tensors, either. A nested or sparse tensor supports few operations, a
    meta tensor has no values, and a 1-D tensor is not a matrix of rows.
    """
    if x.dim() < 2 or x.is_meta or x.layout is not torch.strided or x.is_nested:
        return True
    if dispatch_modes_active() > 0 or tracing_state() is not None:
        return True
    return transforms_active()


def transforms_active() -> bool:
    """Return whether torch.compile, torch.func or forward-mode differentiation is active."""
    return torch.compiler.is_compiling() or functorch_active() or forward_ad_active()
