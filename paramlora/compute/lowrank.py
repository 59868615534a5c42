"""y = x W'ᵀ + b for a low-rank W' = W + s · B A, without keeping W'.

    factored    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        dx = dy W + s · (dy B) A
    dense       y = x W'ᵀ + b                       dx = dy W'
    both        dA = s · (dy B)ᵀ x                  dB = s · dyᵀ (x Aᵀ)

x: (n, k), W: (m, k), A: (r, k), B: (m, r), y: (n, m).

A plain parametrization builds W', keeps it for the backward, and computes its gradient dyᵀ x, from
which dA and dB follow. That gradient is a third product of n·k·m multiplications beside y and dx.
Neither path above needs it, and neither keeps W': the backward uses x, and x Aᵀ if the forward
computed it.

There are three implementations. `linear` chooses one by the rule in `plan.choose`:

- the native extension, if it was built: one node of the autograd graph, in C++;
- `_Linear`, the same node as a Function in Python;
- `_plain`, a few torch operations that autograd records by itself. A small layer uses them because
  a Python Function costs more time than it saves there. torch.compile, torch.func, tracers and
  dispatch modes need them (`plain_ops_only`), and so does double backward.

Under torch.autocast the paths are the same. They receive tensors that were cast beforehand.
"""

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds.spec import LowRank
from ..native import load
from ..private_torch import any_autocast_enabled
from . import plan as plans
from .modes import ORDINARY_TYPES, autocast_dtype, plain_ops_only
from .plan import Path, Plan


def linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    terms: list[LowRank],
    compiling: bool | None = None,
) -> Tensor:
    """Return x W'ᵀ + b, where W' = W + Σ s · B A over the terms.

    Args:
        x: (…, k).
        W: (m, k), of the dtype of x except under autocast.
        b: (m,) or None.
        terms: low-rank updates. Their factors may have another floating dtype, such as float32
            beside a bfloat16 W. They are cast to the dtype of x. x is not cast to theirs, so that
            all layers that read x keep the same tensor for the backward.
        compiling: whether torch.compile traces, if the caller has asked already.
    """
    if not terms:
        return F.linear(x, W, b)
    A, B, s = terms[0] if len(terms) == 1 else _concatenate(terms)
    if isinstance(s, Tensor):
        B, s = B * s, 1.0  # s may require a gradient, which autograd takes from this product
    grad = torch.is_grad_enabled()
    # The choice of paths depends on sizes, which must not be read in two cases. A compiled graph
    # would be specialised to the outcome and compiled again for the other one. And the sizes of a
    # tensor subclass may have no values, as those of torch.export's fake tensors. Both cases use
    # plain operations, and so do small layers. `choose` comes before the slowest check,
    # `plain_ops_only`, so that small layers skip that check.
    if type(x) is Tensor and not (
        torch.compiler.is_compiling() if compiling is None else compiling
    ):
        m, k = W.shape
        n, device = x.numel() // max(k, 1), "cpu" if x.is_cpu else "cuda"
        built = load.module() if {type(W), type(A), type(B)} <= ORDINARY_TYPES else None
        dtype = autocast_dtype(x, W, b)
        plan = plans.choose(n, k, m, dtype or W.dtype, device, grad, built is not None)
        # autocast casts a trained weight once per autocast block and reuses that cast in all
        # calls. The cast below would be one more copy for each call, all kept for the backward. A
        # frozen weight is cast once per call by autocast, too, so it loses nothing here.
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


def add_updates(x: Tensor, y: Tensor, terms: list[LowRank]) -> Tensor:
    """Return y + Σ s · (x Aᵀ) Bᵀ over the terms; x: (…, k), y: (…, m), the output of the base."""
    A, B, s = terms[0] if len(terms) == 1 else _concatenate(terms)
    if isinstance(s, Tensor):
        B, s = B * s, 1.0
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if torch.compiler.is_compiling() or y.dtype is not x.dtype or any_autocast_enabled():
        return y + F.linear(_scaled(F.linear(x, A), s), B).to(y.dtype)
    h = torch.mm(x.reshape(-1, A.shape[1]), A.t())  # (n, r)
    return torch.addmm(y.reshape(-1, B.shape[0]), h, B.t(), alpha=s).view(y.shape)


