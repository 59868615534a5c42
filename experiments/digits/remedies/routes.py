"""Routes: which images the adapter answers, and which its base."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor


def routed(on: Tensor, off: Tensor, tuned: Collection[int]) -> Tensor:
    """Return z where the base answers a tuned class, else z⁰: argmax z⁰ ∈ C ? z : z⁰.

    >>> on, off = torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> routed(on, off, [1]).tolist()
    [[1.0, 0.0], [0.0, 9.0]]
    """
    classes = torch.tensor(list(tuned), device=off.device)
    return torch.where(torch.isin(off.argmax(1), classes).unsqueeze(1), on, off)


def grouped(on: Tensor, off: Tensor, tuned: Collection[int]) -> Tensor:
    """Return logits by the chain rule: the base says whether C, the adapter says which of C.

        p(c) = p⁰(C) · p(c | C) for c ∈ C, p⁰(c) for all others

    A soft `routed`: the tuned logits keep the base's log-sum-exp over C, and the other classes'
    logits are the base's, so that no other class loses an image but to a tuned one that sharpens.
    """
    out, columns = off.clone(), list(tuned)
    mass = off[:, columns].logsumexp(1, keepdim=True)
    out[:, columns] = F.log_softmax(on[:, columns], 1) + mass
    return out


class Gate:
    """A learned gate: whether an image shows a tuned class, from the base's logits.

        g(x) = σ(w · z⁰(x) + b): the adapter answers where g > ½

    A logistic regression on z⁰, with weight decay, by Newton's method (20 steps). Old images
    are what it takes: without them it has one class only. Source: the task classifiers of Aljundi
    et al. 2017, "Expert Gate", arXiv 1611.06194, as small as they come.

    Args:
        off: the base's logits of tuned and of old images, (n, classes).
        is_tuned: bool (n,).
        decay: of the weights' squares.
    """

    def __init__(self, off: Tensor, is_tuned: Tensor, decay: float = 1e-2) -> None:
        x = F.pad(off.double(), (0, 1), value=1.0)
        y = is_tuned.double()
        # Both sides weigh the same, however many images each has.
        weight = torch.where(is_tuned, 0.5 / y.sum(), 0.5 / (1 - y).sum())
        w = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        ridge = decay * torch.eye(len(w), dtype=x.dtype, device=x.device)
        for _ in range(20):
            p = torch.sigmoid(x @ w)
            gradient = x.T @ (weight * (p - y)) + ridge @ w
            curvature = (x * (weight * p * (1 - p)).unsqueeze(1)).T @ x + ridge
            w = w - torch.linalg.solve(curvature, gradient)
        self.w = w

    def __call__(self, on: Tensor, off: Tensor) -> Tensor:
        """Return z where the gate is open, else z⁰."""
        score = off.double() @ self.w[:-1] + self.w[-1]
        return torch.where((score > 0).unsqueeze(1), on, off)
