"""Adam for small networks, by the kernel of torch's fused Adam and nothing around it.

Replaces `torch.optim.Adam(parameters, lr, fused=True)`, whose weights it gives bit by bit. With
tensors as small as a digit network's, what torch's class does around the kernel at every step
(profiler ranges, hooks, grouping by device and dtype, a look for graph capture) takes as much time
as the kernel, a fifth of the whole training step. Left out for it: parameter groups, weight
decay, state dicts, hooks, gradients that are missing. `torch._fused_adam_` is not documented; the
tests compare with `torch.optim.Adam`, which stays the reference.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's


class SmallAdam:
    """Adam with the step size `lr` on `parameters`, all floating and of one device and dtype.

    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.lr = lr
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        # The kernel wants a counter a parameter and only reads them: one serves all.
        self.count = torch.zeros((), device=self.parameters[0].device)

    def step(self) -> None:
        """Move every parameter by its gradient."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        with torch.no_grad():
            self.count += 1
            torch._fused_adam_(
                self.parameters,
                gradients,
                self.means,
                self.squares,
                [],
                [self.count] * len(gradients),
                lr=self.lr,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=0.0,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None
