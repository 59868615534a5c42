"""The methods of fine-tuning on parity, as weights of the log-probabilities in one loss.

    loss = -mean over images Σ_c w_c log π(c | x)

    sft-1    w is 1 at one digit: 0 if the label is even, 1 if it is odd
    sft-2    the same with a digit drawn for each image and step: from {0, 4} or from {1, 5}
    oracle   w = π₀ restricted to the digits of the right parity, and normalised: the distribution
             that solves the task at the smallest divergence from the base π₀
    grpo     digits a_1, …, a_k are drawn from π itself, the reward R is 1 for the right parity:
             w_c = 1/k Σ_i A_i [a_i = c],  A = (R - mean R) / (std R + 1e-8), without a KL term

Source: Shenfeld et al. 2025, "RL's Razor: Why Online Reinforcement Learning Forgets Less", arXiv
2509.04259. w has no gradient. The draws of sft-2 and grpo come from uniform numbers that all
trainings of a base share, so that a training does not depend on those beside it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Draw:
    """A batch of each of s bases.

    Attributes:
        inputs: float32 (s, n, 785).
        labels: the digits, int64 (s, n).
        uniform: numbers from 0 to 1, (s, n, k), one for each answer of GRPO.
        base: the base's logits, (s, n, 10).
    """

    inputs: Tensor
    labels: Tensor
    uniform: Tensor
    base: Tensor

    @property
    def parity(self) -> Tensor:
        """0 for even and 1 for odd digits, int64 (s, n)."""
        return self.labels % 2


def weights(method: str, logits: Tensor, draw: Draw) -> Tensor:
    """Return the weights w of a method, (…, s, n, 10) or (s, n, 10).

    Args:
        method: the name of the method.
        logits: the network's logits of the batch, (…, s, n, 10).
        draw: the batch.
    """
    if method == "sft-1":
        return F.one_hot(draw.parity, CLASSES).to(logits.dtype)
    if method == "sft-2":
        four = (draw.uniform[..., 0] < 0.5).long() * 4
        return F.one_hot(draw.parity + four, CLASSES).to(logits.dtype)
    if method == "oracle":
        return restricted(draw.base, draw.parity)
    return advantages(logits.detach(), draw)


def restricted(logits: Tensor, parity: Tensor) -> Tensor:
    """Return the softmax of logits, (…, 10), over the digits of a parity (…,) only."""
    digits = torch.arange(CLASSES, device=logits.device)
    wrong = digits % 2 != parity.unsqueeze(-1)
    return logits.masked_fill(wrong, -torch.inf).softmax(-1)


def advantages(logits: Tensor, draw: Draw) -> Tensor:
    """Return GRPO's weights, (…, s, n, 10), for logits (…, s, n, 10)."""
    limits = logits.softmax(-1).cumsum(-1)[..., :-1]  # (…, s, n, 9)
    # The answer to a number u is the number of limits below it: inverse transform sampling.
    answers = (draw.uniform.unsqueeze(-1) > limits.unsqueeze(-2)).sum(-1)  # (…, s, n, k)
    rewards = (answers % 2 == draw.parity.unsqueeze(-1)).to(logits.dtype)
    spread = rewards.std(-1, keepdim=True) + 1e-8
    gains = (rewards - rewards.mean(-1, keepdim=True)) / spread
    found = torch.zeros_like(logits)
    return found.scatter_add_(-1, answers, gains / answers.shape[-1])
