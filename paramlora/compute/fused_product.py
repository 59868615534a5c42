"""A Triton kernel that computes a large product and a low-rank update of it in one pass.

    Y = X Wᵀ + b + s · P Qᵀ        X: (n, k), W: (m, k), P: (n, r), Q: (m, r), Y: (n, m)

The forward of a Linear is of this form with P = h = x Aᵀ and Q = B, and its dx with X = dy, the
transposed weight, P = dh and Q = Aᵀ. Added afterwards, the update reads and writes Y once more,
which takes 0.1 to 0.2 of the time of the product on an H100. Here it is one more step along k while
the tile of Y is still in registers.

With Q = 0 the result must be the bits of `F.linear`, because an adapter that has not learned
anything changes no output. That depends on the order in which cuBLAS adds, so `same_bits` compares
both on the device in use, once for each shape.

This module is imported only when the kernel is about to run, because Triton is not a dependency.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

try:  # Triton 3.3 and newer, with PyTorch 2.7
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

# The tile of Y, and the step along k. 128×256 is the largest tile whose sums fit in the registers
# of 8 warps; three stages of loads fill the shared memory of an H100.
BN, BM, BK = 128, 256, 64
# A step along the rank. The tiles of P and Q share the memory with the stages above.
BR = 16


@triton.jit
def _factors(  # type: ignore[no-untyped-def]
    P, Q, rows, columns, n, m, r, p0, p1, q0, q1, s, step, BR: tl.constexpr
):  # fmt: skip
    """Load BR columns of P, (BN, BR), and of s · Qᵀ, (BR, BM), for one tile of Y."""
    rank = step * BR + tl.arange(0, BR)
    in_p = (rows[:, None] < n) & (rank[None, :] < r)
    in_q = (columns[None, :] < m) & (rank[:, None] < r)
    p = tl.load(P + rows[:, None] * p0 + rank[None, :] * p1, mask=in_p, other=0.0)
    q = tl.load(Q + rank[:, None] * q1 + columns[None, :] * q0, mask=in_q, other=0.0)
    return p, (q.to(tl.float32) * s).to(p.dtype)


@triton.jit
def _add_low_rank(  # type: ignore[no-untyped-def]
    X, W, Y, P, Q, b, n, m, k, r, p0, p1, q0, q1, s,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    RANKS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write every PROGRAMS-th tile of Y, (BN, BM)."""
    tiles_n, tiles_m = tl.cdiv(n, BN), tl.cdiv(m, BM)
    for tile in range(tl.program_id(0), tiles_n * tiles_m, PROGRAMS):
        # GROUP rows of tiles at a time: programs that run together then share tiles of X and W in
        # the cache.
        first = tile // (GROUP * tiles_m) * GROUP
        height = min(tiles_n - first, GROUP)
        row = (first + tile % (GROUP * tiles_m) % height) * BN
        column = tile % (GROUP * tiles_m) // height * BM
        rows, columns = row + tl.arange(0, BN), column + tl.arange(0, BM)
        # Requested before the loop, the factors have arrived when it ends.
        p, q = _factors(P, Q, rows, columns, n, m, r, p0, p1, q0, q1, s, 0, BR)
        total = tl.zeros((BN, BM), tl.float32)
        for start in range(0, k, BK):
            x = X.load([row, start])  # (BN, BK)
            if TRANSPOSED:
                total = tl.dot(x, W.load([start, column]), total)  # (BN, BK) (BK, BM)
            else:
                total = tl.dot(x, W.load([column, start]).T, total)
        # The update comes last. Before the loop it would delay the first loads of X and W.
        total = tl.dot(p, q, total)  # (BN, BR) (BR, BM)
        for step in tl.static_range(1, RANKS):
            p, q = _factors(P, Q, rows, columns, n, m, r, p0, p1, q0, q1, s, step, BR)
            total = tl.dot(p, q, total)
        if BIAS:
            total += tl.load(b + columns, mask=columns < m, other=0.0).to(tl.float32)[None, :]
        Y.store([row, column], total.to(Y.dtype))


def add_low_rank(
    X: Tensor,
    W: Tensor,
    P: Tensor,
    Q: Tensor,
    s: float,
    b: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return X Wᵀ + b + s · P Qᵀ, summed in float32 and rounded once.

    X and W are as `applies` requires. P has the dtype of X. Q may have another floating dtype, and
    both any strides. With `transposed`, W is (k, m) instead of (m, k).
    """
    Q = Q.to(X.dtype)  # in float32 its tiles, which every program loads, would take twice as long
    (n, k), m, r = X.shape, Q.shape[0], P.shape[1]
    Y = X.new_empty(n, m)
    programs = min(_processors(X.device.index), triton.cdiv(n, BN) * triton.cdiv(m, BM))
    with torch.cuda.device_of(X):
        _add_low_rank[(programs,)](
            TensorDescriptor(X, [n, k], [k, 1], [BN, BK]),
            TensorDescriptor(W, [*W.shape], [W.shape[1], 1], [BK, BM] if transposed else [BM, BK]),
            TensorDescriptor(Y, [n, m], [m, 1], [BN, BM]),
            *(P, Q, X if b is None else b, n, m, k, r, *P.stride(), *Q.stride(), s),
            BN=BN,
            BM=BM,
            BK=BK,
            BR=BR,
            GROUP=8,
            RANKS=triton.cdiv(r, BR),
            TRANSPOSED=transposed,
            BIAS=b is not None,
            PROGRAMS=programs,
            num_warps=8,
            num_stages=3,
        )
    return Y


def applies(X: Tensor, W: Tensor) -> bool:
    """Return whether the kernel can read X and W, (n, k) and (m, k) or (k, m), on this device.

    The tensor descriptors of a Hopper GPU need rows that begin at multiples of 16 bytes.
    """
    return (
        TensorDescriptor is not None
        and _is_hopper(X.device.index)
        and X.dtype is W.dtype
        and all(
            t.is_contiguous() and t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in (X, W)
        )
        and len(W) % 8 == 0
    )


_same_bits: dict[tuple[object, ...], bool] = {}


def same_bits(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Return whether the kernel gives the bits of F.linear(x, W, b) if the update is zero.

    The first call for a shape computes both and compares them, which waits for the GPU. While a
    CUDA graph is being captured that is impossible, and the answer for an unknown shape is False.
    """
    key = (x.device.index, x.dtype, x.shape, W.shape, b is None)
    if key not in _same_bits:
        if torch.cuda.is_current_stream_capturing():
            return False
        nothing = x.new_zeros(())
        X = x.view(-1, x.shape[-1])
        found = add_low_rank(X, W, nothing.expand(len(X), 1), nothing.expand(len(W), 1), 1.0, b)
        expected = F.linear(x, W, b).view_as(found)
        # Values that are mostly zero show nothing about the order of the sums.
        if 2 * int(expected.count_nonzero()) < expected.numel():
            return False
        _same_bits[key] = torch.equal(found, expected)
    return _same_bits[key]


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
