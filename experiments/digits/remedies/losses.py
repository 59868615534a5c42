"""Remedies in the training loss. The letters are those of the package's docstring."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paramlora as pl


def mask_or_shift_logits(logits: Tensor, tuned: Collection[int], margin: float) -> Tensor:
    """Return logits with those of the other classes lowered by `margin`: z_c - m for c not in C.

    In the training loss alone. At m = 0 it is the plain cross-entropy; at m = ∞ the masked one,
    softmax over C only, so that learning C against C pushes no other class down (Caccia et al.
    2022, "New insights on reducing abrupt representation change", ER-ACE, arXiv 2104.05025). In
    between, an image of a tuned digit need not beat the other digits by as much as it would: the
    margin is that of logit adjustment (Menon et al. 2021, arXiv 2007.07314, eq. 10) with a prior of
    the other classes e^-m times as large.

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

    Sources: Hinton et al. 2015, arXiv 1503.02531; on new images only, as here: Li and Hoiem 2016,
    "Learning without Forgetting", arXiv 1606.09282.
    """
    student, target = (F.log_softmax(z / temperature, -1) for z in (logits, teacher))
    return temperature**2 * divergence(target, student)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) from log-probabilities, the mean over examples, nats.

    Written out: torch's `kl_div` knows no vmap, and is one by one inside it.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def kept_mass(logits: Tensor, teacher: Tensor, tuned: Collection[int]) -> Tensor:
    """Return KL(q⁰ ‖ q) of the two-way answer q = (Σ_C softmax(z), 1 - it), mean, nats.

    Distils only whether an image shows a tuned class at all, and leaves which one free.
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
    """Return the logits of the model with adapters off, (n, classes): the teacher, without a copy.

    The base does not change while adapters train, so once before training is enough.
    """
    with pl.disabled(model, *names):
        return model(inputs)
