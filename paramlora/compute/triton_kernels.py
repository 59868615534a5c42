"""Triton kernels for the two steps of an adapter that read a whole large matrix.

    add_product         C + s · P Q                         C: (n, m), P: (n, r), Q: (r, m)
    grads_of_h_and_B    dh = s · dy B,  dB = s · dyᵀ h      dy: (n, m), B: (m, r), h: (n, r)

The functions of these names in `lowrank` decide when the kernels run. Otherwise they compute the
same with plain torch operations. Memory traffic determines the time of both steps, because r is
much smaller than n and m.

`add_product` replaces `torch.addmm`. For a small r, cuBLAS runs that product at half of the memory
bandwidth. `grads_of_h_and_B` replaces two products, their scaling and two casts, and reads dy once
instead of twice. Measured on an H200 in bfloat16 at r = 16:

    step                                     plain operations, µs        Triton, µs
    y + s · h Bᵀ, y: (4096, 14336)           103                         62
    W' of that layer                         158                         72
    dh and dB, dy: (4096, 14336)             43 + 40, and 4 launches     46 + 16
    dh and dB, dy: (16384, 14336)            122 + 125, and 4 launches   150 + 29

The second summand of the last column is the kernel that adds the partial sums.

This module is imported only when a kernel is about to run, because Triton is not a dependency.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# In the kernels, `BN`, `BM` and `R` are the sizes of a tile: rows, columns, and the rank padded to
# a power of two of at least 16, as tl.dot requires. Masks set the padding to zero. `p0, p1`
# and the like are strides. Numbers of rows that are multiplied by a stride are 64-bit, because C,
# dy, the factors and the partial sums may have more than 2³¹ elements.


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    C, P, Q, out, n, m, r, p0, p1, q0, q1, s, R: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Write one tile of C + s · P Q: BN rows, BM columns."""
    rows = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    columns = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, R)
    row, column = rows[:, None] < n, columns[None, :] < m
    p = tl.load(P + rows[:, None] * p0 + k[None, :] * p1, mask=row & (k[None, :] < r), other=0.0)
    q = tl.load(
        Q + k[:, None] * q0 + columns[None, :] * q1, mask=column & (k[:, None] < r), other=0.0
    )
    offsets = rows[:, None] * m + columns[None, :]
    c = tl.load(C + offsets, mask=row & column)
    product = tl.dot(p.to(c.dtype), q.to(c.dtype))  # (BN, BM) = (BN, R) (R, BM)
    tl.store(out + offsets, (c.to(tl.float32) + s * product).to(c.dtype), mask=row & column)


def add_product(C: Tensor, P: Tensor, Q: Tensor, s: float, out: Tensor) -> Tensor:
    """Write C + s · P Q into `out`, which may be C itself.

    C and `out` are contiguous and in half precision; r ≤ 128.
    """
    (n, m), r = C.shape, P.shape[1]
    grid = (triton.cdiv(m, 128), triton.cdiv(n, 64))
    with torch.cuda.device_of(C):
        _add_product[grid](
            *(C, P, Q, out, n, m, r),
            *(P.stride(0), P.stride(1), Q.stride(0), Q.stride(1), s),
            R=max(16, triton.next_power_of_2(r)),
            BN=64,
            BM=128,
            num_warps=4,
        )
    return out


@triton.jit
def _grads_of_h_and_B(  # type: ignore[no-untyped-def]
    dY, B, H, dh, dB, n, m, r, width, b0, b1, h0, h1,
    R: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write the parts of dh and dB that follow from one block of dy: BN rows, `width` columns.

    The block is read tile by tile. Each tile, (BN, BM), serves both products while it is on the
    chip: it adds to the block's part of dh, and it completes the block's part of dB for BM columns.
    """
    block, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, k = block * BN + tl.arange(0, BN), tl.arange(0, R)
    row, rank = rows[:, None] < n, k[None, :] < r
    h = tl.load(H + rows[:, None] * h0 + k[None, :] * h1, mask=row & rank, other=0.0)
    total = tl.zeros((BN, R), tl.float32)
    for start in range(0, width, BM):
        columns = chunk * width + start + tl.arange(0, BM)
        column = columns < m
        offsets = rows[:, None] * m + columns[None, :]
        dy = tl.load(dY + offsets, mask=row & column[None, :], other=0.0)
        within = column[:, None] & rank
        b = tl.load(B + columns[:, None] * b0 + k[None, :] * b1, mask=within, other=0.0)
        total = tl.dot(dy, b.to(dy.dtype), total)  # (BN, R) += (BN, BM) (BM, R)
        part = tl.dot(tl.trans(dy), h.to(dy.dtype))  # (BM, R) = (BM, BN) (BN, R)
        tl.store(dB + (block * m + columns)[:, None] * r + k[None, :], part, mask=within)
    tl.store(dh + (chunk * n + rows)[:, None] * r + k[None, :], total, mask=row & rank)


@triton.jit
def _add_parts(parts, out, count, size, s, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write s · Σ parts, of `count` parts with `size` elements each."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(parts + offsets, mask=offsets < size, other=0.0)
        parts += size  # a 64-bit pointer; `i * size` would be a 32-bit product
    tl.store(out + offsets, (total * s).to(out.dtype.element_ty), mask=offsets < size)


def grads_of_h_and_B(dy: Tensor, B: Tensor, h: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return dh = s · dy B in the dtype of dy and dB = s · dyᵀ h in the dtype of B.

    dy is contiguous and in half precision; r ≤ 64.

    dy is divided into blocks of rows, and each block into chunks of columns. A program takes one
    chunk of one block. Every chunk has a part of dh, (chunks, n, r), and every block a part of dB,
    (blocks, m, r). A second kernel adds the parts in a fixed order, so every run gives the same
    bits. Atomic additions would need no second kernel, but their order varies from run to run.
    """
    (n, m), r = dy.shape, B.shape[1]
    BN, BM = 256, 64
    blocks = triton.cdiv(n, BN)
    # At least 128 programs, about as many as the GPU has processors. A short dy, of 4096 rows, has
    # only 16 blocks, so each of them is divided into 8 chunks.
    chunks = max(1, triton.cdiv(128, blocks))
    width = triton.cdiv(triton.cdiv(m, chunks), BM) * BM  # whole tiles
    chunks = triton.cdiv(m, width)
    parts_h = torch.empty((chunks, n, r), device=dy.device)
    parts_B = torch.empty((blocks, m, r), device=dy.device)
    dh = torch.empty((n, r), device=dy.device, dtype=dy.dtype)
    dB = torch.empty((m, r), device=dy.device, dtype=B.dtype)
    with torch.cuda.device_of(dy):
        _grads_of_h_and_B[(blocks, chunks)](
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
            grid = (triton.cdiv(size, 256),)
            _add_parts[grid](parts, out, len(parts), size, s, BLOCK=256, num_warps=4)
    return dh, dB
