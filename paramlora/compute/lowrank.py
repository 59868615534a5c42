"""y = x W'ᵀ + b for a low-rank W' = W + s · B A, without keeping W'.

    factored    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        dx = dy W + s · (dy B) A
    dense       y = x W'ᵀ + b                       dx = dy W'
    both        dA = s · (dy B)ᵀ x                  dB = s · dyᵀ (x Aᵀ)

x: (n, k), W: (m, k), A: (r, k), B: (m, r), y: (n, m).

A plain parametrization builds W', keeps it for the backward, and computes its gradient dyᵀ x, from
which dA and dB follow. That gradient is a third product of n·k·m multiplications beside y and dx.
Neither path above needs it, and neither keeps W': the backward uses x, and x Aᵀ if the forward
computed it.

There are four implementations. `linear` chooses one by the rule in `plan.choose`:

- the native extension, if it was built: one node of the autograd graph, in C++;
- `_Linear`, the same node as a Function in Python;
- `_plain`, a few torch operations that autograd records by itself. A small layer uses them because
  a Python Function costs more time than it saves there. torch.func, tracers and dispatch modes
  need them (`plain_ops_only`), and so does double backward;
- `_traced`, for torch.compile: one operator for a large layer (compiled_node.py), and otherwise
  plain operations that the compiler can fuse.

Under torch.autocast the paths are the same. They receive tensors that were cast beforehand.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds.spec import LowRank
from ..native import load
from ..private_torch import any_autocast_enabled
from . import compiled_node, products
from . import plan as plans
from .modes import ORDINARY_TYPES, autocast_dtype, plain_ops_only
from .plan import Plan
from .products import scaled


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
    A, B, s = _one(terms)
    if compiling is None:
        compiling = torch.compiler.is_compiling()
    if compiling:
        return _traced(x, W, b, A, B, s)
    grad = torch.is_grad_enabled()
    # The choice of paths depends on sizes. Those of a tensor subclass may have no values, as those
    # of torch.export's fake tensors, so subclasses use plain operations. Small layers do, too:
    # `choose` comes before the slowest check, `plain_ops_only`, so that they skip that check.
    if type(x) is Tensor:
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
            return products.forward(x, W, b, A, B, s, plan.forward)[0]
    return _plain(x, W, b, A, B, s)


def add_update(y: Tensor, x: Tensor, *terms: LowRank) -> Tensor:
    """Return y + Σ s · (x Aᵀ) Bᵀ over the terms with plain operations; x: (…, k), y: (…, m)."""
    A, B, s = _one(terms)
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if torch.compiler.is_compiling() or y.dtype is not x.dtype or any_autocast_enabled():
        return y + F.linear(scaled(F.linear(x, A), s), B).to(y.dtype)
    h = torch.mm(x.reshape(-1, A.shape[1]), A.t())  # (n, r)
    return torch.addmm(y.reshape(-1, B.shape[0]), h, B.t(), alpha=s).view(y.shape)


class _Linear(torch.autograd.Function):
    """One layer as one node of the autograd graph, by the formulas that open this file.

    `forward` takes `ctx` itself. The newer form, a separate `setup_context`, would allow torch.func
    to transform this class. But `apply` then inspects the signature of `forward` in each call,
    which triples the time of a small call. `linear` therefore uses `_plain` under torch.func, and
    `_traced` under torch.compile, where a Function that reads `ctx.needs_input_grad` can return no
    dx.
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
        y, h = products.forward(x, W, b, A, B, s, plan.forward)
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
        needs = needs_x, needs_A, needs_B
        dx, dA, dB = products.gradients(dy, x2, W, A, B, h, ctx.s, ctx.path, needs)
        dW = dy.t() @ x2 if needs_W else None  # (m, k)
        db = dy.sum(0) if needs_b else None  # (m,)
        return None if dx is None else dx.view(x.shape), dW, db, dA, dB, None, None


def _traced(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return y in the form that the compiler turns into the fastest code."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if compiled_node.applies(x, W, b, dtype, len(A)):
        b = None if b is None else b.to(dtype)
        return compiled_node.linear(x.to(dtype), W.to(dtype), b, A, B, s)
    # The factor s stands behind both products. Without it Inductor would rewrite the sum as one
    # addmm, which copies y first and keeps an activation from being fused with the sum.
    return F.linear(x, W, b) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * s


def _plain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    if A.dtype is not x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    # As few operations as possible: addmm scales and adds while it multiplies.
    if x.dim() == 2:
        return torch.addmm(F.linear(x, W, b), F.linear(x, A), B.t(), alpha=s)
    return F.linear(x, W, b) + F.linear(scaled(F.linear(x, A), s), B)


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


def _one(terms: Sequence[LowRank]) -> tuple[Tensor, Tensor, float]:
    """Return A, B and s of the sum of the terms, whose rank is the sum of their ranks.

        s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂]

    Two adapters then cost two larger products instead of four. The scales differ between the
    terms, so they are multiplied into B. The returned s is a number.
    """
    if len(terms) > 1:
        A = torch.cat([term.A for term in terms])  # (Σ r, k)
        return A, torch.cat([term.B * term.scale for term in terms], dim=1), 1.0  # (m, Σ r)
    A, B, s = terms[0]
    if isinstance(s, Tensor):
        return A, B * s, 1.0  # s may require a gradient, which autograd takes from this product
    return A, B, s