def add_product(
    C: Tensor, P: Tensor, Q: Tensor, s: float = 1.0, *, inplace: bool = False
) -> Tensor:
    """Return C + s · P Q in the dtype of C, rounded once; C: (n, m), P: (n, r), Q: (r, m).

    P and Q may have another floating dtype. With `inplace` the result is written into C.
    """
    if _kernel_applies(C, P.shape[1]):
        from .triton_kernels import add_product as kernel

        return kernel(C, P, Q, s, C if inplace else torch.empty_like(C))
    P, Q = P.to(C.dtype), Q.to(C.dtype)
    return C.addmm_(P, Q, alpha=s) if inplace else torch.addmm(C, P, Q, alpha=s)


def _thin_mm(P: Tensor, Q: Tensor, widest: int) -> Tensor:
    """Return P Q for a Q of r columns. P has the size of dy. The result may be column-major.

    MKL is slow for 2 to 15 columns and fast for as few rows. So in float32 and float64 on a CPU the
    transpose is computed, if P is large and 2 ≤ r ≤ `widest`. native.cpp has the same rule.
    """
    r, slow = Q.shape[1], P.is_cpu and P.itemsize >= 4
    if slow and 1 < r <= widest and 8 * r <= min(P.shape) and P.numel() >= 8192:
        return torch.mm(Q.t(), P.t()).t()  # ((r, b) (b, a))ᵀ
    return torch.mm(P, Q)  # (a, b) (b, r)


def grads_of_h_and_B(dy: Tensor, B: Tensor, h: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of h = x Aᵀ and of B, for y = … + s · h Bᵀ.

    dy: (n, m), B: (m, r), h: (n, r). Both products read dy, the largest of these. The Triton kernel
    reads it once for both.

    Returns:
        dh = s · dy B, (n, r), in the dtype of dy, and dB = s · dyᵀ h, (m, r), in the dtype of B.
    """
    if _kernel_applies(dy, B.shape[1]) and B.shape[1] <= 64:
        from .triton_kernels import grads_of_h_and_B as kernel

        return kernel(dy, B, h, s)
    dh = _thin_mm(dy, B.to(dy.dtype), 15)  # (n, r)
    dB = _thin_mm(dy.t(), h, 32).contiguous()  # (m, r)
    return _scaled(dh, s), _scaled(dB, s).to(B.dtype)


class _Linear(torch.autograd.Function):
    """One layer as one node of the autograd graph, by the formulas that open this file.

    `forward` takes `ctx` itself. The newer form, a separate `setup_context`, would allow torch.func
    to transform this class. But `apply` then inspects the signature of `forward` in each call,
    which triples the time of a small call. `linear` therefore uses `_plain` under torch.func, and
    also under torch.compile, where a Function that reads `ctx.needs_input_grad` can return no dx.
    """

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
        # W and b are saved only if the backward uses them. Saving the layer's own parameters costs
        # nothing, but under autocast W and b are casts, which take memory until the backward.
        needs_x, needs_W, needs_b, *_ = ctx.needs_input_grad
        saved_W, saved_b = W if needs_x or needs_W else None, b if needs_b else None
        ctx.save_for_backward(x, saved_W, saved_b, A, B, h)
        ctx.s, ctx.path = s, plan.backward
        # For a 3-D x with a bias F.linear returns a view. autograd refuses to change a view that a
        # Function returned, so nn.ReLU(inplace=True) behind this layer would raise. detach()
        # returns the same memory as a tensor that is no view.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, h = ctx.saved_tensors
        # Gradients are enabled here only if the caller asked for create_graph=True.
        if torch.is_grad_enabled():
            return _differentiable_grads(ctx.needs_input_grad, grads[0], tuple(inputs), ctx.s)
        x, W, _, A, B = inputs
        needs_x, needs_W, needs_b, needs_A, needs_B, *_ = ctx.needs_input_grad
        x2, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, B.shape[0])  # (n, k), (n, m)
        dx = dW = db = dA = dB = None
        # dh, the gradient of h = x Aᵀ, is a factor of dA, and of dx on the factored path.
        if needs_B:
            if h is None:  # the forward took the dense path
                h = torch.mm(x2, A.to(x2.dtype).t())  # (n, r)
            dh, dB = grads_of_h_and_B(dy, B, h, ctx.s)  # (n, r), (m, r)
        elif needs_x or needs_A:
            dh = _scaled(_thin_mm(dy, B.to(dy.dtype), 15), ctx.s)  # (n, r)
        if needs_A:
            dA = torch.mm(dh.t(), x2).to(A.dtype)  # (r, k)
        if needs_x:
            if ctx.path == "dense":
                dx = torch.mm(dy, add_product(W, B, A, ctx.s))  # (n, k) = (n, m) (m, k)
            elif _fused_applies(dy, W, B.shape[1]):
                from .fused_product import add_low_rank

                dx = add_low_rank(dy, W, dh, A.t(), 1.0, transposed=True)  # (n, k)
            else:
                dx = add_product(torch.mm(dy, W), dh, A, inplace=True)  # (n, k)
            dx = dx.view(x.shape)
        if needs_W:
            dW = torch.mm(dy.t(), x2)  # (m, k)
        if needs_b:
            db = dy.sum(0)  # (m,)
        return dx, dW, db, dA, dB, None, None


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, path: Path
) -> tuple[Tensor, Tensor | None]:
    """Return y, and h = x Aᵀ if it was computed; x: (…, k), y: (…, m), h: (n, r)."""
    if path == "dense":
        return F.linear(x, add_product(W, B, A, s), b), None
    x2 = x.reshape(-1, x.shape[-1])  # (n, k)
    h = torch.mm(x2, A.to(x.dtype).t())  # (n, r)
    if _fused_applies(x, W, B.shape[1]):
        from .fused_product import add_low_rank, same_bits

        if same_bits(x, W, b):
            return add_low_rank(x2, W, h, B, s, b).view(*x.shape[:-1], W.shape[0]), h
    # The base's part is computed from x and not from x2. For an x with other strides x2 is a copy,
    # and the product of the copy may round differently. With B = 0, y must be the base's output bit
    # for bit.
    y = F.linear(x, W, b).contiguous()
    add_product(y.view(-1, W.shape[0]), h, B.t(), s, inplace=True)
    return y, h


def _plain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    if torch.compiler.is_compiling():
        # The compiler fuses the scaling of A with its cast, and the sum with an activation that may
        # follow.
        return F.linear(x, W, b) + F.linear(F.linear(x, _scaled(A, s).to(x.dtype)), B.to(x.dtype))
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    # As few operations as possible: addmm scales and adds while it multiplies.
    if x.dim() == 2:
        return torch.addmm(F.linear(x, W, b), F.linear(x, A), B.t(), alpha=s)
    return F.linear(x, W, b) + F.linear(_scaled(F.linear(x, A), s), B)


def _differentiable_grads(
    needs: tuple[bool, ...], dy: Tensor, inputs: tuple[Any, ...], s: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs as functions of the inputs, with a graph of their own.

    A gradient penalty, for example, differentiates dB = s · dyᵀ h once more, with h = x Aᵀ. The
    saved h came from inside `_Linear.forward`, which records no graph. To autograd it would be a
    constant, and the penalty's gradient of A would silently be zero. The in-place sum and the
    Triton kernels of `backward` cannot be differentiated either. So y is computed again from the
    inputs with plain operations, and autograd differentiates those.
    """
    x, W, b, A, B = inputs
    if W is None:
        # Neither dx nor dW is needed, and the other gradients do not depend on W. So any tensor of
        # its shape can replace it.
        W = x.new_zeros(()).expand(B.shape[0], A.shape[1])
    y = _plain(x, W, b, A, B, s)
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=False) if needed]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(grads) if needed else None for needed in needs)


