"""Routes: choose between the adapter's and the base's logits for each image."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor


def routed(on: Tensor, off: Tensor, tuned: Collection[int]) -> Tensor:
    """Return z if the base predicts a tuned class, argmax z⁰ ∈ C, else z⁰, for each image.

    Args:
        on: z, (n, classes).
        off: z⁰, (n, classes).
        tuned: the classes C.

    >>> on, off = torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> routed(on, off, [1]).tolist()
    [[1.0, 0.0], [0.0, 9.0]]
    """
    classes = torch.tensor(list(tuned), device=off.device)
    return torch.where(torch.isin(off.argmax(1), classes).unsqueeze(1), on, off)


def grouped(on: Tensor, off: Tensor, tuned: Collection[int]) -> Tensor:
    """Return logits by the chain rule: p(C) of the base, p(c | C) of the adapter.

        p(c) = p⁰(C) · p(c | C) for c ∈ C, p⁰(c) for all others

    This is a soft form of `routed`. The logits of the other classes are the base's. The tuned
    logits keep the base's log-sum-exp over C. Only a rise of p(c | C) can move an image from
    another class to a tuned one. Arguments are those of `routed`.
    """
    out, columns = off.clone(), list(tuned)
    mass = off[:, columns].logsumexp(1, keepdim=True)
    out[:, columns] = F.log_softmax(on[:, columns], 1) + mass
    return out


class Gate:
    """A learned gate that predicts from the base's logits whether an image shows a tuned class.

        g(x) = σ(w · z⁰(x) + b); z if g > ½, else z⁰

    The gate is a logistic regression on z⁰ with weight decay, fitted by 20 Newton steps.
    It needs old images, because tuned images alone are a single class. It is a minimal form of the
    task classifiers of Aljundi et al. 2017, "Expert Gate", arXiv 1611.06194.

    Args:
        off: the base's logits of tuned and of old images, (n, classes).
        is_tuned: whether each image shows a tuned class, bool (n,).
        decay: the weight decay, the factor of ½ ‖(w, b)‖² in the loss.
    """

    def __init__(self, off: Tensor, is_tuned: Tensor, decay: float = 1e-2) -> None:
        x = F.pad(off.double(), (0, 1), value=1.0)
        y = is_tuned.double()
        # Tuned and old images have the same total weight, whatever their numbers.
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
        """Return z for images with g > ½, else z⁰, (n, classes)."""
        score = off.double() @ self.w[:-1] + self.w[-1]
        return torch.where((score > 0).unsqueeze(1), on, off)
