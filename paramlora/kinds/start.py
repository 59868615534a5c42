"""Fill new factors: at random, with zeros, or from the singular values of a matrix."""

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
    """Return a new factor that `fill` has filled with random numbers.

    The numbers are drawn on the device of the generator and then moved to that of `weight`, so a
    seed gives the same factor on every device. On the meta device nothing is drawn.

    Args:
        shape: the factor's shape.
        weight: the tensor that the factor is for; it determines dtype and device.
        fill: `fill(factor, generator)` fills a tensor in place. Elements that it leaves out are
            NaN.
        generator: the source of random numbers; None means torch's global one on the CPU.

    Returns:
        A tensor of `factor_dtype(weight)` on the device of `weight`.

    Raises:
        ValueError: `fill` left NaNs or infinite numbers.

    >>> def fill(factor, generator):
    ...     factor.normal_(std=0.02, generator=generator)
    >>> draw((2, 4), torch.zeros(3, 4, dtype=torch.float64), fill).shape
    torch.Size([2, 4])
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
    """Check that `init` is a known name, one of `others`, or a callable."""
    names = [*_INITS, *others]
    if not callable(init) and init not in names:
        known = ", ".join(map(repr, names))
        raise ValueError(f"init must be one of {known} or a callable, got {init!r}")


def init_factors(
    matrices: Tensor,
    rank: int,
    init: str | Callable[[Tensor], object],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Return A, filled by `init`, and B = 0, for matrices of shape (…, out, in)."""
    *batch, out, into = matrices.shape

    def fill(A: Tensor, generator: torch.Generator | None) -> None:
        # Matrix by matrix: kaiming and orthogonal depend on the shape of what they fill.
        for matrix in A.view(-1, rank, into):
            if callable(init):
                init(matrix)
            else:
                _INITS[init](matrix, generator)

    A = draw((*batch, rank, into), matrices, fill, generator)
    B = torch.zeros((*batch, out, rank), dtype=A.dtype, device=A.device)
    return {"A": A, "B": B}


def kaiming(factor: Tensor, generator: torch.Generator | None) -> None:
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)


def _uniform_by_rank(A: Tensor, generator: torch.Generator | None) -> None:
    """Fill A, (r, in), with U(-1/√r, 1/√r): the rule of `kaiming` on a matrix stored as (in, r)."""
    stored = torch.empty_like(A.T, memory_format=torch.contiguous_format)
    kaiming(stored, generator)
    A.copy_(stored.T)


_INITS: dict[str, Callable[[Tensor, torch.Generator | None], object]] = {
    "kaiming": kaiming,
    "gaussian": lambda A, g: A.normal_(generator=g),
    "gaussian/sqrt_r": lambda A, g: A.normal_(std=A.shape[0] ** -0.5, generator=g),
    "uniform/sqrt_r": _uniform_by_rank,
    "orthogonal": lambda A, g: nn.init.orthogonal_(A, generator=g),
}


def truncated_svd(W: Tensor, rank: int, smallest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and all singular values of W; B A is the best approximation of W of rank r.

    With `smallest`, B A is instead the part of W that belongs to its r smallest singular values.

    r is `rank`, or the smaller side of W if that is less. Each factor is scaled by the square
    roots of the singular values. W: (…, out, in), A: (…, r, in), B: (…, out, r), values:
    (…, min(out, in)).
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = slice(max(S.shape[-1] - rank, 0), None) if smallest else slice(rank)
    roots = S[..., kept].sqrt()
    A = roots.unsqueeze(-1) * Vh[..., kept, :]
    B = U[..., kept] * roots.unsqueeze(-2)
    # FSDP refuses parameters that are not contiguous.
    return A.contiguous(), B.contiguous(), S
