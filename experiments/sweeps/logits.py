"""The logits of trained factors on the test images, at several strengths λ."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

import paramlora as pl
from paramlora.kinds import Spec

from ..digits.context import StudyContext
from ..digits.methods import ADAPTER, factors_of
from .spectra import by_path


@torch.no_grad()
def full_logits(
    context: StudyContext, deltas: Mapping[str, Tensor], strengths: Sequence[float]
) -> Tensor:
    """Return the logits of the test images with W + λ·ΔW for each λ, (strengths, n, classes).

    Args:
        context: the base and the images.
        deltas: the updates of weights and biases, by the names of their factors.
        strengths: the values of λ.
    """
    model = context.model()
    base = dict(model.named_parameters())
    found = []
    for λ in strengths:
        tuned = {path: base[path] + λ * delta for path, delta in by_path(deltas).items()}
        found.append(
            functional_call(model, tuned, context.test_inputs) if λ else context.base_logits
        )
    return torch.stack(found)


@torch.no_grad()
def spec_logits(
    context: StudyContext, spec: Spec, factors: Mapping[str, Tensor], strengths: Sequence[float]
) -> Tensor:
    """Return the logits of the test images with an adapter of a kind, (strengths, n, classes).

    The constants of the kind are computed from the weights again, so they must not be random.
    """
    model = context.model()
    pl.attach(model, spec, nn.Linear, name=ADAPTER)
    for name, factor in factors_of(model).items():
        factor.copy_(factors[name])
    found = []
    for λ in strengths:
        with pl.using(model, {ADAPTER: λ}):
            found.append(context.evaluate(model))
    return torch.stack(found)
