"""The mathematics of adapters: what is learned at a tensor, and how it changes that tensor.

    W' = W + λ · s · B A        A: (r, in), B: (out, r), s = alpha / r

A spec is what the user writes: a small frozen dataclass that says which factors a tensor gets
(`create`) and how they change it (`apply`). It knows tensors only: not a module, a name or a file.
λ, the strength, is the user's dial (`pl.scale`); s belongs to the adapter.

Each kind is complete in one class. A kind of your own is a frozen dataclass that derives from
`Spec` and defines `create` and `apply`; attaching, toggling, merging and saving then work for it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Factors = Mapping[str, Tensor]
Strength = float | Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LowRank(NamedTuple):
    """An update in factored form: `scale · B A`, A: (r, in), B: (out, r)."""

    A: Tensor
    B: Tensor
    scale: Strength

    def transposed(self) -> "LowRank":
        """Return the update of the transposed weight."""
        return LowRank(self.B.mT, self.A.mT, self.scale)


class Rescaled(NamedTuple):
    """A tensor rescaled along one dimension: W' = (1 + change) ⊙ (W + update).

    `change` has one entry for each index of dimension `dim`, 0 or 1, of W. It is kept apart from
    the 1, so that half precision rounds it by itself.
    """

    change: Tensor
    dim: int
    update: LowRank | None


@dataclass(frozen=True)
class Spec(ABC):
    """What to learn at a tensor. Derive a frozen dataclass from it to make a new kind of adapter.

    The dataclass's fields are saved with the adapter (numbers, strings, booleans and None are),
    and its class name is the kind that a file and a summary show.
    """

    @property
    def rank(self) -> int | None:
        """The rank that a summary shows; None for a kind that has none."""
        return None

    @property
    def scaling(self) -> float:
        """The factor s that multiplies the update beside the strength; 1 for a kind without."""
        return 1.0

    @property
    def additive(self) -> bool:
        """Whether what is added to a tensor does not depend on the tensor: such kinds commute."""
        return False

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of the factors that are never trained: saved and moved with the others."""
        return ()

    @property
    def fast(self) -> tuple[str, ...]:
        """The names of the factors that `parameter_groups` trains at the higher rate: LoRA's B."""
        return ()

    @abstractmethod
    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return new factors for `weight`, by name, on its device, in `factor_dtype(weight)`.

        They must leave `weight` as it is: `apply(weight, create(weight))` equals `weight` bitwise.
        Random ones are drawn by `draw`, so that a seed gives the same factors on every device.
        """

    @abstractmethod
    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        """Return the adapted tensor, of the shape, dtype and device of `weight`.

        `strength` is λ: at 0 the result equals `weight`, at 1 it is the trained adapter's. The same
        arguments must give the same result: layers call it again in the backward.
        """

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank | None:
        """Return the update as factors, or None where it has no such form.

        A kind that has one is computed without W' in a layer whose forward can do so.
        """
        return None

    def rescaled(
        self, weight: Tensor, factors: Factors, strength: Strength = 1.0
    ) -> Rescaled | None:
        """Return W' as `weight`, perhaps with a low-rank update, rescaled along a dimension.

        None where it has no such form. Like `low_rank` it lets layers do without W'.
        """
        return None

    def refusal(self, weight: Tensor) -> str | None:
        """Return why this kind cannot adapt `weight`, or None where it can."""
        return None


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype for factors of `weight`: its own, but float32 for a half-precision one.

    Factors in bfloat16 lose most of an optimizer's small steps; they are cast where they are used.
    """
    return torch.promote_types(weight.dtype, torch.float32)


def add_update(weight: Tensor, update: Tensor) -> Tensor:
    """Return `weight + update` in the weight's dtype, rounded once."""
    return (weight + update).to(weight.dtype)


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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


