"""A Triton kernel for one pass over a matrix that gets a low-rank update: C + s · P Q.

    C: (n, m), P: (n, r), Q: (r, m)

It replaces `torch.addmm` in `lowrank.update`, which is its plain twin and says when it is used.
cuBLAS runs that product at half of the memory's bandwidth where r is small; measured on an H200 in
bfloat16 at r = 16: 103 against 62 µs for y + s·hBᵀ of (4096, 14336), 158 against 72 µs for W'.
Imported only where it runs, for Triton is no dependency.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    C, P, Q, out, n, m, r, p0, p1, q0, q1, s, R: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    columns = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, R)
    row, column = rows[:, None] < n, columns[None, :] < m
    p = tl.load(P + rows[:, None] * p0 + k[None, :] * p1, mask=row & (k[None, :] < r), other=0.0)
    q = tl.load(
        Q + k[:, None] * q0 + columns[None, :] * q1, mask=column & (k[:, None] < r), other=0.0
    )
    # 64-bit: a matrix may have more than 2³¹ elements.
    places = rows[:, None].to(tl.int64) * m + columns[None, :]
    c = tl.load(C + places, mask=row & column)
    product = tl.dot(p.to(c.dtype), q.to(c.dtype))
    tl.store(out + places, (c.to(tl.float32) + s * product).to(c.dtype), mask=row & column)


def update(C: Tensor, P: Tensor, Q: Tensor, s: float, out: Tensor) -> Tensor:
    """Write C + s · P Q into `out`; C and `out` contiguous, in half precision, r ≤ 128."""
    (n, m), r = C.shape, P.shape[1]
    grid = (triton.cdiv(m, 128), triton.cdiv(n, 64))
    with torch.cuda.device_of(C):
        _update[grid](
            *(C, P, Q, out, n, m, r),
            *(P.stride(0), P.stride(1), Q.stride(0), Q.stride(1), s),
            R=max(16, triton.next_power_of_2(r)),
            BN=64,
            BM=128,
            num_warps=4,
        )
    return out
