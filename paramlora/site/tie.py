"""The second and further tensors of a tie: they share the stack of the first one.

A tied tensor has one stack, so one set of factors. If the stack were a child of every module that
holds the tensor, a state dict would have the factors under each of their paths, and a file format
without shared tensors (safetensors) would refuse it. So the first module owns the stack, and the
others have a `Tie` in its place, which calls the stack without being its parent:

    embed.weight, embed.parametrizations.weight.0.factors.digits.A
    head.weight                                  (tied to embed.weight, adapted by its stack)
"""

from torch import Tensor, nn

from ..stack.stack import Stack


class Tie(nn.Module):
    """The parametrization of a tied tensor whose stack belongs to another module."""

    stack: Stack

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        # Not through nn.Module.__setattr__, which would make the stack a child.
        vars(self)["stack"] = stack

    def forward(self, weight: Tensor) -> Tensor:
        return self.stack(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.stack.right_inverse(weight)
