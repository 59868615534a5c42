"""Sums of low-rank updates: the updates of adapters, sums of factors, and truncated products."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TargetError
from ..kinds.lora import LoRA
from ..kinds.spec import LowRank
from ..kinds.start import truncated_svd
from ..stack.factors import Factors


class Term(NamedTuple):
    """One adapter at one site, with its weight in the sum."""

    weight: float
    factors: Factors


def updates_of(path: str, terms: list[Term]) -> tuple[dict[str, Any], list[LowRank]]:
    """Return the layout that all adapters have, and their updates, scaled by the weights.

    If all are plain LoRAs of one layout, the updates are their own factors and the sum is a LoRA of
    that layout. Otherwise they are updates of the tensor as a matrix, which most kinds support.
    """
    parts = [term.factors for term in terms]
    layouts = [_layout(part) for part in parts]
    layout = layouts[0] if all(other == layouts[0] for other in layouts) else None
    found: list[LowRank | None]
    if layout is not None:
        found = [LowRank(p.get_parameter("A"), p.get_parameter("B"), p.scale) for p in parts]
    else:
        found = [part.spec.low_rank(part.tensors, part.strength) for part in parts]
    updates = [
        update._replace(scale=term.weight * float(update.scale))
        for term, update in zip(terms, found, strict=True)
        if update is not None
    ]
    if len(updates) < len(found):
        kinds = ", ".join(dict.fromkeys(type(part.spec).__name__ for part in parts))
        raise TargetError(
            f"cannot combine at {path!r}: the adapters there are of kind {kinds}; only low-rank "
            "updates of one layout can be summed, or Deltas with Deltas"
        )
    return layout or {}, updates


def exact_sum(updates: list[LowRank]) -> tuple[Tensor, Tensor]:
    """Return A and B of the exact sum of updates; its rank is the sum of their ranks."""
    A = torch.cat([update.scale * update.A for update in updates], dim=-2)
    return A, torch.cat([update.B for update in updates], dim=-1)


def linear_sum(path: str, updates: list[LowRank], sign_in_B: bool) -> tuple[Tensor, Tensor]:
    """Return Σ ±√|scale| A and Σ √|scale| B.

    The sign of a negative scale goes to one of the factors. The choice changes the products Bᵢ Aⱼ
    of different adapters. PEFT gives the sign to lora_A.
    """
    As, Bs, scales = zip(*updates, strict=True)
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
    return A, B


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


def distance(A: Tensor, B: Tensor, updates: list[LowRank]) -> float:
    """Return the distance of B A from the sum of updates, relative to that sum's norm."""
    As, Bs = exact_sum(updates)
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
