"""CorDA and LoRA-Null: adapters start from a part of the weight that inputs of the layer choose.

    CorDA        W C = U Σ Vᵀ,  s B A = U_r Σ_r V_rᵀ C⁻¹        C = XᵀX / n + damping, (in, in)
    LoRA-Null    s B A = W N Nᵀ                                  N: the r directions of least XᵀX

X: (n, in) contains all inputs of a layer as rows, and the index r selects r of the singular values.
The papers subtract s B A from the stored weight. Here it stays as it is, and A₀ and B₀ keep the
starting values: W' = W + λ · s · (B A − B₀ A₀), as for `LoRA(init="pissa")`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError
from ..kinds.lora import LoRA
from ..kinds.start import truncated_svd
from ..site.find import base_weight
from ..site.names import check_unmerged
from ..site.survey import Part, Survey
from .eva import Call, run_on

# PEFT's damping: the covariance of few inputs has no inverse.
_DAMPING = 0.01


class _Covariance:
    """The sum of x xᵀ over all rows of the inputs, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).double()
        self.rows += len(x)
        product = x.T @ x  # (in, in)
        self.total = product if self.total is None else self.total + product


@torch.no_grad()
def corda(
    model: nn.Module,
    batches: Iterable[Any],
    *names: str,
    mode: Literal["knowledge", "instruction"],
    call: Call = None,
) -> None:
    """Start `LoRA(init="corda")` adapters from the context of their inputs; outputs do not change.

    The batches pass through the model once, in evaluation mode and with all adapters off.

    Args:
        model: a module with `LoRA(init="corda")` adapters at the weights of Linears.
        batches: the data; as in `eva`.
        names: the adapters to start; all if none is given.
        mode: "knowledge" trains the directions of the smallest singular values, so that what the
            batches need is preserved. "instruction" trains those of the largest, so that the task
            of the batches is learned faster.
        call: runs the model on a batch, `call(model, batch)`; None passes the batch as arguments.

    Raises:
        AdapterNameError: an adapter does not exist.
        TargetError: an adapter has another init or kind, or is not at the weight of a Linear.
        StateError: an adapter is merged or trained, or its layer received no inputs. The model is
            unchanged then.
        ValueError: `mode` is invalid.

    >>> import paramlora as pl
    >>> model = nn.Linear(6, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2, init="corda"), "weight")
    >>> pl.corda(model, [torch.randn(9, 6)], mode="knowledge")

    Source: Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language
    Models for Task-Aware Parameter-Efficient Fine-tuning", arXiv 2406.05223, section 3.
    """
    if mode not in ("knowledge", "instruction"):
        raise ValueError(f"mode must be 'knowledge' or 'instruction', got {mode!r}")

    def part(W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        C = C + _DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        A, B, _ = truncated_svd(W @ C, rank, smallest=mode == "knowledge")
        return torch.linalg.solve(C, A, left=False), B  # A C⁻¹

    _start(model, batches, names, "corda", part, call)


@torch.no_grad()
def lora_null(model: nn.Module, batches: Iterable[Any], *names: str, call: Call = None) -> None:
    """Start `LoRA(init="null")` adapters in the null space of their inputs; outputs do not change.

    A's rows lie in the r directions in which the batches have the least energy, so that training
    changes the outputs for such batches little.

    Args:
        model, batches, names, call: as in `corda`, with `LoRA(init="null")`.

    Raises:
        AdapterNameError, TargetError, StateError: as in `corda`.

    >>> import paramlora as pl
    >>> model = nn.Linear(6, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2, init="null"), "weight")
    >>> pl.lora_null(model, [torch.randn(9, 6)])

    Source: Tang et al. 2025, "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language
    Models", arXiv 2503.02659, section 3.
    """

    def part(W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        N = torch.linalg.eigh(C)[1][:, :rank]  # (in, r), in the order of rising energy
        A, B, _ = truncated_svd(W @ N @ N.T, rank)
        return A, B

    _start(model, batches, names, "null", part, call)


def _start(
    model: nn.Module,
    batches: Iterable[Any],
    names: tuple[str, ...],
    init: str,
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    call: Call,
) -> None:
    """Set A = A₀ and B = B₀ from the part that is chosen by W and the inputs' covariance."""
    survey = Survey(model)
    parts = survey.parts(names)
    check_unmerged(survey.stacks, names, "start")
    for part in parts:
        _check(part, init)
    seen = {part.site.module: _Covariance() for part in parts}
    run_on(model, batches, call, seen)
    starts = []
    for path, _, site, factors in parts:
        inputs = seen[site.module]
        if inputs.total is None or not inputs.total.any():
            raise StateError(
                f"cannot start {path!r}: its module received no inputs, or only zeros; give more "
                "batches, or leave it out"
            )
        W = base_weight(site.plist, site.stack).double() / factors.spec.scaling
        rank = len(factors.tensors["A"])
        starts.append((factors.tensors, *choose(W, inputs.total / inputs.rows, rank)))
    for tensors, A, B in starts:
        for key, value in (("A", A), ("A0", A), ("B", B), ("B0", B)):
            tensors[key].copy_(value)


def _check(part: Part, init: str) -> None:
    """Raise an error if an adapter cannot start from the inputs of its layer."""
    path, _, site, factors = part
    spec, linear = factors.spec, isinstance(site.module, nn.Linear) and site.tensor == "weight"
    fits = isinstance(spec, LoRA) and spec.init == init and not spec.transposed
    if not (linear and fits) or factors.block is not None:
        raise TargetError(
            f"cannot start {path!r}: it needs a LoRA(init={init!r}), not transposed, at the whole "
            f"weight of an nn.Linear, and this is {spec!r}; name other adapters"
        )
    tensors = factors.tensors
    if not all(torch.equal(tensors[key], tensors[f"{key}0"]) for key in "AB"):
        raise StateError(f"cannot start {path!r}: it is trained already; attach a new adapter")