def _concatenate(terms: list[LowRank]) -> LowRank:
    """Return the sum of several updates as one update, whose rank is the sum of their ranks.

        s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂]

    Two adapters then cost two larger products instead of four. The scales differ between the
    terms, so they are multiplied into B.
    """
    A = torch.cat([term.A for term in terms])  # (Σ r, k)
    B = torch.cat([term.B * term.scale for term in terms], dim=1)  # (m, Σ r)
    return LowRank(A, B, 1.0)


def _scaled(tensor: Tensor, s: float) -> Tensor:
    """Return s · tensor, without a copy if s is 1."""
    return tensor if s == 1.0 else tensor * s


def _kernel_applies(C: Tensor, rank: int) -> bool:
    """Return whether a Triton kernel can and should process a matrix C at this rank."""
    return _suits_triton(C, rank) and C.numel() >= plans.WORTH_A_KERNEL and C.is_contiguous()


def _fused_applies(X: Tensor, W: Tensor, rank: int) -> bool:
    """Return whether one kernel can and should compute X Wᵀ or X W together with its update."""
    if not _suits_triton(X, rank):
        return False
    if X.numel() // X.shape[-1] * max(W.shape) < plans.WORTH_A_KERNEL:
        return False
    from .fused_product import applies

    return applies(X, W)


def _suits_triton(X: Tensor, rank: int) -> bool:
    """Return whether the Triton kernels support a matrix of this kind and this rank."""
    half = X.dtype in (torch.bfloat16, torch.float16)
    return X.is_cuda and half and rank <= 128 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
