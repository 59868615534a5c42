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


def unwatched(x: Tensor) -> bool:
    """Return whether x is a common tensor and nothing looks on that only knows plain operations.

    To what records operations those of the twin do not exist, a Function in Python cannot be
    exported, and an output that was kept must not be written to.
    """
    common = x.dim() > 1 and not x.is_meta and x.layout is torch.strided and not x.is_nested
    recorded = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return common and not recorded and not transformed()


def transformed() -> bool:
    """Return whether the compiler, torch.func or forward-mode differentiation is looking on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def native_for(
    x: Tensor, W: Tensor, b: Tensor | None, terms: Sequence[tuple[int, LowRank]]
) -> ModuleType | None:
    """Return the compiled twin where it can take this: float32 on a CPU, without gradients."""
    if torch.is_grad_enabled() or type(x) is not Tensor or not unwatched(x):
        return None
    tensors = [x, W, *([] if b is None else [b]), *(t for _, term in terms for t in term[:2])]
    fits = all(type(t) in EXACT and t.is_cpu and t.dtype is torch.float32 for t in tensors)
    plain = all(isinstance(term.scale, float) for _, term in terms)
    return load.module() if fits and plain and autocast_dtype(x, W, b) is None else None
