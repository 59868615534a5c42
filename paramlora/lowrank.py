"""y = x W'ᵀ + b for a low-rank W' = W + s · B A, by the path that costs the least.

    factored    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        dx = dy W + s · (dy B) A
    dense       y = x W'ᵀ + b                       dx = dy W'
    both        dA = s · (dy B)ᵀ x                  dB = s · dyᵀ (x Aᵀ)

    x: (n, k), A: (r, k), B: (m, r), W: (m, k), y: (n, m)

Forward and backward choose by themselves (`choose`). Neither computes the dense gradient of W',
which is what makes a plain parametrization half as fast again, and none keeps W': for the backward
there are x itself, and x Aᵀ where the forward had it.

Plain operations (`_composite`) say the same for small layers, where a Python Function costs more
than it saves, and under torch.compile, torch.func, autocast and double backward: a Function that
reads `ctx.needs_input_grad` loses gradients under the compiler, one without `setup_context` cannot
be transformed, and the compiler plans its own memory anyway.
"""

import functools
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .adapters import LowRank

Path = Literal["factored", "dense"]

# Below this many elements a launch costs more than the traffic that the kernel saves.
_WORTH_A_KERNEL = 2**23


def choose(rows: int, columns: int, device: str) -> Path:
    """Return how to add a low-rank update in one direction: to the product, or to the weight.

    Adding it to the product reads and writes `rows` × `width` elements, adding it to the weight
    `columns` × `width`, where `width` is what both share (m in the forward, k in the backward);
    so the smaller one of `rows` and `columns` decides. On the CPU a weight costs four times as
    much: it is a new tensor, while the product is there in the cache.

    Measured on two cores of an EPYC, fp32, r 4, 1000 × 784 → 256: 19 µs for the product, 71 µs
    for the weight. On an H200, bf16, r 16, width 14336: product 62 µs at 4096 rows and 228 µs at
    16384; weight 72 µs for 4096 columns.

    Args:
        rows: n, the rows of x.
        columns: k in the forward, m in the backward.
        device: a device type, "cpu" or "cuda".
    """
    return "dense" if rows > (4 * columns if device == "cpu" else columns) else "factored"


def worth_a_function(elements: int, W: Tensor) -> bool:
    """Return whether a training step saves more by fewer passes than a Python Function costs it.

    That depends on the elements that pass through the layer, n (k + m). Measured as time over the
    frozen floor, Function against plain operations: on two cores of an EPYC, fp32, the MLP
    784-256-128-10, r 4: 3.85 and 2.78 at n = 10, 2.09 and 1.91 at 100, 1.14 and 1.52 at 1000. On
    an H200, bf16, 4096 → 14336 → 4096 twice, r 16: 4.3 and 3.7 at n = 512, 1.20 and 1.24 at 4096.

    Args:
        elements: those of x, n k.
        W: (m, k).
    """
    m, k = W.shape
    return elements // max(k, 1) * (k + m) >= (2**18 if W.device.type == "cpu" else 2**24)


def linear(x: Tensor, W: Tensor, b: Tensor | None, terms: list[LowRank]) -> Tensor:
    """Return x W'ᵀ + b, where W' = W + Σ s · B A over the terms.

    Args:
        x: (…, k).
        W: (m, k), of the dtype of x but under autocast.
        b: (m,) or None.
        terms: low-rank updates; their factors may be of another floating dtype, and are cast:
            x is shared with the layers beside this one, and never copied.
    """
    if not terms:
        return F.linear(x, W, b)
    A, B, s = terms[0] if len(terms) == 1 else _together(terms)
    if isinstance(s, Tensor):
        B, s = B * s, 1.0
    if _plain(x) or (torch.is_grad_enabled() and not worth_a_function(x.numel(), W)):
        return _composite(x, W, b, A, B, s)
    if torch.is_grad_enabled():
        return _Linear.apply(x, W, b, A, B, s)
    return _forward(x, W, b, A, B, s)[0]


