"""EVA: adapters start along the directions in which their layers' inputs vary most.

    X ≈ U S Vᵀ        X: (n, in), all inputs of a layer; A = the first r rows of Vᵀ, B = 0

The inputs are seen once, in pieces: what is kept of a layer are q singular values and directions,
of which the next piece makes new ones, [S Vᵀ; X_piece] = U' S' V'ᵀ. That is exact as long as the
inputs have no more than q directions, and else loses what is below the q-th.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, TargetError
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from ..site.factors import Factors
from ..site.find import Site
from ..site.names import check_unmerged
from ..site.survey import first_sites, select
from ..verbs.toggle import disabled

# Rows to take in at a time: a decomposition costs (q + rows)² · in.
_ROWS = 256


class _Directions:
    """The main directions of the rows seen so far: S Vᵀ, (q, in)."""

    def __init__(self, most: int) -> None:
        self.most, self.rows, self.energy = most, 0, 0.0
        self.kept: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2) if x.dim() > 1 else x.detach().unsqueeze(0)
        for piece in x.to(torch.promote_types(x.dtype, torch.float32)).split(_ROWS):
            self.rows += len(piece)
            self.energy += float(piece.square().sum())
            both = piece if self.kept is None else torch.cat([self.kept, piece])
            _, S, Vh = torch.linalg.svd(both, full_matrices=False)
            self.kept = S[: self.most].unsqueeze(1) * Vh[: self.most]

    def first(self, rank: int) -> tuple[Tensor, float]:
        """Return the first directions, orthonormal, and their share of all energy."""
        _, S, Vh = torch.linalg.svd(self.kept, full_matrices=False)
        return Vh[:rank], float(S[:rank].square().sum()) / max(self.energy, 1e-300)


@torch.no_grad()
def eva(
    model: nn.Module,
    batches: Iterable[Any],
    *names: str,
    call: Callable[[nn.Module, Any], object] | None = None,
    oversampling: int = 16,
) -> dict[str, float]:
    """Start adapters along the main directions of their layers' inputs; outputs stay as they are.

    The batches pass through the model once, in eval mode and with all adapters switched off. A
    becomes the first r right-singular vectors of all inputs that a layer has seen, its rows
    orthonormal; B has to be zero, and stays so. Ranks stay as they are: of the paper, this is
    ρ = 1.

    Args:
        model: a module with adapters of kind `LoRA` or `DoRA`, at Linears.
        batches: what to pass: a tensor, or a tuple, list or mapping of the model's arguments.
        names: the adapters; none given means all.
        call: `call(model, batch)` runs the model, where its arguments are not the batch.
        oversampling: how many more than r directions are kept on the way.

    Returns:
        For each site, the share of its inputs' energy that the r directions hold.

    Raises:
        AdapterNameError: no adapter of that name.
        TargetError: an adapter is at something else than a Linear, or of another kind.
        StateError: an adapter is merged, or has learned (its B is not zero), or no input or fewer
            than r rows reached a layer. The model is then as it was.

    Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
    Variance Adaptation", arXiv 2410.07170, section 3.

    >>> import paramlora as pl
    >>> model = nn.Linear(6, 3)
    >>> _ = pl.attach(model, pl.LoRA(rank=2), "weight")
    >>> pl.eva(model, [torch.ones(4, 6) + torch.eye(4, 6)])["weight"] > 0.9
    True
    """
    chosen = select(model, names)
    check_unmerged(chosen, "start")
    by_stack = {id(stack): its_names for stack, its_names in chosen}
    parts = [
        (site, path, factors)
        for site in first_sites(model)
        for name in by_stack.get(id(site.stack), ())
        for path, factors in site.parts(name).items()
    ]
    for site, path, factors in parts:
        _check(site, path, factors)
    if type(oversampling) is not int or oversampling < 0:
        raise ValueError(f"oversampling must be a whole number from 0, got {oversampling!r}")
    found: dict[nn.Module, _Directions] = {}
    for site, _, factors in parts:
        most = factors.tensors["A"].shape[0] + oversampling
        known = found.setdefault(site.module, _Directions(most))
        known.most = max(known.most, most)
    _run(model, batches, call, found)
    starts = []
    for site, path, factors in parts:
        A, inputs = factors.tensors["A"], found[site.module]
        if inputs.rows < len(A):
            raise StateError(
                f"cannot start {path!r} at rank {len(A)} from {inputs.rows} rows of inputs; give "
                "more batches, or leave it out if its module's forward is never called"
            )
        starts.append((path, A, *inputs.first(len(A))))
    for _, A, directions, _ in starts:
        A[: len(directions)] = directions.to(A.dtype)
    return {path: share for path, _, _, share in starts}


def _check(site: Site, path: str, factors: Factors) -> None:
    """Raise where an adapter cannot start from its layer's inputs."""
    spec, linear = factors.spec, isinstance(site.module, nn.Linear) and site.tensor == "weight"
    if not linear:
        raise TargetError(
            f"cannot start {path!r} from inputs: it is no Linear's weight; name other adapters"
        )
    plain = isinstance(spec, LoRA | DoRA) and not spec.constants
    if not plain or factors.block is not None or getattr(spec, "transposed", False):
        raise TargetError(
            f"cannot start {path!r} from inputs: that is for LoRA and DoRA at whole tensors, not "
            f"transposed, with B zero at the start, and this is {spec!r}; name other adapters"
        )
    if factors.tensors["B"].any():
        raise StateError(
            f"cannot start {path!r} from inputs: its B is not zero, so the outputs would change; "
            "attach a new adapter"
        )


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], object] | None,
    found: dict[nn.Module, _Directions],
) -> None:
    """Pass the batches through the model, and each module's inputs to its directions."""
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(disabled(model))
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        for module, directions in found.items():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs, to=directions: to.add(args[0] if args else kwargs["input"]),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        for module, _ in modes:
            # Not by eval(): a layer whose statistics are held remembers what it was told.
            module.training = False
        for batch in batches:
            (call or _call)(model, batch)


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
