"""Null-space projection: remove input directions from the rows of A."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...analysis.evaluate import logits_of
from ...harness.train import Hook
from ..context import StudyContext

Factors = Mapping[str, Tensor]


def principal(rows: Tensor, energy: float) -> Tensor:
    """Return the right-singular vectors of `rows` with a share of the energy, (k, in).

    k is the smallest with Σ_{i≤k} σ_i² ≥ energy · Σ σ_i². Source: Saha et al. 2021, "Gradient
    Projection Memory", arXiv 2103.09762, eq. 5.

    Args:
        rows: activations, one example a row, (n, in), or a weight, (out, in).
        energy: 0 (no vectors) to 1 (all vectors with a nonzero singular value).

    >>> principal(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), 0.9).abs()
    tensor([[1., 0., 0.]])
    """
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    share = (sizes**2).cumsum(0) / (sizes**2).sum()
    # The tolerance of torch.linalg.matrix_rank: smaller singular values are rounding errors.
    rank = int((sizes > sizes[0] * max(rows.shape) * torch.finfo(rows.dtype).eps).sum())
    kept = int((share < energy).sum()) + 1 if energy > 0 else 0
    return right[: min(kept, rank)]


@torch.no_grad()
def project_away(A: Tensor, directions: Tensor) -> None:
    """Project the rows of A onto the complement of span(D), in place: A ← A - A Dᵀ D.

    The update then does not change inputs in that span: x ∈ span(D) ⇒ B A x = 0. Sources: Saha et
    al. 2021 (GPM, which projects gradients); Wang et al. 2021, "Training networks in null space",
    arXiv 2103.07113.

    Args:
        A: (…, r, in).
        directions: D with orthonormal rows, (k, in).
    """
    A -= A @ directions.T @ directions


def forbidden(context: StudyContext, old: Tensor) -> dict[str, Tensor]:
    """Return the directions to project out of A, (k, in), by layer path.

    Args:
        context: the base, the data and the settings.
        old: the rows of the old images, int64 (n,), for `null_space_of` = "old".
    """
    settings, model = context.settings, context.model()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    if settings.remedies.null_space_of == "weights":
        seen = {path: layer.weight.detach() for path, layer in layers.items()}
    else:
        seen = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, path=path: seen.update({path: x[0]}))
            for path, layer in layers.items()
        ]
        logits_of(model, context.inputs[old])
        for hook in hooks:
            hook.remove()
    return {path: principal(rows, settings.remedies.null_space) for path, rows in seen.items()}


def keep_out(factors: Factors, directions: Mapping[str, Tensor]) -> Hook:
    """Project the directions out of each A now; return a hook that does so after each step.

    Adam's step mixes gradients of earlier steps and scales them elementwise, so projecting the
    gradient would not keep A in the complement. The hook therefore projects A itself.
    """
    pairs = [
        (factor, directions[name.split(".parametrizations.")[0]])
        for name, factor in factors.items()
        if name.endswith(".A")
    ]

    def hook(step: int, model: nn.Module, loss: Tensor) -> None:
        for factor, layer_directions in pairs:
            project_away(factor, layer_directions)

    hook(0, nn.Identity(), torch.tensor(0.0))
    return hook
