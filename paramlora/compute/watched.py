"""When only plain operations may run: tracing, compiling, transforms, autocast's casts."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..kinds.spec import LowRank
from ..native import load

# The types whose values are all that they are.
EXACT = {Tensor, nn.Parameter}


def autocast_dtype(x: Tensor, W: Tensor, b: Tensor | None) -> torch.dtype | None:
    """Return what torch.autocast has x Wᵀ + b in, None where it leaves one of them as it is."""
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
    """Return whether only plain operations work on x: no custom autograd node, no in-place change.

    That is so in two cases.

    A tracer, a dispatch mode or a transform is active. It sees one torch operation after another.
    torch.jit.trace, for example, cannot export a Function written in Python, the operations of the
    native extension are unknown to a dispatch mode, and selective checkpointing keeps the tensors
    that operations return, so `y.addmm_(...)` would change a tensor that it has already kept.

    Or x is no ordinary matrix of rows. A nested or sparse tensor supports few operations, and a
    meta tensor has no values that a kernel could read.
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
    fits = all(type(t) in EXACT and t.is_cpu and t.dtype is torch.float32 for t in tensors)
    plain = all(isinstance(term.scale, float) for _, term in terms)
    return load.module() if fits and plain and autocast_dtype(x, W, b) is None else None
