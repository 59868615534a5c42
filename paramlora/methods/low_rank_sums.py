"""Sums of low-rank updates: the updates of adapters, sums of factors, and truncated products."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ..kinds.lora import LoRA
from ..kinds.spec import LowRank
from ..kinds.start import truncated_svd
from ..stack.factors import Factors


def updates_of(path: str, parts: list[Factors]) -> tuple[dict[str, Any], list[LowRank]]:
    """Return the adapters' updates, and the layout that all of them have.

    If all are plain LoRAs of one layout, the updates are their own factors and the sum is a LoRA of
    that layout. Otherwise they are updates of the tensor as a matrix, which most kinds support.
    """
    layouts = [_layout(part) for part in parts]
    if layouts[0] is not None and all(layout == layouts[0] for layout in layouts):
        factors = [(p.get_parameter("A"), p.get_parameter("B"), p.scale) for p in parts]
        return layouts[0], [LowRank(*own) for own in factors]
    found = [part.spec.low_rank(part.tensors, part.strength) for part in parts]
    updates = [update for update in found if update is not None]
    if len(updates) < len(found):
        kinds = ", ".join(dict.fromkeys(type(part.spec).__name__ for part in parts))
        raise TargetError(
            f"cannot combine at {path!r}: the adapters there are of kind {kinds}; only low-rank "
            "updates of one layout can be summed, or Deltas with Deltas"
        )
    return {}, updates


def linear_sum(
    path: str, scales: list[float], As: list[Tensor], Bs: list[Tensor], sign_in_B: bool
) -> tuple[Tensor, Tensor]:
    """Return Σ ±√|scale| A and Σ √|scale| B.

    The sign of a negative scale goes to one of the factors. The choice changes the products Bᵢ Aⱼ
    of different adapters. PEFT gives the sign to lora_A.
    """
    ranks = [A.shape[-2] for A in As]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"method='linear' needs equal ranks, and those at {path!r} are "
            f"{', '.join(map(str, ranks))}; use 'cat' or 'svd'"
        )
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    for_A, for_B = (roots, signed) if sign_in_B else (signed, roots)
    A = sum(root * A for root, A in zip(for_A, As, strict=True))
    B = sum(root * B for root, B in zip(for_B, Bs, strict=True))
    return A, B  # type: ignore[return-value]


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the best approximation of B A at a rank, without building B A.

    With B = Q R and Aᵀ = S P, where Q and S have orthonormal columns,

        B A = Q (R Pᵀ) Sᵀ

    so the singular values of B A are those of R Pᵀ, which has only as many rows and columns as A
    has rows. Truncating this small matrix truncates B A.
    """
    Q, R = torch.linalg.qr(B)  # (…, out, r), (…, r, r)
    S, P = torch.linalg.qr(A.mT)  # (…, in, r), (…, r, r)
    A, B, _ = truncated_svd(R @ P.mT, rank)
    return A @ S.mT, Q @ B  # (…, rank, in), (…, out, rank)


def distance(A: Tensor, B: Tensor, scales: list[float], updates: list[LowRank]) -> float:
    """Return the distance of B A from the sum of scaled updates, relative to that sum's norm."""
    exact = [scale * update.A for scale, update in zip(scales, updates, strict=True)]
    As, Bs = torch.cat(exact, dim=-2), torch.cat([update.B for update in updates], dim=-1)
    difference = _norm(torch.cat([A, As], dim=-2), torch.cat([B, -Bs], dim=-1))
    return float(difference / _norm(As, Bs).clamp_min(1e-30))


def _norm(A: Tensor, B: Tensor) -> Tensor:
    """Return the norm of B A without building it, as in `truncate`."""
    return (torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT).norm()


def _layout(part: Factors) -> dict[str, Any] | None:
    """Return a LoRA's settings for viewing its tensor as matrices, or None for other kinds.

    A LoRA with constants counts as another kind.
    """
    spec = part.spec
    if type(spec) is not LoRA or spec.constants:
        return None
    return {"batch_dims": spec.batch_dims, "transposed": spec.transposed}
