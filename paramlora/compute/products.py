"""The products of a Linear with a low-rank update, by the fastest code that applies to them.

    forward     y = x Wᵀ + b + s · h Bᵀ, with h = x Aᵀ      or y = x W'ᵀ + b
    gradients   dh = s · dy B,  dB = s · dyᵀ h,  dA = dhᵀ x,  dx = dy W + dh A      or dx = dy W'

x: (n, k), W: (m, k), A: (r, k), B: (m, r), h: (n, r), y: (n, m).

autograd does not see these functions. `lowrank` and `compiled_node` call them inside their nodes.
"""

import functools
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plan as plans
from .plan import Path


def forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, path: Path
) -> tuple[Tensor, Tensor | None]:
    """Return y, and h = x Aᵀ if it was computed; x: (…, k), y: (…, m), h: (n, r)."""
    if path == "dense":
        return F.linear(x, add_product(W, B, A, s), b), None
    x2 = x.reshape(-1, x.shape[-1])  # (n, k)
    h = torch.mm(x2, A.to(x.dtype).t())  # (n, r)
    if fused_applies(x, W, B.shape[1]):
        from .fused_product import add_low_rank, same_bits

        if same_bits(x, W, b):
            return add_low_rank(x2, W, h, B, s, b).view(*x.shape[:-1], W.shape[0]), h
    # The base's part is computed from x and not from x2. For an x with other strides x2 is a copy,
    # and the product of the copy may round differently. With B = 0, y must be the base's output bit
    # for bit.
    y = F.linear(x, W, b).contiguous()
    add_product(y.view(-1, W.shape[0]), h, B.t(), s, inplace=True)
    return y, h


def gradients(
    dy: Tensor,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    s: float,
    path: Path,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dA and dB, each None if it is not needed.

    Args:
        dy: (n, m).
        x: (n, k).
        W: (m, k); may be None if dx is not needed.
        A, B: the factors, (r, k) and (m, r).
        h: x Aᵀ, (n, r), or None to compute it.
        s: the scale.
        path: "factored" or "dense", for dx.
        needs: which of dx, dA and dB are needed.
    """
    needs_x, needs_A, needs_B = needs
    dx = dA = dB = None
    # dh, the gradient of h = x Aᵀ, is a factor of dA, and of dx on the factored path.
    if needs_B:
        if h is None:  # the forward took the dense path
            h = torch.mm(x, A.to(x.dtype).t())  # (n, r)
        dh, dB = grads_of_h_and_B(dy, B, h, s)  # (n, r), (m, r)
    elif needs_x or needs_A:
        dh = scaled(_thin_mm(dy, B.to(dy.dtype), 15), s)  # (n, r)
    if needs_A:
        dA = torch.mm(dh.t(), x).to(A.dtype)  # (r, k)
    if needs_x:
        assert W is not None
        if path == "dense":
            dx = torch.mm(dy, add_product(W, B, A, s))  # (n, k) = (n, m) (m, k)
        elif fused_applies(dy, W, B.shape[1]):
            from .fused_product import add_low_rank

            dx = add_low_rank(dy, W, dh, A.t(), 1.0, transposed=True)  # (n, k)
        else:
            dx = add_product(torch.mm(dy, W), dh, A, inplace=True)  # (n, k)
    return dx, dA, dB


def add_product(
    C: Tensor, P: Tensor, Q: Tensor, s: float = 1.0, *, inplace: bool = False
) -> Tensor:
    """Return C + s · P Q in the dtype of C, rounded once; C: (n, m), P: (n, r), Q: (r, m).

    P and Q may have another floating dtype. With `inplace` the result is written into C.
    """
    if kernel_applies(C, P.shape[1]):
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
    if kernel_applies(dy, B.shape[1]) and B.shape[1] <= 64:
        from .triton_kernels import grads_of_h_and_B as kernel

        return kernel(dy, B, h, s)
    dh = _thin_mm(dy, B.to(dy.dtype), 15)  # (n, r)
    dB = _thin_mm(dy.t(), h, 32).contiguous()  # (m, r)
    return scaled(dh, s), scaled(dB, s).to(B.dtype)


def scaled(tensor: Tensor, s: float) -> Tensor:
    """Return s · tensor, without a copy if s is 1."""
    return tensor if s == 1.0 else tensor * s


def kernel_applies(C: Tensor, rank: int) -> bool:
    """Return whether a Triton kernel can and should process a matrix C at this rank."""
    return _suits_triton(C, rank) and C.numel() >= plans.WORTH_A_KERNEL and C.is_contiguous()


def fused_applies(X: Tensor, W: Tensor, rank: int) -> bool:
    """Return whether one kernel can and should compute X Wᵀ or X W together with its update."""
    if not _suits_triton(X, rank):
        return False
    if not plans.worth_a_kernel(X.numel() // X.shape[-1], *W.shape):
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