def check_rank(spec: Any) -> None:
    """Raise a ValueError where the rank or the alpha of a spec is none; make them Python's own."""
    rank, alpha = spec.rank, spec.alpha
    check_flag(spec, "rank_stabilized")
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if alpha is not None and not is_finite(alpha):
        raise ValueError(f"alpha must be a finite number or None, got {alpha!r}")
    # numpy's numbers, too: as Python's they can be saved.
    object.__setattr__(spec, "rank", int(rank))
    if not isinstance(alpha, int | float | None):
        object.__setattr__(spec, "alpha", float(alpha))


def check_flag(spec: Any, name: str) -> None:
    """Raise a ValueError where a spec's field of that name, if it has one, is no bool."""
    value = getattr(spec, name, False)
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def scaling_of(spec: Any) -> float:
    """Return alpha/r, or alpha/√r where the spec is `rank_stabilized`; alpha None means r."""
    alpha = spec.rank if spec.alpha is None else spec.alpha
    return alpha / (math.sqrt(spec.rank) if spec.rank_stabilized else spec.rank)


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


def low_rank_refusal(weight: Tensor) -> str | None:
    """Return why a tensor has no low-rank update, None where it has."""
    if weight.dim() < 2:
        return f"a low-rank update needs two dimensions, it has {weight.dim()}; use Delta()"
    return None


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


_FROM_WEIGHT = {"pissa": principal, "olora": orthonormal}


