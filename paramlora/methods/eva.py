"""EVA: adapters start along the directions in which the inputs of their layers vary most.

    X ≈ U S Vᵀ        A = the first r rows of Vᵀ, B = 0

X, (n, in), contains all inputs of a layer as rows. It is never stored. It arrives in pieces, and
between two pieces a layer keeps only the q largest singular values and directions:

    [S Vᵀ; X_piece] = U' S' V'ᵀ

The matrix on the left has the singular values and directions of [X_seen; X_piece]. For a matrix M
these follow from Mᵀ M alone, and X_seenᵀ X_seen = V S Uᵀ U S Vᵀ = (S Vᵀ)ᵀ (S Vᵀ). So U need not be
kept. The result is exact if the inputs have no more than q directions. Otherwise the
directions after the q-th are lost with each piece, so q is larger than r (`oversampling`).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from ..site.names import check_unmerged
from ..site.quantized import packed_tensor
from ..site.survey import Part, Survey
from ..verbs.audit import call as call_on
from ..verbs.toggle import disabled

Call = Callable[[nn.Module, Any], object] | None

# Rows in a piece. The decomposition of a piece costs about (q + rows)² · in operations.
_ROWS = 256


class _Directions:
    """The main directions of the rows of X seen so far, as S Vᵀ, (q, in)."""

    def __init__(self, q: int) -> None:
        self.q, self.rows, self.energy = q, 0, 0.0
        self.SVh: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Update the directions with the rows of x, (…, in)."""
        x = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach().unsqueeze(0)
        for piece in x.to(torch.promote_types(x.dtype, torch.float32)).split(_ROWS):
            self.rows += len(piece)
            self.energy += float(piece.square().sum())
            stacked = piece if self.SVh is None else torch.cat([self.SVh, piece])
            _, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
            self.SVh = S[: self.q].unsqueeze(1) * Vh[: self.q]  # (q, in)

    def first(self, rank: int) -> tuple[Tensor, float]:
        """Return the first directions, (rank, in), and their share of the energy Σ x²."""
        _, S, Vh = torch.linalg.svd(self.SVh, full_matrices=False)
        return Vh[:rank], float(S[:rank].square().sum()) / max(self.energy, 1e-300)


@torch.no_grad()
def eva(
    model: nn.Module,
    batches: Iterable[Any],
    *names: str,
    call: Call = None,
    oversampling: int = 16,
) -> dict[str, float]:
    """Start adapters along the main directions of their layers' inputs; outputs do not change.

    The batches pass through the model once, in evaluation mode and with all adapters off. A becomes
    the first r right-singular vectors of all inputs that its layer received; its rows are
    orthonormal. B must be zero and stays zero. Ranks stay as they are, which is ρ = 1 in the paper.

    Args:
        model: a module with `LoRA` or `DoRA` adapters at Linears.
        batches: the data. Each batch is a tensor, or a tuple, list or mapping of the arguments of
            the model's forward.
        names: the adapters to start; all if none is given.
        call: runs the model on a batch, `call(model, batch)`; None passes the batch as arguments.
        oversampling: the number of directions beyond r that a layer keeps between pieces. A
            larger number is more exact and slower.

    Returns:
        For each site, the share of its inputs' energy (Σ x²) that lies in the r directions.

    Raises:
        AdapterNameError: an adapter does not exist.
        TargetError: an adapter is of another kind, or not at the weight of a Linear.
        StateError: an adapter is merged or trained (its B is not zero), or its layer received fewer
            than r rows of inputs. The model is unchanged then.
        ValueError: `oversampling` is not a whole number of at least 0.

    >>> import paramlora as pl
    >>> model = nn.Linear(6, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight")
    >>> pl.eva(model, [torch.ones(4, 6) + torch.eye(4, 6)])["weight"] > 0.9
    True

    Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
    Variance Adaptation", arXiv 2410.07170, section 3.
    """
    survey = Survey(model)
    parts = survey.parts(names)
    check_unmerged(survey.stacks, names, "start")
    for part in parts:
        _check(part)
    if type(oversampling) is not int or oversampling < 0:
        raise ValueError(f"oversampling must be a whole number of at least 0, got {oversampling!r}")
    directions: dict[nn.Module, _Directions] = {}
    for _, _, site, factors in parts:
        q = factors.tensors["A"].shape[0] + oversampling
        shared = directions.setdefault(site.module, _Directions(q))
        shared.q = max(shared.q, q)
    run_on(model, batches, call, directions)
    starts = []
    for path, _, site, factors in parts:
        A, inputs = factors.tensors["A"], directions[site.module]
        if inputs.rows < len(A):
            raise StateError(
                f"cannot start {path!r} at rank {len(A)} from {inputs.rows} rows of inputs; give "
                "more batches, or leave it out if its module's forward is never called"
            )
        starts.append((path, A, *inputs.first(len(A))))
    for _, A, first, _ in starts:
        # If in < r, there are only `in` directions, and the other rows of A stay random.
        A[: len(first)] = first.to(A.dtype)
    return {path: share for path, _, _, share in starts}


def _check(part: Part) -> None:
    """Raise an error if an adapter cannot start from the inputs of its layer."""
    path, _, site, factors = part
    spec, packed = factors.spec, packed_tensor(site.module) is not None
    if not (packed or isinstance(site.module, nn.Linear)) or site.tensor != "weight":
        raise TargetError(
            f"cannot start {path!r} from inputs: it is not the weight of an nn.Linear; name other "
            "adapters"
        )
    plain = isinstance(spec, LoRA | DoRA) and not spec.constants
    if not plain or factors.block is not None or getattr(spec, "transposed", False):
        raise TargetError(
            f"cannot start {path!r} from inputs: only LoRA and DoRA at whole tensors can, not "
            f"transposed and with B zero at the start, and this is {spec!r}; name other adapters"
        )
    if factors.tensors["B"].any():
        raise StateError(
            f"cannot start {path!r} from inputs: its B is not zero, so the outputs would change; "
            "attach a new adapter"
        )


def run_on(
    model: nn.Module, batches: Iterable[Any], call: Call, directions: Mapping[nn.Module, Any]
) -> None:
    """Run the model on the batches, and call `add` with the inputs of each module."""
    # bitsandbytes packs a layer in evaluation mode, and unpacks it in its own `train`.
    modules = [module for module in model.modules() if packed_tensor(module) is None]
    modes = [(module, module.training) for module in modules]
    with ExitStack() as stack:
        stack.enter_context(disabled(model))
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        for module, seen in directions.items():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, to=seen: to.add(args[0] if args else kwargs["input"]),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        for module, _ in modes:
            # Do not call eval(): a layer with held statistics (`hold_statistics`) records calls of
            # train() and eval() as the mode that the user wants.
            module.training = False
        for batch in batches:
            (call or call_on)(model, batch)
