"""The network of the digit study: a multilayer perceptron without any code for adapters."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class DigitNet(nn.Module):
    """A multilayer perceptron 784 → hidden → 10 with linear layers `linear1`, `linear2`, ….

    Args:
        hidden: units of each hidden layer.
        activation: "relu" between the layers, or "none", which makes the network a linear map.
        relu_logits: whether a ReLU follows the last layer.
        inputs: number of pixels of an image.
        outputs: number of logits.

    The initial weights are drawn from torch's global generator in the order of the layers.

    >>> DigitNet([256, 128])(torch.zeros(3, 784)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        hidden: Sequence[int],
        activation: str = "none",
        relu_logits: bool = False,
        *,
        inputs: int = 784,
        outputs: int = 10,
    ) -> None:
        super().__init__()
        for number, sizes in enumerate(pairwise([inputs, *hidden, outputs]), start=1):
            self.add_module(f"linear{number}", nn.Linear(*sizes))
        self.inner_relu, self.relu_logits = activation == "relu", relu_logits

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (n, 10), of inputs x, (n, 784)."""
        *inner, last = self.children()
        for layer in inner:
            x = torch.relu(layer(x)) if self.inner_relu else layer(x)
        return torch.relu(last(x)) if self.relu_logits else last(x)