@dataclass(frozen=True)
class LoRA(Spec):
    """A low-rank update, W' = W + λ·(alpha/r)·BA, of any tensor with two or more dimensions.

    The tensor is seen as a matrix (out, in): its first dimension, and all others together. For a
    Linear that is the weight itself, for a convolution (out, in/groups·kernel), for an Embedding
    (num, dim). The update's rank is at most `rank`. With `batch_dims` it is a batch of matrices,
    such as one for each expert, and with `transposed` a matrix is (in, out).

    Args:
        rank: r, at least 1. One above the smaller side of the matrix is allowed, and wasted.
        alpha: the numerator of the scale; None means `rank`, so a scale of 1.
        init: how A starts; B starts at zero, so the update does too. "kaiming" (uniform, a = √5,
            as in the paper's code), "gaussian" (N(0, 1)), "gaussian/sqrt_r" (N(0, 1/r)),
            "orthogonal" (orthonormal rows, or columns where r is above in), or a callable that
            fills A, (r, in), in place, such as those of `torch.nn.init`; it draws where it
            likes, from torch's global generator as a rule. "pissa" and "olora" start from W
            itself: see below.
        rank_stabilized: scale by alpha/√r in place of alpha/r (Kalajdzievski 2023,
            arXiv 2312.03732).
        batch_dims: how many leading dimensions count matrices, each with an update of its own:
            with 1, experts (E, out, in) get A: (E, r, in) and B: (E, out, r).
        transposed: a matrix is stored as (in, out), so that W' = W + λ·s·(BA)ᵀ: as in
            transformers' Conv1D, and where experts are (E, in, out).

    Raises:
        ValueError: a rank below 1, an alpha that is no finite number, an init of no known name,
            or, when it is used, one that does not fill A with finite numbers; a `batch_dims` that
            is no count, a `transposed` that is no bool.

    "pissa" trains the principal part of W, s·BA = Σ over the r largest singular values (Meng et
    al. 2024, arXiv 2404.02948, equations 2 and 3), "olora" s times the first columns of Q and rows
    of R of its QR decomposition (Büyükakyüz 2024, arXiv 2406.01775). Both papers take that part
    out of the stored W. Here W stays, and what is taken out is kept beside as constants A₀, B₀:

        W' = W + λ·s·(BA − B₀A₀) = W + λ·s·[B − B₀, B₀] [A; A − A₀]

    which is trained alike, is exactly W at the start and when switched off, and is again a
    low-rank update of the original W, of rank 2r.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
    arXiv 2106.09685, section 4.1.

    >>> LoRA(rank=4, alpha=8).scaling
    2.0
    """

    rank: int = 8
    alpha: float | None = None
    init: str | Callable[[Tensor], object] = field(default="kaiming", kw_only=True)
    rank_stabilized: bool = field(default=False, kw_only=True)
    batch_dims: int = field(default=0, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_rank(self)
        check_init(self.init, _FROM_WEIGHT)
        if type(self.batch_dims) is not int or self.batch_dims < 0:
            raise ValueError(f"batch_dims must be a number from 0, got {self.batch_dims!r}")
        check_flag(self, "transposed")
        if self.init == "pissa" and self.scaling <= 0:
            raise ValueError(f"init='pissa' needs an alpha above 0, got {self.alpha!r}")

    @property
    def scaling(self) -> float:
        """The factor s of the update: alpha/r, or alpha/√r where `rank_stabilized`."""
        return scaling_of(self)

    @property
    def constants(self) -> tuple[str, ...]:
        return ("A0", "B0") if self.init in ("pissa", "olora") else ()

    @property
    def fast(self) -> tuple[str, ...]:
        return ("B",)

    @property
    def additive(self) -> bool:
        return True

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        W = self._matrices(weight)
        if not self.constants:
            return start(W, weight, self.rank, self.init, generator)
        W = W.to(factor_dtype(weight))
        if self.init == "pissa":
            W = W / self.scaling
        A, B = _FROM_WEIGHT[self.init](W, self.rank)  # type: ignore[index]
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        A, B, scale = self._terms(factors, strength)
        if isinstance(scale, Tensor):
            return add_update(weight, (scale * (B @ A)).view(weight.shape))
        matrices = weight.reshape(*weight.shape[: self.batch_dims + 1], -1)
        if matrices.dtype != A.dtype:
            matrices = matrices.to(A.dtype)
        # W' in one pass over W: the scale rides in the product.
        if self.batch_dims == 0:
            matrices = torch.addmm(matrices, B, A, alpha=scale)
        else:
            flat = matrices.flatten(0, -3), B.flatten(0, -3), A.flatten(0, -3)
            matrices = torch.baddbmm(*flat, alpha=scale)
        return matrices.to(weight.dtype).view(weight.shape)

    def low_rank(self, factors: Factors, strength: Strength = 1.0) -> LowRank | None:
        return None if self.batch_dims else self._terms(factors, strength)

    def refusal(self, weight: Tensor) -> str | None:
        if low_rank_refusal(weight):
            return low_rank_refusal(weight)
        if weight.dim() < 2 + self.batch_dims:
            return (
                f"with batch_dims={self.batch_dims} it needs {2 + self.batch_dims} dimensions, it "
                f"has {weight.dim()}"
            )
        most = min(self._matrices(weight).shape[-2:])
        if self.constants and self.rank > most:
            return f"init={self.init!r} at rank {self.rank} needs a matrix of that rank, {most}"
        return None

    def _matrices(self, weight: Tensor) -> Tensor:
        """Return a tensor as matrices (out, in), in its batch dimensions."""
        matrices = weight.reshape(*weight.shape[: self.batch_dims + 1], -1)
        return matrices.mT if self.transposed else matrices

    def _terms(self, factors: Factors, strength: Strength) -> LowRank:
        """Return the update as it is added to the stored rows and columns."""
        A, B, scale = factors["A"], factors["B"], self.scaling * strength
        if "A0" in factors:
            A0, B0 = factors["A0"], factors["B0"]
            A, B = torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)
        update = LowRank(A, B, scale)
        return update.transposed() if self.transposed else update


@dataclass(frozen=True)
class Delta(Spec):
    """A full-size update, W' = W + λ·D, of any tensor; D starts at zero.

    For biases, norms and heads: what is trained beside the low-rank factors can then be switched
    off, saved and merged with them.

    >>> Delta().create(torch.ones(3))
    {'D': tensor([0., 0., 0.])}
    """

    @property
    def additive(self) -> bool:
        return True

    def create(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"D": torch.zeros_like(weight, dtype=factor_dtype(weight), requires_grad=False)}

    def apply(self, weight: Tensor, factors: Factors, strength: Strength = 1.0) -> Tensor:
        return add_update(weight, strength * factors["D"])
