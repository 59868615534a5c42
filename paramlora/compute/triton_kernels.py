"""Triton kernels for the two places where an adapter costs whole passes over a large matrix.

    update      C + s · P Q                 C: (n, m), P: (n, r), Q: (r, m)
    products    s · dy B and s · dyᵀ h      dy: (n, m), B: (m, r), h: (n, r)

Their plain twins are `lowrank.update` and `lowrank.products`, which say when they are used.

`update` replaces `torch.addmm`: cuBLAS runs that product at half of the memory's bandwidth where r
is small. Measured on an H200 in bfloat16 at r = 16: 103 against 62 µs for y + s·hBᵀ of (4096,
14336), 158 against 72 µs for W'. `products` replaces two products, their scaling and two casts, and
reads dy once: of (4096, 14336), 43 + 40 µs and four small launches against 46 µs and 16 for the
sums; of (16384, 14336), 122 + 125 against 150 and 29.

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


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    dY, B, H, dh, dB, n, m, r, width, b0, b1, h0, h1,
    R: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Partial sums of BN rows and `width` columns: dh (chunk, n, r), dB (block, m, r)."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    rows, k = block * BN + tl.arange(0, BN), tl.arange(0, R)
    row, rank = rows[:, None] < n, k[None, :] < r
    h = tl.load(H + rows[:, None] * h0 + k[None, :] * h1, mask=row & rank, other=0.0)
    total = tl.zeros((BN, R), tl.float32)
    for start in range(0, width, BM):
        columns = chunk * width + start + tl.arange(0, BM)
        column = columns < m
        places = rows[:, None].to(tl.int64) * m + columns[None, :]
        dy = tl.load(dY + places, mask=row & column[None, :], other=0.0)
        within = column[:, None] & rank
        b = tl.load(B + columns[:, None] * b0 + k[None, :] * b1, mask=within, other=0.0)
        total = tl.dot(dy, b.to(dy.dtype), total)
        part = tl.dot(tl.trans(dy), h.to(dy.dtype))
        tl.store(dB + (block * m + columns)[:, None] * r + k[None, :], part, mask=within)
    tl.store(dh + (chunk * n + rows)[:, None] * r + k[None, :], total, mask=row & rank)


@triton.jit
def _sum(parts, out, count, size, s, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(count):
        total += tl.load(parts + i * size + places, mask=places < size, other=0.0)
    tl.store(out + places, (total * s).to(out.dtype.element_ty), mask=places < size)


def products(dy: Tensor, B: Tensor, h: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return s · dy B in the dtype of dy and s · dyᵀ h in the dtype of B; dy contiguous, r ≤ 64.

    The sums of blocks are added up in a fixed order, so the result is the same in every run.
    """
    (n, m), r = dy.shape, B.shape[1]
    BN, BM = 256, 64
    blocks = triton.cdiv(n, BN)
    chunks = max(1, triton.cdiv(128, blocks))  # as many programs as the GPU has processors
    width = triton.cdiv(triton.cdiv(m, chunks), BM) * BM
    chunks = triton.cdiv(m, width)
    parts_h = torch.empty((chunks, n, r), device=dy.device)
    parts_B = torch.empty((blocks, m, r), device=dy.device)
    dh = torch.empty((n, r), device=dy.device, dtype=dy.dtype)
    dB = torch.empty((m, r), device=dy.device, dtype=B.dtype)
    with torch.cuda.device_of(dy):
        _products[(blocks, chunks)](
            *(dy, B, h, parts_h, parts_B, n, m, r, width),
            *(B.stride(0), B.stride(1), h.stride(0), h.stride(1)),
            R=max(16, triton.next_power_of_2(r)),
            BN=BN,
            BM=BM,
            num_warps=8,
            num_stages=4 if r <= 16 else 3,
        )
        for parts, out in ((parts_h, dh), (parts_B, dB)):
            size = out.numel()
            _sum[(triton.cdiv(size, 256),)](parts, out, len(parts), size, s, BLOCK=256, num_warps=4)
    return dh, dB
