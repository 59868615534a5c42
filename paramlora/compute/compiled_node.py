"""A large Linear with a low-rank update as one node in a graph of torch.compile.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        dx = dy W + s · (dy B) A

Inductor rewrites a sum of two products as `addmm(y, h, Bᵀ)`. The update is then a product of its
own, which reads and writes y once more. The two operators below are opaque to Inductor. When the
graph runs they call `products`, whose kernel adds the update while a tile of y is in registers.

An operator costs fusions: an activation that follows cannot be computed together with the sum. So
`applies` takes it only for large products, where the kernel saves more than that.
"""

from typing import Any

import torch
from torch import Tensor

from . import plan as plans
from . import products

# torch 2.7 and newer. A graph for export must not contain operators that only paramlora defines.
_is_exporting = getattr(torch.compiler, "is_exporting", None)


def applies(x: Tensor, W: Tensor, b: Tensor | None, dtype: torch.dtype, rank: int) -> bool:
    """Return whether the node should compute a layer whose products are in `dtype`.

    Reading the number of rows here adds a guard to the graph. If the rows are dynamic, there are
    up to two graphs, one for few rows and one for many.
    """
    return (
        x.is_cuda
        and not x.is_nested
        and dtype in (torch.bfloat16, torch.float16)
        and rank <= 128
        and not W.requires_grad
        and (b is None or not b.requires_grad)
        and plans.worth_a_kernel(x.numel() // W.shape[1], *W.shape)
        and _is_exporting is not None
        and not _is_exporting()
    )


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Return x Wᵀ + b + s · (x Aᵀ) Bᵀ; x: (…, k), W: (m, k), A: (r, k), B: (m, r).

    x, W and b have one dtype. A and B may have another. W and b get no gradient.
    """
    y, _ = _linear(x, W, b, A, B, s)
    return y


@torch.library.custom_op(
    "paramlora::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor W, Tensor? b, Tensor A, Tensor B, float s) -> (Tensor, Tensor)",
)
def _linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Return y, (…, m), and h = x Aᵀ, (n, r), for the backward."""
    y, h = products.forward(x, W, b, A, B, s, "factored")
    assert h is not None
    return y, h


@_linear.register_fake
def _(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    n = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(n, A.shape[0])


@torch.library.custom_op(
    "paramlora::linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor W, Tensor A, Tensor B, Tensor h, float s, bool needs_x)"
    " -> (Tensor, Tensor, Tensor)",
)
def _linear_backward(
    dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, h: Tensor, s: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, (…, k), or an empty tensor if it is not needed, and dA and dB."""
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # (n, k), (n, m)
    needs = needs_x, True, True
    dx, dA, dB = products.gradients(dy2, x2, W, A, B, h, s, "factored", needs)
    assert dA is not None
    assert dB is not None
    return x.new_empty(0) if dx is None else dx.view(x.shape), dA, dB


@_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, h: Tensor, s: float, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_x else (0,))
    return dx, A.new_empty(A.shape), B.new_empty(B.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W, _, A, B, ctx.s = inputs
    ctx.save_for_backward(x, W, A, B, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, dh: None) -> tuple[Tensor | None, ...]:
    x, W, A, B, h = ctx.saved_tensors
    needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
    dx, dA, dB = _linear_backward(dy, x, W, A, B, h, ctx.s, needs_x)
    return (
        dx if needs_x else None,
        None,
        None,
        dA if needs_A else None,
        dB if needs_B else None,
        None,
    )


_linear.register_autograd(_backward, setup_context=_save)
