"""How factors start: random draws, zeros, and starts computed from the weight."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .spec import factor_dtype


def draw(
    shape: tuple[int, ...],
    weight: Tensor,
    fill: Callable[[Tensor, torch.Generator | None], object],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a factor of `weight` that `fill(tensor, generator)` has filled in place.

    It is drawn in float32 (float64 for a float64 weight) on the generator's device, the CPU where
    there is none, and then moved: a seed gives the same factors whatever the weight's device. On
    the meta device nothing is drawn.
    """
    dtype = factor_dtype(weight)
    if weight.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    device = "cpu" if generator is None else generator.device
    factor = torch.full(shape, math.nan, dtype=dtype, device=device)
    with torch.no_grad():
        fill(factor, generator)
    if not factor.isfinite().all():
        raise ValueError(
            f"init did not fill a factor of shape {shape} with finite numbers; it has to do so in "
            "place, as torch.nn.init.normal_ does"
        )
    return factor.to(weight.device)


def check_init(init: object, others: Iterable[str] = ()) -> None:
    """Raise a ValueError where `init` is neither a known name, nor of the others, nor callable."""
    names = [*_INITS, *others]
    if not callable(init) and init not in names:
        known = ", ".join(map(repr, names))
        raise ValueError(f"init must be one of {known} or a callable, got {init!r}")


def start(
    matrices: Tensor,
    weight: Tensor,
    rank: int,
    init: str | Callable[[Tensor], object],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Return new factors of `weight`, seen as matrices (…, out, in), with an update of zero.

    A, (…, r, in), is filled by `init`, each matrix by itself, for an init may depend on its shape;
    B, (…, out, r), is zero.
    """
    *batch, out, into = matrices.shape

    def fill(A: Tensor, generator: torch.Generator | None) -> None:
        for one in A.view(-1, *A.shape[-2:]):
            if callable(init):
                init(one)
            else:
                _INITS[init](one, generator)

    A = draw((*batch, rank, into), weight, fill, generator)
    B = torch.zeros((*batch, out, rank), dtype=A.dtype, device=A.device)
    return {"A": A, "B": B}


_INITS: dict[str, Callable[[Tensor, torch.Generator | None], object]] = {
    "kaiming": lambda A, g: nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=g),
    "gaussian": lambda A, g: A.normal_(generator=g),
    "gaussian/sqrt_r": lambda A, g: A.normal_(std=A.shape[0] ** -0.5, generator=g),
    "orthogonal": lambda A, g: nn.init.orthogonal_(A, generator=g),
}


def principal(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A, B with the best approximation BA of W, (…, out, in), singular values in halves."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[..., :rank].sqrt()
    A, B = root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
    # FSDP takes no other parameters.
    return A.contiguous(), B.contiguous()


def orthonormal(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A, B with the first columns of Q in B and the first rows of R in A, where W = QR."""
    Q, R = torch.linalg.qr(W)
    return R[..., :rank, :].contiguous(), Q[..., :rank].contiguous()


FROM_WEIGHT = {"pissa": principal, "olora": orthonormal}


def kaiming(factor: Tensor, generator: torch.Generator | None) -> None:
    torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
