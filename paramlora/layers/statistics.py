"""Holding running statistics still: a frozen base has more that moves than its parameters.

In training mode BatchNorm normalises by the batch and moves its running mean and variance, frozen
or not (https://github.com/huggingface/peft/issues/1732). Held, a layer stays in eval mode: it
normalises by the statistics that it has, in training as in use, and they stay to the bit.

Note [held in eval mode]
    `model.train()` and `model.eval()` call `train` of each module inside. A held layer has a
    `Held` of that name, which keeps the layer in eval mode and remembers what it was told. Not a
    hook around its forward: compiled graphs do not notice hooks that come and go. Not another
    class: parametrize keeps one of its own there.
"""

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..site.find import walk


class Held:
    """What stands in for a held layer's `train`: see Note [held in eval mode]."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training
        self.by: set[Hashable] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module, memo)
        # A copy has left the blocks that it was made in; nobody could release it from them.
        copied.by = {by for by in self.by if isinstance(by, str)}
        return copied

    def __call__(self, mode: bool = True) -> nn.Module:
        if not self.by:
            del vars(self.module)["train"]
            return self.module.train(mode)
        type(self.module).train(self.module, mode)
        self.mode, self.module.training = mode, False
        return self.module


@contextmanager
def hold_statistics(model: nn.Module) -> Iterator[None]:
    """Hold the running statistics of a model's normalisation layers still inside.

    The layers (BatchNorm of every kind, SyncBatchNorm, InstanceNorm that tracks statistics) stay
    in eval mode, whatever `model.train()` and `model.eval()` say; afterwards each is in the mode
    that it was told last. `attach(..., hold_statistics=True)` does so as long as its adapter is
    attached.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> with hold_statistics(model):
    ...     _ = model.train()
    ...     model[1].training
    False
    >>> model[1].training
    True
    """
    # Its own, so that it can be nested.
    holder = object()
    hold(model, holder)
    try:
        yield
    finally:
        release(model, {holder})


def hold(model: nn.Module, holder: Hashable) -> None:
    """Hold the statistics of a model on behalf of an adapter, by its name, or of a block."""
    for _, module in with_statistics(model):
        held = vars(module).get("train")
        if not isinstance(held, Held):
            held = Held(module)
            module.training = False
            vars(module)["train"] = held
        held.by.add(holder)


def release(model: nn.Module, holders: set[Hashable] | None) -> None:
    """Let go of what these hold, None: all adapters; a layer that nobody holds is as it was."""
    for _, module in with_statistics(model):
        held = vars(module).get("train")
        if isinstance(held, Held):
            held.by -= {by for by in held.by if isinstance(by, str)} if holders is None else holders
            if not held.by:
                del vars(module)["train"]
                module.training = held.mode


def with_statistics(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers with running statistics, by path."""
    return [
        (path, module)
        for path, module in walk(model)
        if isinstance(module, _NormBase) and module.running_mean is not None
    ]


def is_held(module: nn.Module) -> bool:
    """Return whether somebody holds a layer's statistics."""
    return isinstance(vars(module).get("train"), Held)
