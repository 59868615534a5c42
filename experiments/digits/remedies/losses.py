"""Remedies in the training loss. The package's docstring defines the letters."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl


def mask_or_shift_logits(logits: Tensor, tuned: Collection[int], margin: float) -> Tensor:
    """Return the logits with m subtracted from those of all other classes.

        z_c      for c ∈ C
        z_c - m  for c ∉ C

    Use this in the training loss only. Plain cross-entropy on tuned images alone pushes the logits
    of all other classes down, although no image asks for that. With m = ∞ the other classes are
    masked: the softmax is over C only, and their logits get no gradient (Caccia et al. 2022, "New
    insights on reducing abrupt representation change", ER-ACE, arXiv 2104.05025). With m = 0 the
    loss is the plain cross-entropy. A finite m reduces the gradient: it is logit adjustment (Menon
    et al. 2021, arXiv 2007.07314, eq. 10) with the prior of the other classes multiplied by e^-m.

    Args:
        logits: z, (n, classes).
        tuned: the classes C.
        margin: m, in nats, at least 0.

    >>> mask_or_shift_logits(torch.tensor([[1.0, 2.0, 3.0]]), [0, 2], 5.0)
    tensor([[ 1., -3.,  3.]])
    """
    if margin == 0:
        return logits
    shift = torch.full((logits.shape[-1],), -margin, dtype=logits.dtype, device=logits.device)
    shift[list(tuned)] = 0
    return logits + shift


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(z⁰/T) ‖ softmax(z/T)), the mean over examples, nats.

    T² keeps the size of the gradient independent of T. Sources: Hinton et al. 2015, arXiv
    1503.02531. Li and Hoiem 2016, "Learning without Forgetting", arXiv 1606.09282, which also
    distils on new images only.
    """
    student, target = (F.log_softmax(z / temperature, -1) for z in (logits, teacher))
    return temperature**2 * divergence(target, student)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) from log-probabilities, the mean over examples, nats.

    The formula is written out because `F.kl_div` has no batching rule for vmap, which would loop
    over the seeds.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def kept_mass(logits: Tensor, teacher: Tensor, tuned: Collection[int]) -> Tensor:
    """Return KL(q⁰ ‖ q) with q = (p(C), 1 - p(C)) and p = softmax(z), the mean, in nats.

    This distils only the probability that an image shows any tuned class. The adapter is free to
    change the probabilities within C. Log-sum-exp avoids log(0) when p(C) rounds to 0 or 1.
    """
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[list(tuned)] = True

    def groups(z: Tensor) -> Tensor:
        minus = torch.tensor(-torch.inf, dtype=z.dtype, device=z.device)
        sides = (torch.where(chosen, z, minus), torch.where(chosen, minus, z))
        return F.log_softmax(torch.stack([side.logsumexp(-1) for side in sides], -1), -1)

    return divergence(groups(teacher), groups(logits))


@torch.no_grad()
def switched_off(model: nn.Module, inputs: Tensor, *names: str) -> Tensor:
    """Return the teacher's logits z⁰, (n, classes): those of the model with its adapters off.

    No copy of the base is needed. The base does not change during training, so one call before
    training is enough.
    """
    with pl.disabled(model, *names):
        return model(inputs)
