"""y = x W'ᵀ + b for a low-rank W' = W + s · B A, by the path that costs the least.

    factored    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        dx = dy W + s · (dy B) A
    dense       y = x W'ᵀ + b                       dx = dy W'
    both        dA = s · (dy B)ᵀ x                  dB = s · dyᵀ (x Aᵀ)

    x: (n, k), A: (r, k), B: (m, r), W: (m, k), y: (n, m)

`plan.choose` is the rule. Neither path computes the dense gradient of W', which is what makes a
plain parametrization half as fast again, and none keeps W': for the backward there are x itself,
and x Aᵀ where the forward had it.

`native` has the same compiled, as one node of the graph, for whoever has built it. `_plain` says it
in operations that autograd records, for small layers, where a Python Function costs more than it
saves, and under torch.compile, torch.func and double backward: a Function that reads
`ctx.needs_input_grad` loses gradients under the compiler, one without `setup_context` cannot be
transformed, and the compiler plans its own memory anyway.

Under torch.autocast the paths are the same, on casts made before. Of a frozen layer's W autocast
makes one a call, too; that of a trained one it caches, and the layer is left to it.
"""

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds.spec import LowRank
from ..native import load
from . import plan as plans
from .plan import Path, Plan
from .watched import EXACT, autocast_dtype, plain_ops_only


def linear(x: Tensor, W: Tensor, b: Tensor | None, terms: list[LowRank]) -> Tensor:
    """Return x W'ᵀ + b, where W' = W + Σ s · B A over the terms.

    Args:
        x: (…, k).
        W: (m, k), of the dtype of x but under autocast.
        b: (m,) or None.
        terms: low-rank updates; their factors may be of another floating dtype, and are cast:
            x is shared with the layers beside this one, and not copied to their dtype.
    """
    if not terms:
        return F.linear(x, W, b)
    A, B, s = terms[0] if len(terms) == 1 else _together(terms)
    if isinstance(s, Tensor):
        B, s = B * s, 1.0
    grad = torch.is_grad_enabled()
    # Sizes first, which settles it for small layers. Those of a subclass must not be asked for: it
    # may be an exporter's fake tensor; nor the compiler's, which would compile for each outcome.
    if type(x) is Tensor and not torch.compiler.is_compiling():
        m, k = W.shape
        n, device = x.numel() // max(k, 1), "cpu" if x.is_cpu else "cuda"
        built = load.module() if {type(W), type(A), type(B)} <= EXACT else None
        dtype = autocast_dtype(x, W, b)
        plan = plans.choose(n, k, m, dtype or W.dtype, device, grad, built is not None)
        cached = dtype and W.requires_grad and torch.is_autocast_cache_enabled()
        if plan is not plans.PLAIN and not cached and not plain_ops_only(x):
            if built is not None and plan.native:
                dense = plan.forward == "dense", plan.backward == "dense"
                return built.linear(x, W, b, A, B, s, *dense, dtype)
            if dtype is not None:
                x, W, A, B = (tensor.to(dtype) for tensor in (x, W, A, B))
                b = None if b is None else b.to(dtype)
            if grad:
                return _Linear.apply(x, W, b, A, B, s, plan)
            return _forward(x, W, b, A, B, s, plan.forward)[0]
    return _plain(x, W, b, A, B, s)


def update(C: Tensor, P: Tensor, Q: Tensor, s: float = 1.0, *, inplace: bool = False) -> Tensor:
    """Return C + s · P Q in the dtype of C, rounded once; C: (n, m), P: (n, r), Q: (r, m).

    P and Q may be of another floating dtype. `inplace` writes into C.
    """
    if _kernel_can(C, P.shape[1]):
        from .triton_kernels import update as kernel

        return kernel(C, P, Q, s, C if inplace else torch.empty_like(C))
    P, Q = P.to(C.dtype), Q.to(C.dtype)
    return C.addmm_(P, Q, alpha=s) if inplace else torch.addmm(C, P, Q, alpha=s)