def update(C: Tensor, P: Tensor, Q: Tensor, s: float = 1.0, *, inplace: bool = False) -> Tensor:
    """Return C + s · P Q in the dtype of C, rounded once; C: (n, m), P: (n, r), Q: (r, m).

    P and Q may be of another floating dtype. `inplace` writes into C.
    """
    if _kernel_can(C, P):
        from .kernels import update as kernel

        return kernel(C, P, Q, s, C if inplace else torch.empty_like(C))
    P, Q = P.to(C.dtype), Q.to(C.dtype)
    return C.addmm_(P, Q, alpha=s) if inplace else torch.addmm(C, P, Q, alpha=s)


class _Linear(torch.autograd.Function):
    """The eager path in training: see the formulas that open this file."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, s)
        ctx.save_for_backward(x, W, b, A, B, h)
        ctx.s = s
        # Not a view, which nn.ReLU(inplace=True) could not change behind a Function.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of the backward is wanted: say it in plain operations
            return _differentiable(needs, grads[0], tuple(inputs), ctx.s)
        x, W, _, A, B = inputs
        x2, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, W.shape[0])
        dx = dW = db = dA = dB = None
        if needs[0] or needs[3]:
            dh = torch.mm(dy, B.to(dy.dtype))
            if needs[3]:
                dA = _scaled(torch.mm(dh.t(), x2), ctx.s).to(A.dtype)
            if needs[0]:
                if choose(x2.shape[0], W.shape[0], x.device.type) == "dense":
                    dx = torch.mm(dy, update(W, B, A, ctx.s))
                else:
                    dx = update(torch.mm(dy, W), dh, A, ctx.s, inplace=True)
                dx = dx.view(x.shape)
        if needs[4]:
            h = torch.mm(x2, A.to(x2.dtype).t()) if h is None else h
            dB = _scaled(torch.mm(dy.t(), h), ctx.s).to(B.dtype)
        if needs[1]:
            dW = torch.mm(dy.t(), x2)
        if needs[2]:
            db = dy.sum(0)
        return dx, dW, db, dA, dB, None


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float
) -> tuple[Tensor, Tensor | None]:
    """Return y, and h = x Aᵀ where it was computed; x: (…, k), h: (n, r)."""
    x2 = x.reshape(-1, x.shape[-1])
    if choose(x2.shape[0], x2.shape[1], x.device.type) == "dense":
        return F.linear(x, update(W, B, A, s), b), None
    h = torch.mm(x2, A.to(x.dtype).t())
    # Of x as it is: a strided one is rounded otherwise than its copy, and B = 0 must be the base.
    y = F.linear(x, W, b).contiguous()
    update(y.view(-1, W.shape[0]), h, B.t(), s, inplace=True)
    return y, h


def _composite(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    h = _scaled(F.linear(x, A.to(x.dtype)), s)
    return F.linear(x, W, b) + F.linear(h, B.to(x.dtype))


def _differentiable(
    needs: tuple[bool, ...], dy: Tensor, tensors: tuple[Any, ...], s: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_composite`, themselves with a graph."""
    x, W, b, A, B = tensors
    y = _composite(x, W, b, A, B, s)
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(grads) if needed else None for needed in needs)


def _together(terms: list[LowRank]) -> LowRank:
    """Return several updates as one of their ranks' sum, the scales in B."""
    A = torch.cat([term.A for term in terms])
    B = torch.cat([term.B * term.scale for term in terms], dim=1)
    return LowRank(A, B, 1.0)


def _scaled(tensor: Tensor, s: float) -> Tensor:
    return tensor if s == 1.0 else tensor * s


def _plain(x: Tensor) -> bool:
    """Return whether to say it in plain operations; see this file's first docstring."""
    # A subclass may be an exporter's fake one, whose sizes must not be asked for; and torch knows
    # no autocast for the meta device.
    if type(x) is not Tensor or x.is_meta or x.dim() < 2:
        return True
    return transformed() or torch.is_autocast_enabled(x.device.type)


def transformed() -> bool:
    """Return whether the compiler, torch.func or forward-mode differentiation is looking on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _kernel_can(C: Tensor, P: Tensor) -> bool:
    return (
        C.is_cuda
        and C.numel() >= _WORTH_A_KERNEL
        and C.dtype in (torch.bfloat16, torch.float16)
        and P.shape[1] <= 128
        and C.is_contiguous()
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