def products(dy: Tensor, B: Tensor, h: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return s · dy B, (n, r), in the dtype of dy, and s · dyᵀ h, (m, r), in the dtype of B.

    dy: (n, m), B: (m, r), h: (n, r); in one pass over dy where that pays.
    """
    if _kernel_can(dy, B.shape[1]) and B.shape[1] <= 64:
        from .triton_kernels import products as kernel

        return kernel(dy, B, h, s)
    dh = torch.mm(dy, B.to(dy.dtype))
    return _scaled(dh, s), _scaled(torch.mm(dy.t(), h), s).to(B.dtype)


class _Linear(torch.autograd.Function):
    """The eager path in training: see the formulas that open this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        plan: Plan,
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, s, plan.forward)
        # Under autocast W and b are casts, which nothing else would keep.
        needs = ctx.needs_input_grad
        kept = W if needs[0] or needs[1] else None, b if needs[2] else None
        ctx.save_for_backward(x, *kept, A, B, h)
        ctx.s, ctx.path = s, plan.backward
        # Not a view, which nn.ReLU(inplace=True) could not change behind a Function.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, h = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of the backward is wanted: say it in plain operations
            return _differentiable(needs, grads[0], tuple(inputs), ctx.s)
        x, W, _, A, B = inputs
        x2, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, B.shape[0])
        dx = dW = db = dA = dB = None
        if needs[4]:
            h = torch.mm(x2, A.to(x2.dtype).t()) if h is None else h
            dh, dB = products(dy, B, h, ctx.s)  # dh = s · dy B
        elif needs[0] or needs[3]:
            dh = _scaled(torch.mm(dy, B.to(dy.dtype)), ctx.s)
        if needs[3]:
            dA = torch.mm(dh.t(), x2).to(A.dtype)
        if needs[0]:
            if ctx.path == "dense":
                dx = torch.mm(dy, update(W, B, A, ctx.s))
            else:
                dx = update(torch.mm(dy, W), dh, A, inplace=True)
            dx = dx.view(x.shape)
        if needs[1]:
            dW = torch.mm(dy.t(), x2)
        if needs[2]:
            db = dy.sum(0)
        return dx, dW, db, dA, dB, None, None


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, path: Path
) -> tuple[Tensor, Tensor | None]:
    """Return y, and h = x Aᵀ where it was computed; x: (…, k), h: (n, r)."""
    if path == "dense":
        return F.linear(x, update(W, B, A, s), b), None
    x2 = x.reshape(-1, x.shape[-1])
    h = torch.mm(x2, A.to(x.dtype).t())
    # Of x as it is: a strided one is rounded otherwise than its copy, and B = 0 must be the base.
    y = F.linear(x, W, b).contiguous()
    update(y.view(-1, W.shape[0]), h, B.t(), s, inplace=True)
    return y, h


def _plain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    if torch.compiler.is_compiling():
        # It fuses the scale with the cast, and the sum with an activation that may follow.
        return F.linear(x, W, b) + F.linear(F.linear(x, _scaled(A, s).to(x.dtype)), B.to(x.dtype))
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    # The fewest operations: the scale and the sum ride in the last product.
    if x.dim() == 2:
        return torch.addmm(F.linear(x, W, b), F.linear(x, A), B.t(), alpha=s)
    return F.linear(x, W, b) + F.linear(_scaled(F.linear(x, A), s), B)


def _differentiable(
    needs: tuple[bool, ...], dy: Tensor, tensors: tuple[Any, ...], s: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `_plain`, themselves with a graph."""
    x, W, b, A, B = tensors
    if W is None:  # no gradient that is wanted depends on it
        W = x.new_zeros(()).expand(B.shape[0], A.shape[1])
    y = _plain(x, W, b, A, B, s)
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


def _kernel_can(C: Tensor, rank: int) -> bool:
    return (
        C.is_cuda
        and C.numel() >= plans.WORTH_A_KERNEL
        and C.dtype in (torch.bfloat16, torch.float16)
        and rank <= 128
        and C.is_contiguous()
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
